"""Prompt sets in the store: which rows they are, for readers who do not have the study."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from store_worker import D_MODEL, LAYERS, capture, expected, make_rows, new_store, request
from tiny_models import tiny_model, tiny_tokenizer

from jobs.cli import main
from store.activations import ActivationStore
from store.errors import DamageError, MismatchError, MissingDataError
from store.location import Location
from store.memberships import SCHEMA, Memberships, PromptRows
from store.sites import ALL_TOKENS

ROOT = Path(__file__).parent.parent
Record = dict[str, str | None]


def records(name: str, keys: Sequence[str], responses: str | None = None) -> list[Record]:
    return [
        {"prompt_set": name, "responses": responses, "prompt_id": f"of-{key}", "row_key": key, "text": f"text of {key}"}
        for key in keys
    ]


@pytest.fixture
def sets(tmp_path: Path) -> Memberships:
    return Memberships(Location.of(tmp_path / "model"))


# -- what is found -----------------------------------------------------------------------------------------------


def test_the_rows_of_a_set_come_in_the_order_of_its_prompts(sets: Memberships) -> None:
    sets.write("demo", "demo.yaml", [*records("bad", ["c", "a", "b"]), *records("good", ["e", "a"])])
    assert sets.studies() == ["demo"]
    assert sets.find(["bad"]) == PromptRows(("c", "a", "b"), "demo.yaml")
    assert sets.find(["good", "bad"]).keys == ("e", "a", "c", "b")
    assert sets.find(iter(["bad", "bad"])).keys == ("c", "a", "b")
    assert sets.find([]).keys == ()


def test_a_study_that_is_captured_again_replaces_what_its_sets_were(sets: Memberships) -> None:
    sets.write("demo", "old.yaml", records("bad", ["a", "b"]))
    sets.write("other", "other.yaml", records("good", ["c"]))
    sets.write("demo", "new.yaml", records("bad", ["b", "d"]))
    assert sets.find(["bad"]) == PromptRows(("b", "d"), "new.yaml")
    assert sets.find(["good"]) == PromptRows(("c",), "other.yaml")
    assert sets.study_files() == {"new.yaml", "other.yaml"}
    sets.forget("demo")
    assert sets.studies() == ["other"]
    with pytest.raises(MissingDataError, match="no captured study has a prompt set 'bad'"):
        sets.find(["bad"])


def test_rows_of_generated_responses_are_apart_from_those_of_prompts(sets: Memberships) -> None:
    plain, steered = (records("bad", keys, of) for keys, of in ((["p1", "p2"], "plain"), (["s1"], "steered")))
    sets.write("demo", None, [*records("bad", ["a"]), *plain, *steered, *records("good", ["g"], "plain")])
    assert sets.find(["bad"]) == PromptRows(("a",), None)
    assert sets.find(["bad"], responses="plain").keys == ("p1", "p2")
    assert sets.find(["bad", "good"], responses="plain").keys == ("p1", "p2", "g")
    for name, responses, says in (
        ("good", None, "prompt set 'good' has no rows without generated responses\n  remedy: choose responses= from "),
        ("good", "steered", "prompt set 'good' has no rows with responses of 'steered'"),
        ("bad", "plane", "remedy: choose responses= from 'plain', 'steered'"),
    ):
        with pytest.raises(MissingDataError, match=re.escape(says)):
            sets.find([name], responses=responses)


def test_responses_without_tokens_have_no_rows(sets: Memberships) -> None:
    sets.write("demo", None, [*records("bad", ["", "a", ""], "plain"), *records("good", [""], "plain")])
    assert sets.find(["bad"], responses="plain").keys == ("a",)
    with pytest.raises(MissingDataError, match="'good' has no rows with responses of 'plain'"):
        sets.find(["good"], responses="plain")


# -- several studies ---------------------------------------------------------------------------------------------


def test_studies_that_agree_on_a_set_need_not_be_named(sets: Memberships) -> None:
    sets.write("first", "first.yaml", records("bad", ["a", "b"]))
    sets.write("second", "second.yaml", records("bad", ["b", "a"]))
    assert sets.find(["bad"]) == PromptRows(("a", "b"), "first.yaml")
    assert sets.find(["bad"], study="second") == PromptRows(("b", "a"), "second.yaml")


def test_studies_that_disagree_on_a_set_have_to_be_named(sets: Memberships) -> None:
    sets.write("first", None, [*records("bad", ["a", "b"]), *records("good", ["g"])])
    sets.write("second", "second.yaml", records("bad", ["a", "c", "d"]))
    with pytest.raises(MismatchError) as caught:
        sets.find(["bad"])
    assert "prompt set 'bad' has 2 rows in study 'first' and others (3) in 'second'" in str(caught.value)
    assert "remedy: say which with study='first'" in str(caught.value)
    assert sets.find(["bad"], study="first").keys == ("a", "b")
    assert sets.find(["bad"], study="second").keys == ("a", "c", "d")
    assert sets.find(["good"]).keys == ("g",)
    with pytest.raises(MissingDataError, match="no captured study has a prompt set 'good'"):
        sets.find(["good"], study="second")


def test_an_unknown_name_is_answered_with_the_nearest_one(sets: Memberships) -> None:
    with pytest.raises(MissingDataError, match="none is known yet; run resid capture"):
        sets.find(["bad"])
    with pytest.raises(MissingDataError, match="no study 'demo' has captured this model\n  known: none"):
        sets.find(["bad"], study="demo")
    sets.write("demo", None, [*records("harmful@train", ["a"]), *records("harmless@train", ["b"])])
    with pytest.raises(MissingDataError, match=r"'harmfull@train'; did you mean 'harmful@train'\?\n  known: harmful@"):
        sets.find(["harmfull@train"])
    with pytest.raises(MissingDataError, match=r"no study 'dmo' .*; did you mean 'demo'\?"):
        sets.find(["harmful@train"], study="dmo")
    with pytest.raises(MissingDataError, match="study 'x' has captured nothing of this model"):
        sets.table("x")


def test_prompts_are_found_by_row_key_in_all_studies(sets: Memberships) -> None:
    sets.write("first", None, records("bad", ["a", "b"]))
    sets.write("second", None, [*records("good", ["c"]), *records("bad", ["d"])])
    every = {key: (f"of-{key}", f"text of {key}") for key in "abcd"}
    assert sets.prompts() == every
    # Used to happen: names from a generator were those of the first study only.
    for names in (["bad"], iter(["bad"]), (name for name in ["bad"])):
        assert sets.prompts(names) == {key: every[key] for key in "abd"}
    assert sets.prompts([]) == {}


def test_prompt_sets_are_kept_on_object_storage_as_on_disk(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    for place in (url, str(tmp_path)):
        sets = Memberships(Location.of(place) / "model")
        assert sets.studies() == []
        sets.write("demo", "demo.yaml", records("bad", ["a"]))
        sets.write("demo", "demo.yaml", records("bad", ["b"]))
        assert sets.find(["bad"]) == PromptRows(("b",), "demo.yaml")
    fsspec.filesystem("memory").rm(url, recursive=True)


# -- damage ------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_an_error_with_the_remedy(sets: Memberships) -> None:
    sets.write("demo", "demo.yaml", records("bad", ["a", "b"]))
    sets.write("other", None, records("good", ["c"]))
    path = sets.location.path / "demo.parquet"
    good = path.read_bytes()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt_set": ["bad"]}), sink)
    for data in (b"", b"PAR1", good[:-1], good[: len(good) // 2], b"\0" * len(good), sink.getvalue().to_pybytes()):
        path.write_bytes(data)
        with pytest.raises(DamageError) as caught:
            sets.find(["bad"])
        assert f"{path}: this file cannot be read" in str(caught.value)
        assert "remedy: remove it, then resid capture --study <study>, which writes it again" in str(caught.value)
        assert sets.find(["good"], study="other").keys == ("c",)
        assert sets.study_files() == set()
    sets.write("demo", "demo.yaml", records("bad", ["a", "b"]))
    assert path.read_bytes() == good


def test_a_flipped_bit_never_makes_other_rows_of_a_set(sets: Memberships) -> None:
    # Used to happen: a bit of Parquet's footer, which has no checksum, left out the last rows.
    rows = [
        *records("bad", [f"{i:064x}" for i in range(40)]),
        *records("good", [f"{i:064x}" for i in range(9)], "plain"),
    ]
    sets.write("demo", "demo.yaml", rows)
    path = sets.location.path / "demo.parquet"
    good = path.read_bytes()
    noticed = 0
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        try:
            table = sets.table("demo")
        except DamageError:
            noticed += 1
        else:
            assert table.to_pylist() == rows, f"byte {at} of {len(good)}"
            assert sets.find(["bad"]).study_file == "demo.yaml"
    assert noticed > len(good) / 2


def test_verify_finds_a_damaged_file_and_repair_forgets_it(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(3)
    capture(model, request(rows))
    model.memberships.write("demo", "demo.yaml", records("bad", [row.key for row in rows]))
    assert model.verify() == []
    path = model.memberships.location.path / "demo.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamageError, match="cannot be read"):
        ActivationStore.open(str(tmp_path)).select(prompts="bad")
    assert len(model.verify()) == 1
    assert len(model.verify(repair=True)) == 1
    assert model.verify() == []
    assert ActivationStore.open(str(tmp_path)).select().shape == (3, LAYERS, D_MODEL)


def test_a_set_names_rows_and_commits_say_what_is_there_of_them(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(4)
    model.memberships.write("demo", "demo.yaml", records("bad", [row.key for row in rows]))
    store = ActivationStore.open(str(tmp_path))
    capture(model, request(rows[:3]))
    with pytest.raises(MissingDataError, match=r"1 of 4 rows .*\n  remedy: resid capture --study demo.yaml"):
        store.select(prompts="bad")
    capture(model, request(rows))
    selection = store.select(prompts="bad", layer=2)
    np.testing.assert_array_equal(selection, expected(rows, "resid_post", [2], "prompt_end", "float32")[:, 0])
    assert SCHEMA.names == ["prompt_set", "responses", "prompt_id", "row_key", "text"]


# -- as `resid capture` writes them ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def study(folder: Path, model: Path, name: str = "demo", **changes: Any) -> Path:
    content: dict[str, Any] = {
        "name": name,
        "model": {"source": str(model), "dtype": "float32"},
        "prompts": {
            "bad": {
                "path": str(ROOT / "prompts/harmful.jsonl"), "limit": 9,
                "split": {"seed": 0, "parts": {"train": 5, "test": 4}},
            },
            "good": {"path": str(ROOT / "prompts/harmless.jsonl"), "limit": 6},
        },
        "capture": [
            {"prompts": ["bad", "good"], "positions": [ALL_TOKENS]},
            {"prompts": ["good"], "layers": [1], "components": ["attn_out"], "dtype": "bfloat16"},
        ],
        "compression": "zstd",
        "store": str(folder / "store"),
        "results": str(folder / "results"),
        "ray": {"address": "off"},
        **changes,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def resid(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_a_captured_study_is_found_by_its_prompt_sets(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study(tmp_path, tiny_folder)
    assert resid("capture", "--study", file) == 0, capsys.readouterr().err
    store = ActivationStore.open(str(tmp_path / "store"))
    (model,) = store.models()
    assert {generation.plan.compression for generation in model.generations()} == {"zstd"}
    assert model.memberships.study_files() == {str(file)}

    tokens = store.select(model=tiny_folder.name, prompts="bad", position=ALL_TOKENS, layer=2)
    assert len(tokens.row_keys) == 9
    assert len(tokens) == len(tokens.token_rows) > 9 * 5
    assert np.isfinite(tokens.to_numpy()).all()
    # Its parts are the same rows, in prompt order; and the end of the prompt is the last of a row's tokens.
    parts = [store.select(prompts=f"bad@{part}", layer=2) for part in ("train", "test")]
    assert {key for part in parts for key in part.row_keys} == set(tokens.row_keys)
    assert [len(part) for part in parts] == [5, 4]
    assert tokens.offsets is not None
    ends = dict(zip(tokens.row_keys, tokens.to_numpy()[tokens.offsets[1:] - 1], strict=True))
    for part in parts:
        np.testing.assert_array_equal(part, [ends[key] for key in part.row_keys])
    both = store.select(prompts=["bad@test", "good"], layer=[0, 2])
    assert both.shape == (10, 2, 48)
    attention = store.select(prompts="good", site="attn_out.1")
    assert attention.stored_dtype.name == "bfloat16"

    with pytest.raises(MissingDataError) as caught:
        store.select(prompts="bad@train", site="mlp_out", layer=1)
    assert (
        f"remedy: resid capture --study {file} (its `capture` has to ask for "
        "components: [mlp_out], positions: [prompt_end], layers: [1])"
    ) in str(caught.value)

    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert resid("capture", "--study", file) == 0
    assert "capture: 0 rows done" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before
    assert resid("verify", "--study", file) == 0


def test_what_the_remedy_asks_for_is_what_was_missing(tmp_path: Path, tiny_folder: Path) -> None:
    """The message names the study's own words: put there, the next capture makes the selection possible."""
    file = study(tmp_path, tiny_folder, capture=[{"prompts": ["good"], "layers": [0]}])
    assert resid("capture", "--study", file) == 0
    store = ActivationStore.open(str(tmp_path / "store"))
    wanted: dict[str, Any] = {"prompts": "good", "site": "mlp_out", "layer": [1, 2], "position": "token:-1"}
    with pytest.raises(MissingDataError) as caught:
        store.select(**wanted)
    asks = re.search(r"resid capture --study (\S+) \(its `capture` has to ask for (.*)\)", str(caught.value))
    assert asks is not None
    entry = yaml.safe_load("{" + asks[2] + "}")
    assert Path(asks[1]) == file
    study(tmp_path, tiny_folder, capture=[{"prompts": ["good"], "layers": [0]}, {"prompts": ["good"], **entry}])
    assert resid("capture", "--study", asks[1]) == 0
    assert store.select(**wanted).shape == (6, 2, 48)


def test_two_studies_share_the_rows_of_a_store(tmp_path: Path, tiny_folder: Path) -> None:
    first = study(tmp_path, tiny_folder, "first", capture=[{"prompts": ["bad", "good"]}])
    assert resid("capture", "--study", first) == 0
    prompts = {"bad": {"path": str(ROOT / "prompts/harmful.jsonl"), "limit": 3}}
    second = study(tmp_path, tiny_folder, "second", capture=[{"prompts": ["bad"]}], prompts=prompts)
    assert resid("capture", "--study", second) == 0
    store = ActivationStore.open(str(tmp_path / "store"))
    (model,) = store.models()
    assert len(model.generations()) == 1, "the second study's rows were there"
    with pytest.raises(MismatchError, match="'bad' has 9 rows in study 'first' and others"):
        store.select(prompts="bad")
    assert len(store.select(prompts="bad", study="first")) == 9
    few = store.select(prompts="bad", study="second")
    assert set(few.row_keys) < set(store.select(prompts="bad", study="first").row_keys)
    assert len(few) == 3
    assert len(store.select(prompts="good")) == 6
