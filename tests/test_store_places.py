"""Places that are full, may not be written, or hold another format: a clear error, and nothing half done stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from failure_table import Tally
from failure_table import tally as tally
from store_forks import Forks
from store_forks import forks as forks
from store_worker import (
    LAYERS,
    MODEL,
    activations,
    capture,
    expected,
    files,
    make_rows,
    make_texts,
    new_store,
    request,
    write,
)

from jobs.cli import main
from store.activations import ActivationStore, CaptureRequest, ModelStore
from store.errors import MismatchError, ResourceError
from store.generation import FORMAT_VERSION
from store.layout import Compression
from store.sites import ALL_TOKENS

ROOT = Path(__file__).parent.parent
PAGE = 4096
COMPONENTS = ("resid_post", "mlp_out")
ROWS = make_rows(20)
ASKED = request(ROWS, COMPONENTS)


def mount(*arguments: str | Path) -> None:
    """Mount; skip the test where this process may not."""
    try:
        subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mounting is not allowed here: {error.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def leave_free(disk: Path, pages: int) -> Path:
    """Fill a disk but for some pages; return the file that does."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bfree
    ballast.write_bytes(bytes((free - pages) * PAGE))
    assert os.statvfs(disk).f_bfree == pages
    return ballast


def read_is_right(model: ModelStore, asked: CaptureRequest) -> int:
    """Check every committed row of a store; return how many there are."""
    (position,) = asked.positions
    rows = {row.key: row for row in asked.rows}
    for component in asked.components:
        if keys := model.committed_rows(component, position):
            read = model.select(keys, component, position).to_numpy()
            found = [rows[key] for key in keys]
            np.testing.assert_array_equal(read, expected(found, component, range(LAYERS), position, asked.dtype))
    return len(model.committed_rows(asked.components[0], position))


# -- full disks ----------------------------------------------------------------------------------------------------

