"""Which library is used: one that comes with the package, one of the cache, a new one, or none."""

import os
import shutil
import threading
import warnings

import pytest
from bound import needs_compiler
from forked import python
from small_build import (
    LOADER,
    compile_into,
    facts_of,
    fallback_message,
    load,
    no_compiler,
    with_tests,
)

from fused_rnn import build
from fused_rnn.build.messages import listed

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]


# --- The library that comes with the package -----------------------------------------------------


def test_ahead_of_time_library_is_used(libraries, home):
    library = compile_into(libraries, home / "temp", "native", "_native")
    for path in (library, library.with_suffix(".json")):
        shutil.copy(path, home)
    assert libraries.backend() == "native" and facts_of(libraries)["origin"] == "ahead of time"
    assert not (home / "cache").exists()

    with (home / "csrc" / "cells" / "one.h").open("a") as file:
        file.write("// changed\n")
    changed = load(home)
    assert changed.backend() == "native" and facts_of(changed)["origin"] == "built now"
    assert "compiled from other sources" in facts_of(changed)["reason"]


def write_library(path, content=b"this is no library", **facts):
    """A file and its record, as a build leaves them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    build.record.write(path, path.with_suffix(".json"), facts)


def test_library_that_does_not_load(libraries, home):
    write_library(home / "_native.so", source_hash=libraries.targets["cpu"].source_hash())
    text = fallback_message(libraries)
    assert "_native.so cannot be loaded" in text


def test_record_that_cannot_be_read(home):
    for text in ("", "{", "[]"):
        (home / "_native.json").write_text(text)
        assert build.record.read(home / "_native.so") == {}


DAMAGES = {
    "no end": lambda path: os.truncate(path, path.stat().st_size // 2),
    "other bytes": lambda path: path.write_bytes(bytes(b ^ 1 for b in path.read_bytes())),
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "empty record": lambda path: path.with_suffix(".json").write_text("{}"),
    "size of another type": lambda path: path.with_suffix(".json").write_text(
        '{"sha256": "", "size": "much"}'
    ),
}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_library_in_the_cache_is_built_anew(anew, kind, home, damage):
    """It would end the process, when it is loaded or when it is called."""
    code = f"{LOADER}\nassert libraries.backend() == 'native'"  # this process has not loaded it
    done = python("-c", code, str(home), kind, env=with_tests())
    assert done.returncode == 0, done.stderr
    (library,) = (home / "cache").glob("*/*.so")
    DAMAGES[damage](library)
    again = anew()
    assert again.backend() == "native" and again.state().origin == "built now"
    assert str(library) in again.state().reason
    after = anew()
    assert after.backend() == "native" and after.state().origin == "cache"


def test_damaged_library_of_the_package_is_not_used(libraries, home):
    library = compile_into(libraries, home / "temp", "native", "_native")
    for path in (library, library.with_suffix(".json")):
        shutil.copy(path, home)
    os.truncate(home / "_native.so", 1000)
    assert libraries.backend() == "native"
    facts = facts_of(libraries)
    assert facts["origin"] == "built now" and "_native.so has 1000 bytes" in facts["reason"]


# --- Choosing the backend ------------------------------------------------------------------------


def test_reference_never_builds(libraries, home, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert libraries.backend() == "reference"
    assert not (home / "cache").exists() and facts_of(libraries)["problem"] is None


def test_native_raises_instead_of_falling_back(libraries, home, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "native")
    no_compiler(home, monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no native library: a C\+\+ compiler .* not found"):
            libraries.backend()


def test_native_and_auto_build(home, monkeypatch):
    for value in ("native", "auto", ""):
        monkeypatch.setenv("FUSED_RNN_BACKEND", value)
        assert load(home).backend() == "native"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FUSED_RNN_BACKEND", "cuda", "is 'cuda': use auto, native or reference"),
        ("FUSED_RNN_CPU_CAPABILITY", "NEON", f"is 'NEON': use {listed(build.levels())}"),
        ("FUSED_RNN_MAX_JOBS", "many", "is 'many': use a number"),
        ("FUSED_RNN_LOCK_TIMEOUT", "-1", "is '-1': use a number that is not negative"),
        ("FUSED_RNN_CUDA_ARCH", "sm_90", "is 'sm_90': use compute capabilities"),
        ("FUSED_RNN_VERBOSE", "yes", "is 'yes': use 0 or 1"),
        ("FUSED_RNN_BACKENDS", "native", "is no setting of .*; there are FUSED_RNN_BACKEND, "),
    ],
    ids=str,
)
def test_settings_that_cannot_be(libraries, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            libraries.backend()
    monkeypatch.setenv(name, "")
    if name != "FUSED_RNN_BACKENDS":
        build.settings.check()


def test_settings_of_the_tests_are_left_alone(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_TEST_SEED", "1")
    build.settings.check()


def test_first_use_from_many_threads(libraries, capsys):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(libraries.backend())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["native"] * 8
    assert capsys.readouterr().err.count("compiling the CPU kernels") == 1
