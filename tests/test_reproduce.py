"""The paper's study from nothing to its document, on a random model: every stage, choice, comparison and claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tiny_models import COMMON, tiny_tokenizer

from jobs.cli import main
from jobs.reproduce import renewed
from store.errors import StudyError
from store.location import Location
from store.sql import connect, query

STUDY = Path(__file__).parent.parent / "studies/persona_gates_refusal.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole study ran on few prompts, with a random Llama of 30 blocks."""
    folder = tmp_path_factory.mktemp("paper")
    config = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 30, "max_position_embeddings": 1024})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    trait = {"instructions": 1, "questions": 2}
    capture = yaml.safe_load(STUDY.read_text())["capture"]
    for entry in capture:
        entry.pop("keep", None)  # what a random model says is no answer
    kept = {name: {"keep": None} for name in ("persona", "persona_prompt_end", "persona_response_start")}
    study: dict[str, Any] = {
        "base": str(STUDY),
        "model": {"source": str(folder / "model"), "adapter": None},
        "prompts": {
            # Ten components of the contrast need more than ten prompts a side.
            "harmful": {"split": {"parts": {"train": 12, "val": 2, "test": 3}}},
            "harmless": {"split": {"parts": {"train": 12, "val": 2, "test": 2}}},
        },
        "traits": {
            "compliant": {**trait, "keep": "all"},
            **{name: {"questions": 1} for name in ("cheerful", "curious", "formal", "sceptical", "terse")},
        },
        "capture": capture,
        "directions": kept,
        "geometry": {"separability": {"compliant_answers": {"keep": None}}},
        "replay": {"decoding": {"max_new_tokens": 3}, "block_rows": 1000, "batch_rows": 512},
        "judges": {"trait": None, "coherence": None},
        "store": str(folder / "store"),
        "results": str(folder / "results"),
        "ray": {"address": "off"},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(SystemExit) as ended:
        main(["run", "--study", str(folder / "study.yaml"), "--quiet"])
    assert ended.value.code == 0
    return folder


def reproduce(folder: Path) -> str:
    file = folder / "document.md"
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "--study", str(folder / "study.yaml"), "--output", str(file)])
    assert ended.value.code == 0
    return file.read_text()


def ask(folder: Path, sql: str) -> list[dict[str, Any]]:
    connection = connect(Location.of(folder / "results"))
    try:
        return query(connection, sql).to_pylist()
    finally:
        connection.close()


def test_the_study_runs_from_nothing_to_its_comparisons(done: Path) -> None:
    choices = ask(done, "SELECT choice, status, chosen FROM choices ORDER BY choice")
    # A random model refuses nothing: no candidate takes 30 points off.
    assert [(choice["choice"], choice["status"]) for choice in choices] == [
        ("persona", "otherwise"),
        ("refusal", "otherwise"),
    ]
    assert json.loads(choices[0]["chosen"]) == {"layer": 19, "coefficient": 3}
    planned = yaml.safe_load(STUDY.read_text())["comparisons"]
    rows = ask(done, "SELECT DISTINCT comparison FROM comparisons")
    assert {row["comparison"] for row in rows} == set(planned)
    [random] = ask(done, "SELECT * FROM comparisons WHERE comparison = 'random_projection'")
    assert (random["first_repeats"], random["second_repeats"], random["n_pairs"]) == (4, 1, 3)
    missing = ask(done, "SELECT count(*) AS n FROM comparisons WHERE n_left_out > 0 OR p_holm IS NULL")
    assert missing == [{"n": 0}]


def test_the_document_says_claim_by_claim_what_is_shown(done: Path) -> None:
    text = reproduce(done)
    claims = yaml.safe_load(STUDY.read_text())["claims"]
    for name in claims:
        assert f"<!-- resid: {name} -->" in text
    assert text.count("**Verdict: ") == len(claims)
    assert "not decided" not in text
    assert "| persona_suppresses_refusal | not shown |" in text
    assert "| mp_only | baseline | harmful@test | refusal | 3 |" in text
    assert str(done) not in text.replace(f"--study {done}", "").replace(f"--output {done}", "").replace(
        f"{done}/model", ""
    )


def test_its_report_keeps_the_sweeps_of_different_directions_apart(done: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "--study", str(done / "study.yaml"), "--output", str(done / "page.html")])
    assert ended.value.code == 0
    steps = ask(done, "SELECT base_condition, count(*) AS n FROM conditions WHERE coefficient IS NOT NULL GROUP BY ALL")
    sizes = {record["base_condition"]: record["n"] for record in steps}
    assert sizes["single_add[direction=i_thou]"] == sizes["refusal_additive"] == 7
    assert sizes["random_add[seed=7]"] == 3


def test_prose_around_the_blocks_is_kept(done: Path) -> None:
    first = reproduce(done)
    file = done / "document.md"
    file.write_text(first.replace("## Overview\n", "## Overview\n\nWritten by hand.\n").replace("not shown", "SHOWN!"))
    again = reproduce(done)
    assert "Written by hand." in again
    assert "SHOWN!" not in again
    assert again.replace("\nWritten by hand.\n", "") == first


def test_a_block_without_a_claim_is_refused() -> None:
    with pytest.raises(StudyError, match="no claim 'gone'"):
        renewed("<!-- resid: gone -->\nx\n<!-- resid: end -->\n", {"overview": "y"}, "t", "d.md")
