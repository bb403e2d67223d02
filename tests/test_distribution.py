import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.name for path in (ROOT / "callbacks").glob("*.py")}
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build reads, without the leftovers of earlier builds."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("callbacks", "sppo_lightning"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    return folder


def build(kind: str, folder: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` of `folder` with the build backend that is installed."""
    run = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (archive,) = out.iterdir()
    return archive


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        shipped = {name: wheel.read(name) for name in wheel.namelist()}
    for name in MODULES:
        assert shipped[f"sppo_lightning/callbacks/{name}"] == (ROOT / "callbacks" / name).read_bytes()
    assert not any(name.startswith(("callbacks", "tests")) for name in shipped)
    assert "sppo_lightning/py.typed" in shipped
    assert any(name.endswith("licenses/LICENSE") for name in shipped)


def test_the_wheel_holds_the_callbacks_as_files(checkout: Path, tmp_path: Path):
    check_wheel(build("wheel", checkout, tmp_path))


def test_the_source_archive_holds_them_too_and_builds_the_same_wheel(checkout: Path, tmp_path: Path):
    (tmp_path / "sdist").mkdir()
    (tmp_path / "wheel").mkdir()
    archive = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        entries = {
            name.partition("/")[2]: entry for name, entry in zip(tar.getnames(), tar.getmembers(), strict=True)
        }
        tar.extractall(tmp_path, filter="data")
    assert all(entries[f"sppo_lightning/callbacks/{name}"].isreg() for name in MODULES)
    check_wheel(build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "wheel"))
