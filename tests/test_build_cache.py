"""The folder of the libraries, and disks that are full or cannot be written."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from bound import needs_compiler
from small_build import facts_of, fallback_message, key_of, with_tests

from fused_rnn import build

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]


def test_cache_dir_of_the_environment(home, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert build.cache_dir() == Path("/xdg/fused_rnn")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    assert build.cache_dir() == Path.home() / ".cache" / "fused_rnn"
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", "~/mine")
    assert build.cache_dir() == Path.home() / "mine"


@pytest.fixture
def unwritable(home, monkeypatch):
    """A cache that not even root can write. Returns the temporary folder that stands in for it."""
    (home / "file").write_text("")
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(home / "file" / "cache"))
    (home / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
    return home / "tmp"


def test_unwritable_cache(anew, unwritable, capsys):
    libraries = anew()
    assert libraries.backend() == "native"
    private = unwritable / f"fused_rnn-{os.getuid()}"
    assert libraries.state().library.is_relative_to(private)
    assert private.stat().st_mode & 0o777 == 0o700
    error = capsys.readouterr().err
    assert "cannot be written" in error and str(private) in error

    again = anew()
    assert again.backend() == "native" and again.state().origin == "cache"


@pytest.mark.parametrize("trap", ["open to all", "link", "file"])
def test_private_folder_must_be_private(anew, home, unwritable, trap):
    private = unwritable / f"fused_rnn-{os.getuid()}"
    if trap == "open to all":
        private.mkdir()
        private.chmod(0o777)
    elif trap == "link":
        (home / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(home / "elsewhere")
    else:
        private.write_text("")
    assert "FUSED_RNN_CACHE_DIR" in fallback_message(anew())


def test_clean_deletes_only_its_own(libraries, home):
    assert libraries.backend() == "native"
    key = facts_of(libraries)["library"].parent.name
    cache = home / "cache"
    (cache / f"{key}.build-x").mkdir()
    (cache / f"{key}.log").write_text("")
    for name in ("keep", "0.1.0-mine", f"{key}.txt.bak"):
        (cache / name).write_text("")
    build.clean()
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        ["keep", "0.1.0-mine", f"{key}.txt.bak"]
    )
    assert build.clean() == []


def test_clean_leaves_a_build_under_way(libraries, home):
    (home / "cache").mkdir()
    key = key_of(libraries)
    (home / "cache" / f"{key}.build-x").mkdir()
    with build.locked(build.Place(home / "cache", key), timeout=0):
        assert build.clean() == []
    assert (home / "cache" / f"{key}.build-x").exists()


# --- Disks ---------------------------------------------------------------------------------------


def alone(code, *arguments):
    """What a program prints that may mount file systems, which nobody else sees."""
    command = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no file systems can be mounted here")
    done = subprocess.run(
        [*command, sys.executable, "-c", code, *map(str, arguments)],
        env=with_tests(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# On a disk of so many bytes, of which compiling is said to need none.
FULL = """
import json, os, subprocess, sys, warnings
from pathlib import Path
os.environ["FUSED_RNN_CACHE_DIR"] = "/mnt"
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[3]}", "none", "/mnt"], check=True)
from small_build import KINDS
def use():
    libraries = KINDS[sys.argv[2]](Path(sys.argv[1]), space=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return libraries.backend(), [str(w.message) for w in caught]
found = [use()]
subprocess.run(["mount", "-o", "remount,size=50m", "/mnt"], check=True)
print(json.dumps([*found, use()]))
"""


@pytest.mark.drawn(2)  # each mounts disks and starts processes
@pytest.mark.parametrize("size", ["4k", "12k", "20k", "40k", "80k"])
def test_full_disk(home, kind, size):
    """Wherever in a build it is met; with more room the next use builds."""
    (backend, messages), (later, _) = json.loads(alone(FULL, home, kind, size))
    assert later == "native", messages
    if backend == "reference":
        (text,) = messages
        assert "free disk space" in text, text


READ_ONLY = """
import os, subprocess, sys, tempfile, warnings
from pathlib import Path
from small_build import KINDS
home, kind = Path(sys.argv[1]), sys.argv[2]
def use():
    libraries = KINDS[kind](home)
    assert libraries.backend() == "native"
    return libraries.state()
os.environ["FUSED_RNN_CACHE_DIR"] = "/mnt"
tempfile.tempdir = str(home)
subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=True)
if os.fork() == 0:  # whose files are closed when it ends
    assert use().library.is_relative_to("/mnt")
    os._exit(0)
assert os.wait()[1] == 0
subprocess.run(["mount", "-o", "remount,ro", "/mnt"], check=True)
assert use().origin == "cache"  # what is there is used as it is
os.environ["CXX"] = "c++ -m64"
assert use().library.is_relative_to(home)  # and what is not is built elsewhere
"""


def test_cache_on_a_disk_that_is_read_only(home, kind):
    assert alone(READ_ONLY, home, kind) == ""
