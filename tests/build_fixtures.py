"""Fixtures on the sources of ``small_build.py``: a folder with them, its libraries, a compiler."""

import os

import pytest
from small_build import KINDS, SOURCES, compile_into, load


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with csrc and cache in it; its name must be quoted everywhere."""
    folder = tmp_path / "a folder, $HOME: 'quoted'"
    for name, text in SOURCES.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for variable in [name for name in os.environ if name.startswith("FUSED_RNN_")]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(folder / "cache"))
    return folder


@pytest.fixture
def libraries(home):
    return load(home)


@pytest.fixture(params=KINDS)
def kind(home, request):
    """Of the libraries that a test is about. Where that of a cell is one, the CPU's is there."""
    if request.param == "cell":
        compile_into(load(home), home / "main")
    return request.param


@pytest.fixture
def anew(home, kind):
    """Libraries that have not been used yet."""
    return lambda **changes: KINDS[kind](home, **changes)


@pytest.fixture
def stub(home, monkeypatch):
    """Makes CXX a program that says its version, notes that it ran and does what it is told to."""
    compiler = home.parent / "stub-c++"  # a path that needs no quotes
    ran = home.parent / "ran"

    def say(text):
        compiler.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo stub 1.0 && exit\necho $$ >> {ran}\n{text}\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))

    say.count = lambda: len(ran.read_text().split()) if ran.exists() else 0
    say.processes = lambda: [int(pid) for pid in ran.read_text().split()] if ran.exists() else []
    return say
