"""Builds that fail: what is said, what is remembered, and what runs instead."""

import os
import shutil
import sys
import warnings

import pytest
from bound import needs_compiler
from small_build import SOURCES, facts_of, fallback_message, key_of, load, no_compiler, run_afresh

from fused_rnn import build

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]


def test_no_compiler(anew, home, monkeypatch):
    no_compiler(home, monkeypatch)
    text = fallback_message(anew())
    assert "a C++ compiler (c++, g++, clang++) was not found" in text
    assert "install a C++17 compiler" in text
    libraries = load(home)
    fallback_message(libraries)
    facts = facts_of(libraries)
    assert facts["backend"] == "reference" and "install a C++17 compiler" in facts["remedy"]


def test_compiler_of_cxx_is_missing(anew, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    assert "CXX=no-such-c++ -m64 was not found" in fallback_message(anew())


def test_compiler_that_does_not_run(anew, home, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "the compiler does not run" in fallback_message(anew())


def test_flags_that_the_compiler_does_not_know(anew, home, monkeypatch):
    monkeypatch.setenv("CXX", "c++ --no-such-flag -m64")
    text = fallback_message(anew())
    assert "no-such-flag" in text and "setting CXX" in text
    monkeypatch.setenv("CXX", "c++ -m64")
    assert anew().backend() == "native", "other flags are another build"


def test_flags_of_other_builds_are_not_taken(anew, monkeypatch):
    for name in ("CXXFLAGS", "CFLAGS", "CPPFLAGS", "LDFLAGS"):
        monkeypatch.setenv(name, "--no-such-flag")
    assert anew().backend() == "native"


def test_cached_library_needs_no_compiler(anew, kind, home, monkeypatch):
    assert anew().backend() == "native"
    no_compiler(home, monkeypatch)
    again = anew()
    assert again.backend() == "native" and again.state().origin == "cache"
    if kind == "main":
        assert facts_of(again)["problem"] is None


def test_no_ninja(libraries, tmp_path, monkeypatch):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    text = fallback_message(libraries)
    assert "ninja was not found" in text and "pip install ninja" in text


def test_source_that_does_not_compile(libraries, home):
    (home / "csrc" / "cpu" / "table.cpp").write_text('int wrong = "text";\n')
    text = fallback_message(libraries)
    log = home / "cache" / f"{key_of(libraries)}.log"
    assert "table.cpp:1:" in text and "error: invalid conversion" in text and str(log) in text
    assert "int wrong" in log.read_text()
    assert not list((home / "cache").glob("*/*")), "a failed build leaves its log alone"

    (home / "csrc" / "cpu" / "table.cpp").write_text(SOURCES["cpu/table.cpp"])
    assert libraries.backend() == "reference", "one process decides once"
    assert load(home).backend() == "native"


def test_failed_build_is_remembered(home, stub):
    stub("echo error: it cannot be done >&2; exit 1")
    first = fallback_message(load(home))
    ran = stub.count()
    assert ran and "it cannot be done" in first and "python -m fused_rnn build" in first
    second = fallback_message(load(home))
    assert stub.count() == ran, "it is not tried again"
    for part in ("it cannot be done", "not tried again since", "python -m fused_rnn build"):
        assert part in second

    facts = facts_of(load(home))
    assert facts["backend"] is None and "it cannot be done" in facts["problem"]
    assert build.report.build(load(home)) == 1 and stub.count() > ran, "the command tries again"
    # Another compiler, here the same with another version, is another key.
    stub("echo more; exit 1")
    assert "it cannot be done" in fallback_message(load(home))
    (home / "csrc" / "cpu" / "table.cpp").write_text("int other;\n")
    assert "kernels do not compile: ninja" in fallback_message(load(home))


def test_failure_is_tried_again_after_the_command(anew, home, stub):
    """``python -m fused_rnn build``, which the message says, also of the libraries of cells."""
    stub("echo error: >&2; exit 1")
    assert "to try again: python -m fused_rnn build" in fallback_message(anew())
    ran, again = stub.count(), anew()
    assert "not tried again since" in fallback_message(again) and stub.count() == ran
    assert again.failure()
    stub(f'exec {shutil.which("c++")} "$@"')
    build.report.load_all(load(home))
    assert again.failure() is None
    libraries = anew()
    assert libraries.backend() == "native" and libraries.failure() is None


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("c++: fatal error: Killed signal terminated program cc1plus", "FUSED_RNN_MAX_JOBS=1"),
        ("fatal error: error writing to x.s: No space left on device", "free disk space"),
    ],
)
def test_what_may_pass_is_not_remembered(anew, stub, text, remedy):
    stub(f"echo {text} >&2; exit 1")
    assert remedy in fallback_message(anew())
    ran = stub.count()
    assert remedy in fallback_message(anew()) and stub.count() > ran


def test_space_is_asked_first(anew, home, stub):
    stub("exit 1")
    text = fallback_message(anew(space=1 << 60))
    assert f"compiling may take {1 << 40} MB in {home / 'cache'}, where " in text
    assert "FUSED_RNN_CACHE_DIR" in text and stub.count() == 0
    assert not list((home / "cache").glob("*.failed")), "it is not remembered"


def test_warning_points_at_the_users_line(home, monkeypatch):
    """However many of our functions, and of torch's, are between."""
    code = """
import warnings
import torch, fused_rnn
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fused_rnn.LSTM(4, 6)
    @torch.no_grad()
    def forward(self, x):
        return self.rnn(x)  # here
with warnings.catch_warnings(record=True) as caught:
    torch.nn.Sequential(Model())(torch.randn(5, 3, 4))
print(*(f"{w.filename}:{w.lineno}" for w in caught if w.category is RuntimeWarning))
"""
    (home / "user.py").write_text(code)
    monkeypatch.setenv("CXX", "no-such-c++")
    line = code.splitlines().index("        return self.rnn(x)  # here") + 1
    done = run_afresh(str(home / "user.py"), PYTHONPATH=os.pathsep.join(sys.path))
    assert done.stdout.strip() == f"{home / 'user.py'}:{line}", done.stderr


def test_missing_symbol_fails_at_build(libraries, home):
    (home / "csrc" / "cpu" / "table.cpp").write_text(
        "int gone();\nint table() { return gone(); }\n"
    )
    text = fallback_message(libraries)
    assert "undefined" in text and "gone" in text


def test_no_sources(libraries, home):
    shutil.rmtree(home / "csrc")
    assert "no cells were found" in fallback_message(libraries)


def test_warning_as_error_still_decides(libraries, home, monkeypatch):
    no_compiler(home, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            libraries.backend()
        assert libraries.backend() == "reference"
