"""What setup.py makes: distributions with the sources, with kernels or without."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from bound import needs_compiler
from small_build import ROOT, compile_into, load

from fused_rnn import build

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]

FOLDERS = ("benchmarks", "csrc", "examples", "fused_rnn", "tests")


@pytest.fixture
def tree(home, tmp_path):
    """A copy of what makes the package, where setup.py may write."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "_native*")
    for name in (*FOLDERS, ".ci", ".github", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, folder)
    shutil.copy(ROOT / ".clang-format", folder)
    return folder


def setup(tree, *arguments, **env):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_source_distribution_is_complete(tree):
    """Tests, examples and make work from it as from a checkout."""
    done = setup(tree, "sdist", "--dist-dir", "made")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "made").iterdir()
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {path for name in FOLDERS for path in (tree / name).rglob("*") if path.is_file()}
    missing = {path.relative_to(tree).as_posix() for path in wanted} - packed
    assert not missing
    top = "CHANGELOG.md LICENSE Makefile README.md pyproject.toml setup.py .ci/run .clang-format"
    of_site = "mkdocs.yml CONTRIBUTING.md docs/site/hooks.py docs/site/style.css"
    public = "CITATION.cff .github/workflows/tests.yml .github/ISSUE_TEMPLATE/config.yml"
    assert {*top.split(), *of_site.split(), *public.split()} <= packed


def test_wheel_without_kernels_says_so(tree):
    done = setup(tree, "bdist_wheel", FUSED_RNN_SKIP_EXT="1")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert "NO NATIVE LIBRARY" in last and "FUSED_RNN_SKIP_EXT" in last
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_has_the_package_and_its_sources_and_no_more(tree):
    """From the source distribution too, to the last byte."""
    dated = {"FUSED_RNN_SKIP_EXT": "1", "SOURCE_DATE_EPOCH": "1700000000"}
    assert setup(tree, "bdist_wheel", "sdist", **dated).returncode == 0
    archive, wheel = sorted((tree / "dist").iterdir(), key=lambda path: path.suffix)
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    wanted = [path for path in (tree / "fused_rnn").rglob("*") if path.is_file()]
    wanted = {path.relative_to(tree).as_posix() for path in wanted if path.suffix != ".pyc"}
    wanted |= {f"fused_rnn/{path.relative_to(ROOT).as_posix()}" for path in build.source_files()}
    assert found == wanted
    with tarfile.open(archive) as tar:
        tar.extractall(tree.parent / "unpacked")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    done = setup(unpacked, "bdist_wheel", **dated)
    assert done.returncode == 0, done.stderr
    assert (unpacked / "dist" / wheel.name).read_bytes() == wheel.read_bytes()


def test_library_is_the_same_wherever_it_was_compiled(home, tmp_path, monkeypatch):
    """And whenever, where a date is given: names of folders are in none of its messages."""
    text = "#include <torch/csrc/stable/library.h>\nconst char* file() { return __FILE__; }\n"
    (home / "csrc" / "ops" / "cpu.cpp").write_text(text)
    shutil.copytree(home / "csrc", tmp_path / "elsewhere" / "csrc")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = [
        compile_into(load(folder), folder / "made") for folder in (home, tmp_path / "elsewhere")
    ]
    one, other = (path.read_bytes() for path in made)
    assert one == other and str(tmp_path).encode() not in one
    one, other = (path.with_suffix(".json").read_text() for path in made)
    assert one == other and "2023-11-14" in one


def test_kernels_that_are_required(tree):
    done = setup(tree, "bdist_wheel", FUSED_RNN_SKIP_EXT="1", FUSED_RNN_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "FUSED_RNN_REQUIRE_EXT is set, but FUSED_RNN_SKIP_EXT is set" in done.stderr
    done = setup(tree, "bdist_wheel", FUSED_RNN_REQUIRE="1")
    assert "FUSED_RNN_REQUIRE is no setting" in done.stderr


def test_editable_install_is_a_folder_on_the_path(tree):
    """Type checkers find that, where they find no program that imports would run."""
    code = """
from setuptools.build_meta import build_editable
print(build_editable("made"))
"""
    (tree / "made").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "made").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert Path(archive.read(name).decode().strip()).samefile(tree)
        assert not [name for name in archive.namelist() if name.endswith(".py")]
