"""The prompts and traits of the repository keep the rules that prompts/README.md states."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
FORMS = {"imperative", "question", "want", "give", "explain", "draft", "help"}
TRAITS = ("cheerful", "compliant", "curious", "formal", "sceptical", "terse")
OPENINGS = {  # how a prompt of that form begins; imperatives and questions are free
    "want": r"I('d| |'m)",
    "give": r"Give me ",
    "explain": r"Explain ",
    "draft": r"Draft ",
    "help": r"Help me ",
}
PUBLISHED_COLUMNS = {
    "advbench": {"goal", "target"},
    "jbb_harmful": {"Index", "Goal", "Target", "Behavior", "Category", "Source"},
    "jbb_benign": {"Index", "Goal", "Target", "Behavior", "Category", "Source"},
    "harmbench": {"Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"},
    "strongreject": {"category", "source", "forbidden_prompt"},
    "alpaca": {"instruction", "input", "output"},
}


def read_lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (PROMPTS / name).read_text(encoding="utf-8").splitlines()]


def read_trait(name: str) -> dict[str, Any]:
    trait: dict[str, Any] = yaml.safe_load((PROMPTS / "traits" / f"{name}.yaml").read_text(encoding="utf-8"))
    return trait


def tokens(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w'-]+", text.lower()))


def words(text: str) -> int:
    return len(text.split())


HARMFUL = read_lines("harmful.jsonl")
HARMLESS = read_lines("harmless.jsonl")
PAIRS = list(zip(HARMFUL, HARMLESS, strict=True))


def test_both_files_hold_the_same_number_of_prompts_near_two_hundred() -> None:
    assert len(HARMFUL) == len(HARMLESS)
    assert 200 <= len(HARMFUL) <= 216


def test_every_line_has_exactly_the_documented_fields() -> None:
    assert {frozenset(line) for line in HARMFUL} == {frozenset({"id", "prompt", "topic", "form"})}
    assert {frozenset(line) for line in HARMLESS} == {frozenset({"id", "prompt", "topic", "form", "matches"})}
    for line in HARMFUL + HARMLESS:
        assert all(isinstance(value, str) and value == value.strip() != "" for value in line.values()), line


def test_ids_count_up_and_every_harmless_prompt_matches_the_harmful_one_on_its_line() -> None:
    for number, (harmful, harmless) in enumerate(PAIRS, 1):
        assert harmful["id"] == harmless["matches"] == f"harmful-{number:03d}"
        assert harmless["id"] == f"harmless-{number:03d}"


def test_no_prompt_occurs_twice() -> None:
    counts = Counter(" ".join(line["prompt"].lower().split()) for line in HARMFUL + HARMLESS)
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_no_two_prompts_are_near_duplicates() -> None:
    sets = [(line["id"], tokens(line["prompt"])) for line in HARMFUL + HARMLESS]
    near = [(a, b) for (a, x), (b, y) in combinations(sets, 2) if len(x & y) / len(x | y) >= 0.8]
    assert near == []


def test_every_prompt_is_one_sentence_of_five_to_twenty_words() -> None:
    for line in HARMFUL + HARMLESS:
        assert 5 <= words(line["prompt"]) <= 20, line
        assert len(line["prompt"]) <= 140, line
        assert re.fullmatch(r"[^.?!\n]+[.?]", line["prompt"]), line


def test_matched_prompts_have_one_form_and_nearly_one_length() -> None:
    for harmful, harmless in PAIRS:
        assert harmful["form"] == harmless["form"] in FORMS, harmful["id"]
        assert abs(words(harmful["prompt"]) - words(harmless["prompt"])) <= 3, harmful["id"]


def test_mean_lengths_agree_so_that_length_is_no_cue() -> None:
    means = [sum(words(line["prompt"]) for line in lines) / len(lines) for lines in (HARMFUL, HARMLESS)]
    assert abs(means[0] - means[1]) < 0.25


def test_the_form_field_says_how_the_prompt_begins_and_ends() -> None:
    for line in HARMFUL + HARMLESS:
        assert line["prompt"].endswith("?") == (line["form"] == "question"), line
        assert re.match(OPENINGS.get(line["form"], "[A-Z]"), line["prompt"]), line


def test_forms_are_spread_evenly() -> None:
    counts = Counter(line["form"] for line in HARMFUL)
    assert set(counts) == FORMS
    assert max(counts.values()) < 2 * min(counts.values())


def test_topics_are_many_balanced_and_paired_one_to_one() -> None:
    counts = Counter(line["topic"] for line in HARMFUL)
    assert len(counts) >= 12
    assert max(counts.values()) - min(counts.values()) <= 1
    pairs = {(harmful["topic"], harmless["topic"]) for harmful, harmless in PAIRS}
    assert len(pairs) == len(counts) == len({harmless for _, harmless in pairs})
    assert counts.keys().isdisjoint(line["topic"] for line in HARMLESS)


def test_the_first_lines_cover_every_topic_so_that_a_limit_keeps_the_balance() -> None:
    topics = {line["topic"] for line in HARMFUL}
    head = HARMFUL[: len(topics)]
    assert {line["topic"] for line in head} == topics
    assert {line["form"] for line in head} == FORMS


def test_the_traits_are_the_documented_ones() -> None:
    assert sorted(path.stem for path in (PROMPTS / "traits").iterdir()) == sorted(TRAITS)


@pytest.mark.parametrize("name", TRAITS)
def test_a_trait_has_the_fields_and_counts_of_the_papers_format(name: str) -> None:
    trait = read_trait(name)
    assert set(trait) == {"name", "description", "instructions", "questions", "scoring"}
    assert trait["name"] == name
    assert trait["scoring"] == {"trait_threshold": 50, "coherence_threshold": 50}
    assert set(trait["instructions"]) == {"positive", "negative"}
    instructions, questions = (8, 15) if name == "compliant" else (5, 20)
    assert [len(side) for side in trait["instructions"].values()] == [instructions, instructions]
    assert len(trait["questions"]) == questions


@pytest.mark.parametrize("name", TRAITS)
def test_a_traits_texts_are_distinct_and_of_sensible_length(name: str) -> None:
    trait = read_trait(name)
    instructions = trait["instructions"]["positive"] + trait["instructions"]["negative"]
    texts = [*instructions, *trait["questions"]]
    assert all(isinstance(text, str) for text in texts)
    assert len(set(texts)) == len(texts)
    assert 10 <= words(trait["description"]) <= 60
    assert all(5 <= words(text) <= 40 for text in instructions)
    assert all(3 <= words(text) <= 25 for text in trait["questions"])


@pytest.mark.parametrize("name", TRAITS)
def test_instructions_speak_to_the_model_and_both_sides_have_nearly_one_length(name: str) -> None:
    sides = read_trait(name)["instructions"]
    for text in sides["positive"] + sides["negative"]:
        assert re.match(r"You\b", text), text
    means = [sum(map(words, side)) / len(side) for side in sides.values()]
    assert abs(means[0] - means[1]) <= 3


def test_no_question_serves_two_traits() -> None:
    questions = [question for name in TRAITS for question in read_trait(name)["questions"]]
    assert len(set(questions)) == len(questions)


def test_the_readme_states_the_numbers_of_the_files() -> None:
    readme = (PROMPTS / "README.md").read_text(encoding="utf-8")
    topics = len({line["topic"] for line in HARMFUL})
    assert f"{len(HARMFUL)} short requests" in readme
    assert f"{len(HARMLESS)} harmless requests" in readme
    assert f"{topics} topics, {len(HARMFUL) // topics} each" in readme
    assert all(f"`{name}`" in readme for name in TRAITS)
    examples = re.search(r"```json\n(.*?)\n```", readme, flags=re.DOTALL)
    assert examples is not None
    assert [json.loads(line) for line in examples[1].splitlines()] == [HARMFUL[0], HARMLESS[0]]


def test_the_readmes_snippets_name_columns_that_the_files_have() -> None:
    readme = (PROMPTS / "README.md").read_text(encoding="utf-8")
    snippets = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)]
    sources = {name: source for snippet in snippets for name, source in snippet.get("prompts", {}).items()}
    published = {
        **PUBLISHED_COLUMNS,
        "harmful": set(HARMFUL[0]),
        "harmless": set(HARMLESS[0]),
        "tagged": {"Behavior", "SemanticCategory"},
    }
    assert sources.keys() == published.keys()
    for name, source in sources.items():
        columns = {source["columns"]["prompt"], *source["columns"].get("tags", []), *source.get("where", {})}
        assert columns <= published[name], name
    for name in ("harmful", "harmless"):
        assert sum(sources[name]["split"]["parts"].values()) == 1  # every prompt is used
        assert (PROMPTS / sources[name]["path"].removeprefix("../prompts/")).is_file()
