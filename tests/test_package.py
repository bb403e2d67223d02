"""What holds for the tree as a whole: what is shipped, what is pinned, which way imports point, how long files are."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sppo_lightning"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
FILES = sorted(
    [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py"), *PACKAGE.glob("*/*/*.py")]
)  # callbacks/ among them, through the symlink


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports at its top level, without those for the type checker alone."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            yield from [f"{node.module}.{alias.name}" for alias in node.names]


def test_every_package_is_shipped():
    folders = [file.parent for file in FILES if file.name == "__init__.py"]
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(PACKAGES) == sorted(found)


def test_callbacks_is_a_relative_link():
    link = PACKAGE / "callbacks"
    assert link.is_symlink()
    assert link.readlink() == Path("../callbacks")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str):
    module = import_module(package)
    names = getattr(module, "__all__", [])
    assert names == sorted(names)
    assert [name for name in names if not hasattr(module, name)] == []


def test_everything_needed_is_pinned_to_a_version_that_is_allowed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions: dict[str, str] = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert [str(pin) for pin in pins if not str(pin.specifier).startswith("==")] == []
    assert versions["torch"] == "2.13.0"  # without a local version, so that any build of it will do
    project = PROJECT["project"]
    needed = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    refused = [str(need) for need in needed if versions[canonicalize_name(need.name)] not in need.specifier]
    assert refused == []


@pytest.mark.parametrize("withdrawn", ["2.6.2", "2.6.3"])
def test_the_withdrawn_releases_of_lightning_are_excluded(withdrawn: str):
    (lightning,) = (d for d in PROJECT["project"]["dependencies"] if d.startswith("lightning"))
    assert f"!={withdrawn}" in lightning
    assert withdrawn not in Requirement(lightning).specifier


def test_imports_point_one_way():
    for file in FILES:
        room = file.parent.name
        used = {name for name in imports(file) if name.startswith("sppo_lightning")}
        if room != "callbacks":
            assert not any(name.startswith("sppo_lightning.callbacks") for name in used), file
        if room in ("models", "data", "engines", "verification"):
            assert not any(name.startswith(("sppo_lightning.module", "sppo_lightning.cli")) for name in used), file
    pure = {name for file in (PACKAGE / "functional").glob("*.py") for name in imports(file)}
    assert {name.split(".")[0] for name in pure if not name.startswith("sppo_lightning.functional.")} <= {
        "__future__",
        "collections",
        "torch",
        "typing",
    }


def test_a_worker_that_compares_answers_does_not_load_torch():
    rooms = ",".join(f"sppo_lightning.verification.{file.stem}" for file in PACKAGE.glob("verification/[a-z]*.py"))
    code = f"import sys, sppo_lightning.verification, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_file_over_300_lines_and_no_function_over_50(file: Path):
    text = file.read_text()
    assert text.count("\n") <= 300
    long = {
        node.name: node.end_lineno - node.body[0].lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.body[0].lineno >= 50
    }
    assert long == {}
