"""``python -m fused_rnn``, and what an import of the package does."""

import os
import re
import warnings

import pytest
import torch
from bound import needs_compiler
from forked import python
from small_build import ROOT, compile_into, key_of, load, run_afresh

from fused_rnn import build

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]


def run(*arguments, **env):
    """Run Python from the checkout, where the real package and sources are."""
    return python(*arguments, cwd=ROOT, env={**os.environ, **env})


def test_import_builds_nothing(home):
    code = "import fused_rnn; fused_rnn.GRU(2, 3); assert not fused_rnn.build.state(); import sys; "
    code += "assert 'torch._dynamo' not in sys.modules"  # which takes as long as all of torch
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (home / "cache").exists()


def test_the_build_needs_no_torch(home):
    """setup.py and tests load it by its path where there may be none."""
    code = f"""
import importlib.util, sys
sys.modules["torch"] = sys.modules["fused_rnn"] = None  # their import would fail
path = {str(ROOT / "fused_rnn" / "build" / "__init__.py")!r}
spec = importlib.util.spec_from_file_location("fused_rnn_build", path)
build = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.VERSION, len(build.CPU.source_hash()), len(build.cells()), build.levels()[0])
"""
    done = run_afresh("-c", code)
    assert done.stdout == f"{build.VERSION} 12 {len(build.cells())} generic\n", done.stderr


def test_doctor_of_the_package(home):
    done = run("-m", "fused_rnn", "doctor")
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(None, 1) for line in done.stdout.splitlines() if line)
    assert facts["torch"] == torch.__version__ and facts["cache"] == str(home / "cache")
    assert not (home / "cache").exists()


def test_unknown_settings_of_the_commands(home):
    done = run("-m", "fused_rnn", "doctor", FUSED_RNN_BACKEND="fastest")
    assert done.returncode == 2 and "use auto, native or reference" in done.stderr
    done = run("-m", "fused_rnn", "doctor", FUSED_RNN_BACKENDS="native")
    assert done.returncode == 2 and "FUSED_RNN_BACKENDS is no setting" in done.stderr


@pytest.fixture
def command(home, monkeypatch, capsys):
    """Runs one command on the small sources; gives its exit code, output and errors."""

    def call(name, *arguments, **env):
        with monkeypatch.context() as patch:
            for variable, value in env.items():
                patch.setenv(variable, value)
            code = getattr(build.report, name)(load(home), *arguments)
        return code, *capsys.readouterr()

    return call


def test_doctor_says_what_is_used(command):
    code, out, _ = command("doctor", False)
    assert code == 0 and "all is well: the first use" in out
    assert "backend   chosen at the first use" in out
    assert re.search(r"^tested    (on such machines|under an emulator|never)", out, re.MULTILINE)
    code, out, _ = command("doctor", True)
    assert code == 0 and "origin    built now" in out and out.endswith("\nall is well\n")
    code, out, _ = command("doctor", False)
    assert code == 0 and "origin    cache" in out and "all is well: the native library works" in out
    code, out, _ = command("doctor", True, FUSED_RNN_BACKEND="reference")
    assert code == 0 and "backend   reference" in out and "native is switched off" in out


def test_doctor_names_the_remedy(command):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for load_it in (False, True):
            code, out, _ = command("doctor", load_it, CXX="no-such-c++")
            assert code == 0
            assert "problem   the compiler of CXX=no-such-c++ was not found" in out
            assert "remedy    install a C++17 compiler" in out
            code, _, _ = command("doctor", load_it, CXX="no-such-c++", FUSED_RNN_BACKEND="native")
            assert code == 1


def test_doctor_survives_a_library_that_crashes(command, home):
    """It is tried in a process of its own. The crash is at load, in a constructor."""
    (home / "csrc" / "cpu" / "table.cpp").write_text(
        "struct Crash { Crash() { __builtin_trap(); } } crash;\n"
    )
    libraries = load(home)
    library = compile_into(libraries, home / "cache", key_of(libraries))
    code, out, _ = command("doctor", False)
    assert code == 0 and f"problem   {library} does not work: its process was ended by SIG" in out
    assert f"remedy    delete {library}" in out and "all is well" not in out
    code, _, _ = command("doctor", False, FUSED_RNN_BACKEND="native")
    assert code == 1


def test_doctor_tries_the_layers():
    """The library of the package, whatever it is here: wrong results would be told."""
    if build.backend() != "native":
        pytest.skip("no native library")
    assert build.report.try_out("cpu", build.state().library) is None
    code = """
import sys, torch
from fused_rnn import build
from fused_rnn.build import trial
def forward(self, x):
    return sum(p.sum() for p in self.parameters()).expand(4, 3, 14), None
torch.nn.LSTM.forward = forward
trial.main("cpu", sys.argv[1])
"""
    done = run("-c", code, str(build.state().library))
    assert done.returncode == 1 and "Tensor-likes are not close" in done.stderr


def test_build_and_clean_commands(command, home):
    code, _, err = command("build", CXX="no-such-c++")
    assert code == 1 and "install a C++17 compiler" in err
    code, out, _ = command("build")
    assert code == 0 and "fused_rnn_native.so (built now)" in out
    done = run("-m", "fused_rnn", "clean")
    assert done.returncode == 0 and done.stdout.count("deleted ") == 2
    assert not list((home / "cache").iterdir())
