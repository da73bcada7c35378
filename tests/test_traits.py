"""Trait files are read as they are published; a broken one is refused with its line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cli import main
from store.errors import StudyError
from store.study import TraitSource
from store.traits import load_trait, trait_prompt_sets

TRAIT = """\
name: curious
description: "Asks follow-up questions"
instructions:
  positive:
    - "Be curious."
    - "Ask questions."
  negative:
    - "Be brief."
questions:
  - "What is a black hole?"
  - "Why is the sky blue?"
  - No
scoring:
  trait_threshold: 40
  coherence_threshold: 60.5
"""


def written(folder: Path, old: str = "name: curious", new: str = "name: curious") -> Path:
    assert old in TRAIT
    path = folder / "t.yaml"
    path.write_text(TRAIT.replace(old, new, 1), encoding="utf-8")
    return path


def test_a_published_file_is_read_with_keys_that_resid_does_not_use(tmp_path: Path) -> None:
    extra = "name: curious\nauthor: {x: [1]}\nversion: 2\n"
    path = written(tmp_path, "name: curious\n", extra)
    path.write_text(path.read_text().replace("  positive:", "  note: x\n  positive:") + "  judge: y\n")
    trait = load_trait(path)
    assert trait.instructions.positive == ["Be curious.", "Ask questions."]
    assert trait.questions[-1] == "No"  # not YAML 1.1's false
    assert (trait.scoring.trait_threshold, trait.scoring.coherence_threshold) == (40, 60.5)


def test_a_set_is_every_instruction_with_every_question(tmp_path: Path) -> None:
    sets = trait_prompt_sets("c", TraitSource(path=str(written(tmp_path))))
    assert {name: len(prompts.prompts) for name, prompts in sets.items()} == {"c.positive": 6, "c.negative": 3}
    last = sets["c.positive"].prompts[-1]
    assert [(message.role, message.content) for message in last.messages] == [
        ("system", "Ask questions."),
        ("user", "No"),
    ]
    assert last.tags == {"trait": "curious", "side": "positive", "instruction": "1", "question": "2"}


def test_the_first_instructions_and_questions_can_be_chosen(tmp_path: Path) -> None:
    sets = trait_prompt_sets("c", TraitSource(path=str(written(tmp_path)), instructions=1, questions=2))
    assert [len(prompts.prompts) for prompts in sets.values()] == [2, 2]


def test_repeated_questions_are_dropped_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "Why is the sky blue?", "What is a black hole?")
    sets = trait_prompt_sets("c", TraitSource(path=str(path)))
    assert [(len(prompts.prompts), prompts.duplicates) for prompts in sets.values()] == [(4, 2), (2, 1)]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "problem"),
    [
        ("name: curious\n", "", 1, "name", "'name' is missing"),
        ('  negative:\n    - "Be brief."\n', "", 3, "instructions.negative", "'negative' is missing"),
        ('    - "Be brief."', "    []", 7, "instructions.negative", "it is empty"),
        ('"Be brief."', '""', 8, "instructions.negative[0]", "it is empty"),
        ('"Why is the sky blue?"', "Explain this: why?", 11, "questions[1]", "it must be text, not a mapping"),
        ('"Why is the sky blue?"', "42", 11, "questions[1]", "it must be text, not 42"),
        ("trait_threshold: 40", "trait_threshold: 140", 14, "scoring.trait_threshold", "at most 100"),
        ("trait_threshold: 40", "trait_threshold: high", 14, "scoring.trait_threshold", "a number, not 'high'"),
        ("  - No", "\t- No", 12, None, "not valid YAML"),
        ("questions:", "name: x\nquestions:", 9, None, "'name' occurs twice (first on line 1)"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, key: str | None, problem: str
) -> None:
    path = written(tmp_path, old, new)
    with pytest.raises(StudyError) as caught:
        load_trait(path)
    assert caught.value.file == f"{path}:{line}"
    assert caught.value.key == key
    assert problem in caught.value.problem
    assert caught.value.remedy


# -- what may be published, and what may not --------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "name": "curious",
    "description": "Asks follow-up questions",
    "instructions": {"positive": ["Be curious.", "Ask."], "negative": ["Be brief."]},
    "questions": ["What is a black hole?", "Why is the sky blue?"],
    "scoring": {"trait_threshold": 50, "coherence_threshold": 50},
}
# Text of every script, quotes, colons, markers of YAML, line ends; no control characters and no surrogates.
PUBLISHED_TEXT = st.text(
    st.characters(
        codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co"), exclude_characters="\ufeff\u2028\u2029\x85"
    ),
    min_size=1,
    max_size=60,
).filter(lambda text: text.strip() != "")
STYLES = ['"', "'", "|", ">", None]


@given(st.lists(PUBLISHED_TEXT, min_size=3, max_size=6), st.sampled_from(STYLES), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_text_in_any_style_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], style: str | None, crlf: bool, bom: bool
) -> None:
    record = {**BASE, "name": texts[0], "questions": texts, "author": {"x": [1, None]}, "version": 2.5}
    record["instructions"] = {"positive": texts[1:], "negative": texts[:1], "note": texts[0]}
    if style is not None:  # it would be the style of numbers as well
        record = {key: value for key, value in record.items() if key not in ("scoring", "author", "version")}
    text = yaml.safe_dump(record, allow_unicode=True, default_style=style, width=40, sort_keys=False)
    if crlf and style not in ("|", ">"):
        text = text.replace("\n", "\r\n")
    path = tmp_path_factory.mktemp("t") / "t.yaml"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    trait = load_trait(path)
    assert trait.questions == texts
    assert trait.instructions.positive == texts[1:]
    assert trait.name == texts[0]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda t: t.pop("scoring"), (50, 50)),
        (lambda t: t.update(scoring=None), (50, 50)),
        (lambda t: t.update(scoring={}), (50, 50)),
        (lambda t: t["scoring"].pop("coherence_threshold"), (50, 50)),
        (lambda t: t["scoring"].update(trait_threshold=0, coherence_threshold=100), (0, 100)),
        (lambda t: t["scoring"].update(judge="gpt-4o", trait_threshold="60"), (60, 50)),
        (lambda t: t.pop("description"), (50, 50)),
        (lambda t: t.update(description=None), (50, 50)),
        (lambda t: t.update(name="Über-höflich 日本"), (50, 50)),
    ],
)
def test_what_a_published_file_may_leave_out_or_add(tmp_path: Path, change: Any, kept: tuple[float, float]) -> None:
    record = copy.deepcopy(BASE)
    change(record)
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(record, allow_unicode=True, sort_keys=False), encoding="utf-8")
    scoring = load_trait(path).scoring
    assert (scoring.trait_threshold, scoring.coherence_threshold) == kept


def test_block_scalars_anchors_and_comments_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        "# by hand\nname: calm   # a word\ndescription: >-\n  Two\n  lines\ninstructions:\n  positive:\n    - |\n"
        "      Be calm: always.\n      Never shout.\n    - &a 'It''s fine'\n  negative: [\"Shout \\u00e9!\", *a]\n"
        'questions: ["Why?", "a: b", yes, 2024-01-01]\n',
        encoding="utf-8",
    )
    trait = load_trait(path)
    assert trait.description == "Two lines"
    assert trait.instructions.positive == ["Be calm: always.\nNever shout.\n", "It's fine"]
    assert trait.instructions.negative == ["Shout é!", "It's fine"]
    assert trait.questions == ["Why?", "a: b", "yes", "2024-01-01"]


BROKEN: dict[str, tuple[bytes, bytes, int, str]] = {
    "a tab": (b"  positive:", b"\tpositive:", 4, "not valid YAML"),
    "an open quote": (b'"Asks', b'"Asks" "', 2, "not valid YAML"),
    "a repeated section": (b"questions:", b"instructions: {}\nquestions:", 9, "'instructions' occurs twice"),
    "a repeated side": (b"  negative:", b"  positive: [x]\n  negative:", 7, "'positive' occurs twice"),
    "not UTF-8": (b"sky blue", b"sky bl\xfce", 11, "is not UTF-8"),
    "a control character": (b"sky blue", b"sky \x07blue", 11, "is not allowed"),
    "half a surrogate": (b"sky blue", rb"sky \ud83d", 11, "half of a surrogate pair"),
    "one text for a list": (b'\n    - "Be brief."', b' "Be brief."', 7, "it must be a list"),
    "an empty question": (b'"Why is the sky blue?"', b'" "', 11, "it is empty"),
    "a null question": (b'"Why is the sky blue?"', b"~", 11, "it must be text, not null"),
    "a nested list": (b'"Why is the sky blue?"', b"[a, b]", 11, "it must be text"),
    "an unquoted colon": (b'"Why is the sky blue?"', b"Why: is it?", 11, "it must be text, not a mapping"),
    "a threshold off the scale": (b"trait_threshold: 40", b"trait_threshold: -1", 14, "at least 0"),
    "a threshold that is none": (b"trait_threshold: 40", b"trait_threshold: .nan", 14, "finite"),
    "an empty name": (b"name: curious", b'name: ""', 1, "the name is empty"),
    "no questions": (b"questions:", b"question:", 1, "'questions' is missing"),
    "an unknown rule": (b"  trait_threshold: 40", b"  rule: complis", 14, "complies"),
    "phrases of an unknown side": (b"  trait_threshold: 40", b"  phrases: {positve: [x]}", 14, "positve"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_kind_of_broken_file_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    old, new, line, problem = BROKEN[name]
    content = TRAIT.encode()
    assert old in content
    path = tmp_path / "t.yaml"
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(StudyError) as caught:
        load_trait(path)
    assert problem in caught.value.problem
    assert caught.value.file == f"{path}:{line}"
    assert caught.value.remedy


def test_a_folder_is_checked_whole_and_everything_wrong_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resid(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["traits", *arguments])
        return int(stop.value.code or 0), *capsys.readouterr()

    inside = tmp_path / "more"
    inside.mkdir()
    for number in range(243):
        folder = tmp_path if number % 2 else inside
        (folder / f"{number:03}.yaml").write_text(TRAIT.replace("curious", f"trait {number}"), encoding="utf-8")
    code, out, _ = resid(str(tmp_path))
    assert code == 0
    assert "243 trait files are right" in out
    (tmp_path / "101.yaml").write_text(TRAIT.replace("  positive:", "\tpositive:"), encoding="utf-8")
    (inside / "100.YML").write_text(TRAIT.replace("questions:", "question:"), encoding="utf-8")
    (inside / "102.yaml").write_text(TRAIT.replace("Why is the sky blue?", "What is a black hole?"), encoding="utf-8")
    code, out, err = resid(str(tmp_path))
    assert code == 1
    assert "error: 2 of 244 trait files are wrong" in err
    assert f"WRONG: {tmp_path / '101.yaml'}:4" in out
    assert f"WRONG: {inside / '100.YML'}:1: questions" in out
    assert f"note: {inside / '102.yaml'}: 1 question(s) repeat another one" in out
    code, out, _ = resid(str(inside / "000.yaml"), "--quiet")
    assert (code, out) == (0, "1 trait files are right\n")
    assert "no such file or folder" in resid(str(tmp_path / "none"))[2]
    (tmp_path / "empty").mkdir()
    assert "holds no .yaml file" in resid(str(tmp_path / "empty"))[2]
