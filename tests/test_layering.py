"""The floors of the building: who may import whom, read from the source, and what a stage drags in when it runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "store": {"store"},
    "pipeline": {"pipeline", "store"},
    "analysis": {"analysis", "store"},
    "jobs": {"jobs", "pipeline", "analysis", "store"},
}
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))

# Third-party packages that a floor may import. Those of one place only are below.
STORE = {"numpy", "zarr", "pyarrow", "duckdb", "pydantic", "pydantic_core", "yaml", "fsspec", "crc32c", "ml_dtypes"}
STORE |= {"safetensors"}  # export and import
BRIDGES = {"dask", "torch", "xarray"}
ALLOWED = {
    # `datasets` only where a study names a hub data set; the bridges only where one is asked for.
    "store": STORE | {"datasets", *BRIDGES},
    "analysis": STORE | {"dask", "sklearn", "scipy", "matplotlib"},
}
# Imported in one place: package -> what the module's name must start with.
BRIDGE = ("store/bridges.py", "store/selection.py")  # the latter for the types of its methods
ONE_PLACE = {
    "ray": ("pipeline/cluster",),
    "torch": ("pipeline/", *BRIDGE),
    "transformers": ("pipeline/",),
    "dask": ("analysis/", *BRIDGE),
    "xarray": BRIDGE,
    "sklearn": ("analysis/",),
    "matplotlib": ("analysis/",),
    "datasets": ("store/prompt",),
    "httpx": ("pipeline/judge_client.py",),
    "vllm": ("pipeline/vllm_engine.py",),
}
# Stages that work from what is stored: the model's libraries stay out of their process.
WITHOUT_TORCH = ("directions", "geometry", "score", "compare", "sql", "report")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every imported module and its line, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            match node.args[0]:
                case ast.Constant(value=str(module)):
                    yield module, node.lineno
                case ast.JoinedStr(values=[ast.Constant(value=str(module)), *_]):
                    yield module, node.lineno


def test_there_is_something_to_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(FLOORS)
    assert len(MODULES) > 40


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_those_below(floor: str) -> None:
    found = [
        f"{name_of(path)}:{line} imports {module}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == floor
        for module, line in imports(path)
        if (top := module.partition(".")[0]) in (*FLOORS, "tests", "benchmarks") and top not in FLOORS[floor]
    ]
    assert found == []


@pytest.mark.parametrize("floor", ALLOWED)
def test_a_floor_needs_only_its_own_packages(floor: str) -> None:
    found = [
        f"{name_of(path)}:{line} imports {module}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == floor
        for module, line in imports(path)
        if module.partition(".")[0] not in {*FLOORS, *ALLOWED[floor], *sys.stdlib_module_names}
    ]
    assert found == []


@pytest.mark.parametrize("package", ONE_PLACE)
def test_some_packages_are_imported_in_one_place(package: str) -> None:
    found = [
        f"{name_of(path)}:{line} imports {module}"
        for path in MODULES
        if not name_of(path).startswith(ONE_PLACE[package])
        for module, line in imports(path)
        if module.partition(".")[0] == package
    ]
    assert found == []


def test_stages_that_read_the_store_never_import_the_models_libraries() -> None:
    code = (
        "import sys\n"
        + "".join(f"import jobs.{stage}\n" for stage in WITHOUT_TORCH)
        + "print(*sorted({'torch', 'transformers', 'ray', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_store_imports_none_of_the_libraries_that_it_can_convert_to() -> None:
    modules = [f"store.{path.stem}" for path in MODULES if path.parent.name == "store" and path.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}\nprint(*sorted({BRIDGES} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_no_package_is_named_like_a_dependency_or_a_standard_module() -> None:
    owners = packages_distributions()
    for name in FLOORS:
        assert name not in sys.stdlib_module_names
        assert {owner.lower() for owner in owners.get(name, [])} <= {"resid"}
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert not helpers & sys.stdlib_module_names
    assert not helpers & set(owners)


def test_an_init_file_holds_one_docstring() -> None:
    found = [path for path in MODULES if path.name == "__init__.py"]
    assert len(found) == len(FLOORS)
    for path in found:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, name_of(path)
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name_of(path)


def test_every_module_says_what_it_is_and_is_short_enough_to_read() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no docstring"
        assert text.count("\n") <= 600, f"{name_of(path)} has {text.count(chr(10))} lines"