FULL: dict[str, tuple[CaptureRequest, Compression]] = {
    "float32": (ASKED, "none"),
    "all_tokens": (request(make_texts(20), COMPONENTS, positions=[ALL_TOKENS]), "none"),
    "zstd": (ASKED, "zstd"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_disk_that_fills_up_at_any_point_loses_nothing(tmp_path: Path, disk: Path, tally: Tally, name: str) -> None:
    asked, compression = FULL[name]
    capture(new_store(str(tmp_path / "whole")), asked, block_rows=2, compression=compression)
    whole = files(tmp_path / "whole")
    reached = set()
    for pages in (0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32):
        ballast = leave_free(disk, pages)
        store = disk / "store"
        with pytest.raises(ResourceError, match=rf"{disk}.*No space left(.|\n)*remedy: free some space"):
            capture(new_store(str(store)), asked, block_rows=2, compression=compression)
        assert not list(store.rglob("*.partial"))
        assert files(store).items() <= whole.items()
        for model in ActivationStore.open(str(store)).models():
            assert model.verify() == []
            reached.add(read_is_right(model, asked))
        ballast.unlink()
        model = new_store(str(store))
        for block in model.create(model.work([asked], 2, compression)):
            assert write(model, block)
        assert files(store) == whole
        assert read_is_right(model, asked) == 20
        shutil.rmtree(store)
        tally.add()
    assert len(reached) > 2  # some blocks fitted, more or fewer of them


def test_a_disk_that_is_full_when_a_model_is_registered_is_an_error_with_a_remedy(disk: Path) -> None:
    leave_free(disk, 1)  # for resid.json
    with pytest.raises(ResourceError, match=rf"{disk}.*No space left(.|\n)*remedy: free some space"):
        new_store(str(disk / "store"))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer, as a folder that users could have."""
    from tiny_models import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


Resid = Callable[..., tuple[int, str, str]]


@pytest.fixture
def resid(capsys: pytest.CaptureFixture[str]) -> Resid:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def study(folder: Path, model: Path, store: Path, name: str = "study") -> Path:
    content: dict[str, Any] = {
        "name": "s",
        "model": {"source": str(model), "dtype": "float32"},
        "prompts": {"harmful": {"path": str(ROOT / "prompts/harmful.jsonl"), "limit": 12}},
        "capture": [{"prompts": ["harmful"], "components": ["resid_post", "attn_out"]}],
        "block_rows": 2,
        "store": str(store),
        "results": str(folder / "results"),
        "ray": {"address": "off"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def committed(store: Path) -> int:
    """Return the number of committed blocks."""
    models = ActivationStore.open(str(store)).models()
    return sum(len(generation.committed()) for model in models for generation in model.generations())


def test_the_capture_command_says_that_the_disk_is_full_and_goes_on_when_it_is_not(
    tmp_path: Path, disk: Path, tiny_folder: Path, resid: Resid
) -> None:
    assert resid("capture", "--study", study(tmp_path, tiny_folder, tmp_path / "whole"))[0] == 0
    ballast = leave_free(disk, 22)
    file = study(tmp_path, tiny_folder, disk / "store")
    code, out, err = resid("capture", "--study", file)
    assert code == 1
    assert "No space left" in out + err
    assert f"{disk}/store" in out + err
    assert "remedy: free some space" in out + err
    assert 0 < committed(disk / "store") < 6
    assert resid("store", "verify", "--deep", "--store", disk / "store")[0] == 0
    ballast.unlink()
    code, out, err = resid("capture", "--study", file)
    assert code == 0, err
    assert committed(disk / "store") == 6

    def shards(store: Path) -> dict[str, bytes]:
        return {name: data for name, data in files(store).items() if "/c/" in name}

    assert shards(disk / "store") == shards(tmp_path / "whole")


# -- places that may not be written --------------------------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A store with six of ten blocks, on a file system that is mounted read-only."""
    store, place = tmp_path / "source" / "store", tmp_path / "mounted"
    model = new_store(str(store))
    for block in model.create(model.work([ASKED], block_rows=2))[:6]:
        assert write(model, block)
    place.mkdir()
    mount("--bind", tmp_path / "source", place)
    try:
        mount("-o", "remount,ro,bind", place)
        yield place / "store"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_store_is_read_verified_and_listed(read_only: Path, resid: Resid) -> None:
    (model,) = ActivationStore.open(str(read_only)).models()
    assert read_is_right(model, ASKED) == 12
    assert model.verify() == []
    assert model.work([ASKED]).rows_to_capture == 8
    for command in (["ls"], ["verify", "--deep"], ["gc"]):
        code, out, err = resid("store", *command, "--store", read_only)
        assert (code, err) == (0, ""), out


def test_a_capture_into_a_read_only_store_is_refused_before_anything_is_computed(
    tmp_path: Path, read_only: Path, tiny_folder: Path, resid: Resid, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = ActivationStore.open(str(read_only)).models()
    refusal = rf"{read_only}.*Read-only file system(.|\n)*remedy: mount it for writing"
    with pytest.raises(ResourceError, match=refusal):
        model.assign([ASKED])
    (generation,) = model.generations()
    values = activations(generation.rows[-2:], generation.plan)
    for operation in (
        lambda: generation.write_block(9, values),
        lambda: generation.claim(9).__enter__(),
        lambda: model.memberships.write("study", None, []),
        lambda: new_store(str(read_only / "another")),
        lambda: model.location.require_writable(),
    ):
        with pytest.raises(ResourceError, match=refusal):
            operation()

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pipeline.workers.CaptureWorker.__init__", load)
    code, out, err = resid("capture", "--study", study(tmp_path, tiny_folder, read_only))
    assert code == 1
    assert "Read-only file system" in out + err
    assert "remedy: mount it for writing" in out + err


def test_somebody_who_may_only_read_reads_verifies_and_is_told(forks: Forks) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    folder = Path(tempfile.mkdtemp())  # where others may go, which tmp_path is not
    try:
        model = new_store(str(folder / "store"))
        for block in model.create(model.work([ASKED], block_rows=2))[:6]:
            assert write(model, block)
        before = files(folder)
        folder.chmod(0o755)
        code, lines = forks.start("as_nobody", store=str(folder / "store")).end()
        assert code == 0
        assert lines[:2] == ["read 12", "verify []"]
        assert lines[2].startswith("ResourceError:")
        assert "Permission denied" in lines[2]
        assert "remedy: get permission" in lines[2]
        assert len(lines) == 3
        assert files(folder) == before
    finally:
        shutil.rmtree(folder)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MismatchError, match="not a store"):
        ActivationStore.open(str(tmp_path / "file"))


# -- other formats -------------------------------------------------------------------------------------------------

VERSIONS = {1: "another --store", FORMAT_VERSION + 1: "update resid", 99: "update resid"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["resid.json", "generation.json"])
def test_another_format_is_refused_with_both_versions_and_what_to_do(
    tmp_path: Path, resid: Resid, name: str, version: int
) -> None:
    store = tmp_path / "store"
    capture(new_store(str(store)), ASKED, block_rows=4)
    (path,) = store.rglob(name)
    # Of another version one knows nothing but its number.
    path.write_text(json.dumps({"format_version": version}))
    before = files(store)
    said = rf"{store}.* format {version}\b.*\b{FORMAT_VERSION}\n  remedy: .*{VERSIONS[version]}"

    def opened() -> ModelStore:
        return ActivationStore.open(str(store)).model(MODEL)

    uses: list[Callable[[], object]] = [
        lambda: opened().select([ROWS[0].key], "mlp_out", "prompt_end"),
        lambda: opened().assign([ASKED]),
        lambda: opened().verify(),
        lambda: opened().verify(repair=True),
    ]
    for use in uses:
        with pytest.raises(MismatchError, match=said):
            use()
    for command in ("ls", "verify"):
        code, out, err = resid("store", command, "--store", store)
        assert code == 1
        assert f"format {version}" in out + err
    assert files(store) == before  # nothing was written, nor repaired away


@pytest.mark.parametrize("version", [None, "2", 2.5, [2], True])
def test_a_version_that_is_none_is_refused(tmp_path: Path, version: object) -> None:
    (tmp_path / "resid.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(MismatchError, match="remedy"):
        ActivationStore.open(str(tmp_path))
