"""Prompt sets: what files give, what they refuse, and how sets are chosen and split."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from store.errors import StudyError
from store.leaks import _refuse_parts
from store.prompt_files import read_records
from store.prompts import Message, Prompt, PromptSet, load_prompt_set, load_prompt_sets, split_prompt_set
from store.study import PromptSource, Split, Study

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, unique=True
)


def load(path: Path, **source: Any) -> PromptSet:
    return load_prompt_set("s", PromptSource.model_validate({"path": str(path), **source}))


def texts(prompts: PromptSet) -> list[str]:
    return [prompt.text for prompt in prompts.prompts]


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def whole(items: list[str]) -> PromptSet:
    return PromptSet("s", tuple(Prompt.of(text) for text in items))


# -- files ----------------------------------------------------------------------------------------------------------

RECORDS = [{"prompt": "one, two", "flag": 1}, {"prompt": 'say "hi"\nplease', "flag": 2}]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "CSV"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"key=value.{ending}"
    if ending == "json":
        path.write_text(json.dumps(RECORDS))
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif ending.lower() in ("csv", "tsv"):
        separator = "," if ending.lower() == "csv" else "\t"
        # With the byte order mark that spreadsheets write.
        text = f'\ufeffprompt{separator}flag\n"one, two"{separator}1\n\n"say ""hi""\nplease"{separator}2\n'
        path.write_text(text, encoding="utf-8")
    else:
        lines(path, RECORDS)
    assert texts(load(path)) == ["one, two", 'say "hi"\nplease']
    assert set(read_records(path)[0][1]) == {"prompt", "flag"}
    assert texts(load(path, where={"flag": 2})) == ['say "hi"\nplease']


def test_folders_named_key_value_add_no_columns_to_parquet(tmp_path: Path) -> None:
    (tmp_path / "split=x").mkdir()
    path = tmp_path / "split=x" / "p.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path)
    assert "split" not in read_records(path)[0][1]


def test_line_separators_inside_json_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n\n{"prompt": "d"}', encoding="utf-8")
    assert texts(load(path)) == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "place", "problem"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', ":3", "not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', ":2", "not a JSON object"),
        ("p.json", '[{"prompt": "a"},\n{"prompt" "b"}]', ":2", "not valid JSON"),
        ("p.json", '{"prompt": "a"}', "", "not a list of objects"),
        ("p.csv", "prompt,flag\na,1\nb, and c,2\n", ":3", "3 cells under 2 columns"),
        ("p.csv", 'prompt,flag\n"a\nb",1\nc\n', ":4", "1 cells under 2 columns"),
        ("p.csv", "prompt,prompt\na,b\n", ":1", "two columns are named 'prompt'"),
        ("p.csv", 'prompt,flag\n"a"b,1\n', ":2", "not valid CSV"),
        ("p.csv", 'prompt,flag\na,1\n"b,2\n', ":3", "not valid CSV"),
        ("p.parquet", "no parquet", "", "cannot be read"),
        ("p.txt", "a", "", "unknown file ending '.txt'"),
        ("p.jsonl", '{"prompt": ""}\n', ":1", "the prompt is empty"),
        ("p.jsonl", '{"prompt": "  "}\n', ":1", "the prompt is empty"),
        ("p.jsonl", '{"prompt": 3}\n', ":1", "the prompt is not text but 3"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', ":1", "half of a surrogate pair"),
    ],
)
def test_a_broken_file_or_row_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, place: str, problem: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load(path)
    assert caught.value.file == f"{path}{place}"
    assert problem in caught.value.problem
    assert caught.value.remedy


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(StudyError, match="not UTF-8"):
        load(tmp_path / "p.jsonl")


# -- columns --------------------------------------------------------------------------------------------------------


def test_a_missing_column_names_the_study_key_and_the_nearest_column(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", [{"prompt": "a", "Topic": "x"}])
    study = tmp_path / "study.yaml"
    study.write_text("prompts:\n  s:\n    path: p.jsonl\n    columns:\n      prompt: promt\n")
    with pytest.raises(StudyError) as caught:
        load_prompt_set("s", PromptSource(path=str(path), columns={"prompt": "promt"}), study)  # type: ignore[arg-type]
    assert caught.value.file == f"{study}:5"
    assert caught.value.key == "prompts.s.columns.prompt"
    assert caught.value.problem == f"there is no column 'promt' in {path}:1"
    assert caught.value.remedy == "did you mean 'prompt'? columns: prompt, Topic"


def test_tags_may_be_absent_from_a_row_but_not_from_all(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "topic": "x"}])
    prompts = load(path, columns={"prompt": "prompt", "tags": ["topic"]}).prompts
    assert [dict(prompt.tags) for prompt in prompts] == [{}, {"topic": "x"}]
    with pytest.raises(StudyError, match="there is no column 'subject'"):
        load(path, columns={"prompt": "prompt", "tags": ["subject"]})


def test_system_and_given_response_are_part_of_the_prompt(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", [{"p": "a", "s": "be kind", "r": "yes"}, {"p": "a", "s": None, "r": "no"}])
    first, second = load(path, columns={"prompt": "p", "system": "s", "response": "r"}).prompts
    assert first.messages == (Message("system", "be kind"), Message("user", "a"))
    assert (first.response, second.response, second.messages) == ("yes", "no", (Message("user", "a"),))
    assert first.id != second.id
    with pytest.raises(StudyError, match="the response is empty"):
        load(lines(path, [{"p": "a", "r": ""}]), columns={"prompt": "p", "response": "r"})


def test_messages_end_with_the_users_turn_or_a_given_response(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}
    path = lines(tmp_path / "p.jsonl", [{"m": [user]}, {"m": json.dumps([user, assistant])}])
    first, second = load(path, columns={"messages": "m"}).prompts
    assert first.messages == second.messages
    assert (first.response, second.response) == (None, "yes")
    assert first.conversation == second.conversation == first.id != second.id


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "a prompt ends with a turn"),
        ("[", "bad row"),
        ("{}", "messages are a list such as"),
        ([{"role": "user"}], "a message has role and content, not role"),
        ([{"role": "human", "content": "a"}], "unknown role 'human'"),
        ([{"role": "user", "content": 3}], "a message's content is text, not int"),
        ([{"role": "system", "content": "a"}], "the prompt is empty"),
    ],
)
def test_broken_messages_are_refused(tmp_path: Path, messages: Any, problem: str) -> None:
    path = lines(tmp_path / "p.jsonl", [{"m": messages}])
    with pytest.raises(StudyError) as caught:
        load(path, columns={"messages": "m"})
    assert caught.value.file == f"{path}:1"
    assert problem in caught.value.problem


# -- where, limit, duplicates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1, ["one", "one point zero"]),
        (1.0, ["one", "one point zero"]),
        ("1", ["one"]),
        (True, ["true"]),
        (False, []),
        (None, ["nothing"]),
        ("x", ["x"]),
    ],
)
def test_where_reads_the_text_of_csv_as_the_value_that_it_asks_for(tmp_path: Path, value: Any, kept: list[str]) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,flag\none,1\none point zero,1.0\ntrue,TRUE\nnothing,\nx,x\n")
    if kept:
        assert texts(load(path, where={"flag": value})) == kept
    else:
        with pytest.raises(StudyError, match="the prompt set is empty"):
            load(path, where={"flag": value})


def test_where_tells_kinds_apart_in_json(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl", [{"prompt": str(f), "flag": f} for f in (1, True, "1", None)] + [{"prompt": "-"}]
    )
    for value, kept in ((1, ["1"]), (True, ["True"]), (None, ["None", "-"])):
        assert texts(load(path, where={"flag": value})) == kept


def test_where_on_an_unknown_column_and_a_set_left_empty_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", [{"prompt": "a", "flag": 1}])
    with pytest.raises(StudyError, match=r"prompts\.s\.where\.flg: there is no column 'flg'") as caught:
        load(path, where={"flg": 1})
    assert caught.value.remedy == "did you mean 'flag'? columns: prompt, flag"
    with pytest.raises(StudyError, match=r"the prompt set is empty: no row of .* has \{flag: 2\}"):
        load(path, where={"flag": 2})
    path.write_text("")
    with pytest.raises(StudyError, match=r"the prompt set is empty: .*p\.jsonl has no rows"):
        load(path, where={"flag": 2})


def test_repeated_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    prompts = load(lines(tmp_path / "p.jsonl", [{"prompt": text} for text in "abacab"]))
    assert texts(prompts) == ["a", "b", "c"]
    assert prompts.duplicates == 3


def test_limit_takes_the_first_or_with_a_seed_the_same_few_in_any_file_order(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}"} for i in range(40)]
    path = lines(tmp_path / "p.jsonl", records)
    assert texts(load(path, limit=3)) == ["p0", "p1", "p2"]
    chosen = texts(load(path, limit=10, shuffle_seed=1))
    assert chosen != texts(load(path, limit=10, shuffle_seed=2))
    lines(path, records[::-1])
    assert texts(load(path, limit=10, shuffle_seed=1)) == chosen


def test_a_hub_data_set_is_read_like_a_file_and_its_faults_name_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PromptSource(dataset="org/data", dataset_split="test", dataset_revision="main")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StudyError, match=r"prompts\.s\.dataset: the hub data set 'org/data' needs the package"):
        load_prompt_set("s", source)

    def fake(name: str, config: str | None, *, split: str, revision: str) -> list[dict[str, str]]:
        if (name, config, split, revision) != ("org/data", None, "test", "main"):
            raise FileNotFoundError("not on the hub")
        return [{"prompt": "a"}, {"prompt": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fake))
    assert texts(load_prompt_set("s", source)) == ["a", "b"]
    with pytest.raises(StudyError, match=r"cannot load 'org/other': not on the hub"):
        load_prompt_set("s", source.model_copy(update={"dataset": "org/other"}))


# -- splits ---------------------------------------------------------------------------------------------------------


SIZES = st.dictionaries(
    st.sampled_from(["train", "val", "test", "other"]), st.integers(1, 6) | st.sampled_from([0.1, 0.2]), min_size=1
)


def parts_of(items: list[str], split: Split) -> dict[str, set[str]]:
    """Return the texts of each part; parts are empty where splitting is refused."""
    try:
        return {
            name.partition("@")[2]: set(texts(part)) for name, part in split_prompt_set(whole(items), split).items()
        }
    except StudyError:
        return {name: set() for name in split.parts}


@given(st.sets(st.integers(0, 200), min_size=30, max_size=80), st.integers(0, 5), st.randoms(), SIZES)
def test_parts_are_disjoint_not_larger_than_asked_and_independent_of_file_order(
    numbers: set[int], seed: int, shuffler: random.Random, sizes: dict[str, int | float]
) -> None:
    items = [f"prompt {number}" for number in numbers]
    split = Split(seed=seed, parts=sizes)
    one = parts_of(items, split)
    shuffled = items.copy()
    shuffler.shuffle(shuffled)
    assert parts_of(shuffled, split) == one
    assert sum(map(len, one.values())) == len(set().union(*one.values()))
    for name, size in sizes.items():
        assert not isinstance(size, int) or len(one[name]) <= size


@given(
    st.sets(st.integers(0, 300), min_size=30, max_size=90),
    st.sets(st.integers(0, 300), max_size=90),
    st.sets(st.integers(0, 300), max_size=60),
    st.integers(0, 5),
    SIZES,
)
def test_no_prompt_goes_from_one_part_to_another_when_prompts_are_added_or_removed(
    before: set[int], added: set[int], removed: set[int], seed: int, sizes: dict[str, int | float]
) -> None:
    split = Split(seed=seed, parts=sizes)
    old = parts_of([f"prompt {n}" for n in sorted(before)], split)
    new = parts_of([f"prompt {n}" for n in sorted((before | added) - removed)], split)
    for one in sizes:
        for other in sizes:
            assert one == other or not old[one] & new[other]


def test_a_part_by_count_changes_by_as_many_prompts_as_were_added_or_removed_at_most() -> None:
    """20 prompts more used to replace all 8 test prompts, 4 of them by former train prompts."""
    items = [f"prompt {number}" for number in range(220)]
    split = Split(parts={"train": 64, "test": 8})
    old, new = parts_of(items[:200], split), parts_of(items, split)
    assert [len(old["train"]), len(old["test"])] == [len(new["train"]), len(new["test"])] == [64, 8]
    added = set(items[200:])
    for part in ("train", "test"):
        assert new[part] - old[part] <= added
        assert len(old[part] - new[part]) == len(new[part] & added)


def test_fractions_take_about_their_share_and_all_prompts_where_they_add_up_to_one() -> None:
    items = [f"prompt {number}" for number in range(2000)]
    parts = parts_of(items, Split(parts={"train": 0.7, "val": 0.1, "test": 0.2}))
    assert sum(map(len, parts.values())) == 2000
    for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert abs(len(parts[name]) - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    mixed = parts_of(items, Split(parts={"train": 0.5, "test": 100}))
    assert abs(len(mixed["train"]) - 1000) < 4 * 500**0.5
    assert len(mixed["test"]) == 100


def test_counts_are_reached_where_the_set_has_a_quarter_more_and_said_where_not() -> None:
    split = Split(parts={"train": 64, "val": 24, "test": 64})
    for seed in range(20):
        parts = split_prompt_set(whole([f"{seed} {n}" for n in range(208)]), split.model_copy(update={"seed": seed}))
        assert [len(part.prompts) for part in parts.values()] == [64, 24, 64]
    parts = split_prompt_set(whole([str(n) for n in range(152)]), split)
    assert [part.asked for part in parts.values()] == [64, 24, 64]
    assert sum(len(part.prompts) for part in parts.values()) < 152


def test_prompts_that_differ_only_in_space_or_response_belong_to_one_part() -> None:
    pairs = [Prompt.of(f"{space}{n}{space}") for n in range(100) for space in ("", " ")]
    pairs += [Prompt.of(str(n), response="yes") for n in range(100)]
    parts = split_prompt_set(PromptSet("s", tuple(pairs)), Split(parts={"train": 0.5, "test": 0.5}))
    one, other = ({text.strip() for text in texts(part)} for part in parts.values())
    assert not one & other
    assert len(one | other) == 100


def test_parts_that_would_overlap_or_be_empty_are_refused(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("prompts:\n  s:\n    split:\n      parts:\n        a: 2\n        b: 0.1\n")
    with pytest.raises(StudyError) as caught:
        split_prompt_set(whole(["x", "y"]), Split(parts={"a": 2, "b": 1}), study)
    assert caught.value.file == f"{study}:4"
    assert caught.value.key == "prompts.s.split.parts"
    assert caught.value.problem == "the parts need 3 prompts and the set has 2: they would overlap"
    with pytest.raises(StudyError) as caught:
        split_prompt_set(whole(["x", "y"]), Split(parts={"a": 1, "b": 0.001}), study)
    assert (caught.value.file, caught.value.key) == (f"{study}:6", "prompts.s.split.parts.b")
    assert caught.value.problem == "the part 'b' is empty: none of the 2 prompts falls to it"
    with pytest.raises(ValidationError, match="leave nothing for the counts"):
        Split(parts={"a": 1, "b": 1.0})


def test_parts_of_different_name_share_no_prompt_across_sets_or_responses() -> None:
    def part(name: str, text: str, response: str | None = None) -> dict[str, PromptSet]:
        return {name: PromptSet(name, (Prompt.of(text, response=response),))}

    study = Study.model_validate({"name": "s", "model": {"source": "org/name"}})
    _refuse_parts(study, {**part("x@train", "a"), **part("y@train", "a"), **part("y@test", "b"), **part("z", "b")})
    for text, other in (("a", None), ("a", "yes"), (" a ", None)):
        with pytest.raises(StudyError, match=r"prompts\.y\.split: 'y@test' and 'x@train' share a prompt \(' ?a ?'\)"):
            _refuse_parts(study, {**part("x@train", "a"), **part("y@test", text, other)})


def test_excluded_prompts_are_gone_before_limit_and_split_and_are_counted(tmp_path: Path) -> None:
    first = lines(tmp_path / "first.jsonl", [{"prompt": f"p{n}"} for n in range(40)])
    second = lines(tmp_path / "second.jsonl", [{"prompt": f"p{n} "} for n in range(15, 60)])
    sources = {
        "second": PromptSource(path=str(second), exclude=["first"], split=Split(parts={"train": 0.5, "test": 0.5})),
        "first": PromptSource(path=str(first)),
    }
    sets = load_prompt_sets(sources)
    assert list(sets) == ["second", "second@train", "second@test", "first"]
    assert (sets["second"].excluded, len(sets["second"].prompts)) == (25, 20)
    assert sum(len(sets[f"second@{part}"].prompts) for part in ("train", "test")) == 20
    limited = load_prompt_sets({**sources, "second": PromptSource(path=str(second), exclude=["first"], limit=5)})
    assert texts(limited["second"]) == [f"p{n} " for n in range(40, 45)]
    loop = {**sources, "first": PromptSource(path=str(first), exclude=["second@test"])}
    with pytest.raises(StudyError, match="prompt sets exclude each other: second -> first -> second"):
        load_prompt_sets(loop)
    with pytest.raises(StudyError, match="the prompt set is empty: first hold all 40 prompts"):
        load_prompt_sets({"first": sources["first"], "s": PromptSource(path=str(first), exclude=["first"])})


@given(TEXTS)
def test_an_id_depends_on_messages_and_response_only(items: list[str]) -> None:
    prompts = [Prompt.of(text, tags={"n": str(i)}) for i, text in enumerate(items)]
    assert len({prompt.id for prompt in prompts}) == len(items)
    assert [prompt.id for prompt in prompts] == [Prompt.of(text).id for text in items]
    assert all(prompt.id == prompt.conversation for prompt in prompts)
