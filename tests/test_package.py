"""What is built from this folder: an sdist, and a wheel of it with every file, that runs where the sources are not."""

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).parent.parent
NOT_INSTALLED = ("bnf_train/examples/",)  # for reading


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sdist of a copy of the sources: nothing is left in this folder, and nothing old is taken from it."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("bnf_core", "bnf_train"):
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "sources")
    build(folder / "sources", "sdist", folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build(folder / sdist.name.removesuffix(".tar.gz"), "wheel", folder)
    (path,) = folder.glob("*.whl")
    return path


def build(sources: Path, what: str, output: Path) -> None:
    """As `python -m build` does after it has installed setuptools."""
    code = "import os, sys; from setuptools import build_meta; os.chdir(sys.argv[1]); build_meta.build_{}(sys.argv[2])"
    children.run("-c", code.format(what), str(sources), str(output))


def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    files = {
        p.relative_to(ROOT).as_posix() for name in ("bnf_core", "bnf_train") for p in (ROOT / name).rglob("*") if p.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert inside == {name for name in files if "__pycache__" not in name and not name.startswith(NOT_INSTALLED)}
        for name in ("bnf_core/py.typed", "bnf_train/report/report.html.jinja", "bnf_train/demo/model/model.safetensors"):
            assert archive.read(name) == (ROOT / name).read_bytes()


@pytest.mark.slow  # a run, in a Python that imports everything from the wheel
def test_the_wheel_runs_where_the_sources_are_not(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    where = children.run("-c", "import bnf_core, bnf_train; print(bnf_core.__file__, bnf_train.__file__)", PYTHONPATH=str(site))
    assert all(Path(path).is_relative_to(site) for path in where.out.split())
    for command in (
        "bnf_train",
        *(f"bnf_train.{name}" for name in ("plan", "compare", "analyze", "benchmark", "sample", "rounds")),
    ):
        assert children.run("-m", command, "--help", PYTHONPATH=str(site)).out.startswith(f"usage: python -m {command} ")
    children.run("-m", "bnf_train", "--max_steps", "1", "--no_reference_cache", PYTHONPATH=str(site), HF_HOME=str(tmp_path))
    assert {"report.html", "README.md", "model.safetensors"} <= set(os.listdir("runs/demo-bnf"))
