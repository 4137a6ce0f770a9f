"""Several processes that build at once, and those that are killed."""

import contextlib
import fcntl
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bound import needs_compiler
from small_build import LOADER, compile_into, fallback_message, key_of, load, with_tests

from fused_rnn import build

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]


def test_stale_lock_file_is_harmless(libraries, home):
    (home / "cache").mkdir()
    (home / "cache" / f"{key_of(libraries)}.lock").write_text("pid 1")
    start = time.monotonic()
    assert libraries.backend() == "native" and time.monotonic() - start < 30


def test_waiting_for_the_lock_ends(libraries, home, monkeypatch, capsys):
    (home / "cache").mkdir()
    place = build.Place(home / "cache", key_of(libraries))
    monkeypatch.setenv("FUSED_RNN_LOCK_TIMEOUT", "0.3")
    with place.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = fallback_message(libraries)
        assert f"another process has held {place.lock} for " in text
        assert "0.3 s without progress" in text and "FUSED_RNN_LOCK_TIMEOUT" in text
        with pytest.raises(build.BuildError), build.locked(place, timeout=0.3, notice=0.0):
            pass
    assert capsys.readouterr().err.count("waiting for another process to build") == 1


def test_waiting_goes_on_while_the_other_gets_on(home, capsys):
    (home / "cache").mkdir()
    place = build.Place(home / "cache", "0.1.0-key")
    file = place.lock.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)

    def holder():
        for step in range(40):  # 4 seconds, four times the timeout
            with place.log.open("a") as log:
                log.write(f"[{step}/40]\n")
            time.sleep(0.1)
        file.close()

    thread = threading.Thread(target=holder)
    thread.start()
    with build.locked(place, timeout=1.0):
        pass
    thread.join()


def start(home, code, kind="main", **options):
    """A process that has the package ready, and runs code when it gets a line of input."""
    script = f"{LOADER}\nimport torch\nprint('ready', flush=True)\ninput()\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", script, str(home), kind],
        env=with_tests(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def release(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_at_once_build_once(home):
    (home / "csrc" / "ops" / "cpu.cpp").write_text(
        "#include <torch/csrc/stable/library.h>\n"
        "#include <torch/csrc/stable/tensor.h>\n"
        "using torch::stable::Tensor;\n"
        "int64_t count(Tensor x) { return x.numel(); }\n"
        'STABLE_TORCH_LIBRARY(probe, m) { m.def("count(Tensor x) -> int"); }\n'
        'STABLE_TORCH_LIBRARY_IMPL(probe, CPU, m) { m.impl("count", TORCH_BOX(&count)); }\n'
    )
    code = (
        "print(libraries.backend(), libraries.state().origin)\n"
        "assert torch.ops.probe.count(torch.ones(2, 3)) == 6"
    )
    processes = [start(home, code) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        release(process)
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert sorted(out for out, _ in results) == ["native built now\n", "native cache\n"]
    assert "".join(err for _, err in results).count("compiling the CPU kernels") == 1


def test_processes_at_once_build_a_cell_once(home):
    compile_into(load(home), home / "main")
    code = "print(libraries.backend(), libraries.state().origin)"
    processes = [start(home, code, "cell") for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        release(process)
    results = [process.communicate(timeout=120) for process in processes]
    assert sorted(out for out, _ in results) == ["native built now\n", "native cache\n"], results


@pytest.mark.drawn(2)
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_build_leaves_nothing_in_the_way(home, kind, anew, stub, sign):
    """Neither files nor processes: ninja and its compilers end with who started them."""
    stub(f'[ ! -e {home.parent}/slow ] || sleep 60\nexec {shutil.which("c++")} "$@"')
    (home.parent / "slow").write_text("")
    # A shell's background jobs ignore interrupts, and so does what they start.
    heeded = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(home, f"{heeded}\nlibraries.backend()", kind)
    release(process)
    deadline = time.monotonic() + 60
    while not stub.processes():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(sign)
    process.communicate(timeout=60)
    for pid in stub.processes():
        while Path(f"/proc/{pid}").exists() and "zombie" not in status(pid):
            assert time.monotonic() < deadline, "a compiler lives on"
            time.sleep(0.02)
    assert not list((home / "cache").rglob("*.so"))

    (home.parent / "slow").unlink()
    libraries = anew()
    assert libraries.backend() == "native" and libraries.state().origin == "built now"
    assert not list((home / "cache").glob("*.build-*"))


def status(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text()
    return "zombie"
