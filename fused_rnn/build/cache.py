"""The folders that libraries are kept in, and the locks that keep builds apart."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from . import settings
from .messages import NO_SPACE, BuildError, say

# What clean() may delete: folders of libraries, and what builds leave beside them.
OURS = re.compile(r"(\d[\w.]*-[0-9a-f]{12}-[0-9a-f]{12})(\.lock|\.log|\.failed|\.build-\w+)?")


class Place(NamedTuple):
    """Where the files of one library are, in one cache."""

    cache: Path
    key: str

    @property
    def folder(self) -> Path:
        return self.cache / self.key

    @property
    def lock(self) -> Path:
        return self.cache / f"{self.key}.lock"

    @property
    def log(self) -> Path:
        """What the compilers have said so far, while they run and if they failed."""
        return self.cache / f"{self.key}.log"

    @property
    def _failed(self) -> Path:
        return self.cache / f"{self.key}.failed"

    def remember(self, error: BuildError) -> None:
        """That this cannot be built: the next process shall not try for minutes again."""
        date = datetime.now().isoformat(" ", timespec="minutes")
        facts = {"reason": error.reason, "remedy": error.remedy, "date": date}
        self._failed.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def failure(self) -> BuildError | None:
        """What was remembered."""
        try:
            facts = json.loads(self._failed.read_text(encoding="utf-8"))
            return BuildError(
                f"{facts['reason']} (on {facts['date']}, not tried again since)", facts["remedy"]
            )
        except (OSError, ValueError, TypeError, KeyError):
            return None


def cache_dir() -> Path:
    """The folder that holds the libraries of all versions, whether it exists or not."""
    if own := settings.read("FUSED_RNN_CACHE_DIR"):
        return Path(os.path.abspath(os.path.expanduser(own)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "fused_rnn"


def _private_dir() -> Path:
    """This user's stand-in for a cache folder that cannot be written."""
    return Path(tempfile.gettempdir()) / f"fused_rnn-{os.getuid()}"


def _check_private(folder: Path) -> None:
    """Raise BuildError if others can write there: their libraries must never be loaded."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BuildError(
            f"{folder} is not a private folder of this user",
            "set FUSED_RNN_CACHE_DIR to a folder that you can write",
        )


def readable_caches() -> Iterator[Path]:
    """The folders to look for a library in."""
    yield cache_dir()
    if os.name == "posix" and os.path.lexists(_private_dir()):
        with contextlib.suppress(BuildError):
            _check_private(_private_dir())
            yield _private_dir()


def writable_cache() -> Path:
    """The first of the cache folders that takes files. Raises BuildError, OSError."""
    folder = cache_dir()
    try:
        if not folder.is_absolute():
            raise OSError("there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        private = _private_dir()
        private.mkdir(mode=0o700, exist_ok=True)
        _check_private(private)
        say(f"the cache folder {folder} cannot be written ({error}), using {private}")
        return private


def check_space(folder: Path, needed: int) -> None:
    """Raise BuildError if the folder's disk has less than these bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"compiling may take {needed >> 20} MB in {folder}, where {free >> 20} MB are free",
            NO_SPACE,
        )


@contextlib.contextmanager
def locked(place: Place, timeout: float, notice: float = 10.0) -> Iterator[None]:
    """Hold the operating system's lock on a place; waiting is announced after notice seconds.

    Raises BuildError once its holder has not got on for timeout seconds: its log is as it was. The
    lock ends with its process, so a file that was left behind locks nothing.
    """
    import fcntl  # not on Windows, where nothing is built

    begin = since = time.monotonic()
    seen, told = _state(place.log), False
    while True:
        handle = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # clean() may have deleted the file between our opening and locking it.
            if os.path.samestat(os.fstat(handle), os.stat(place.lock)):
                break
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(handle)
        now = time.monotonic()
        if (state := _state(place.log)) != seen:
            seen, since = state, now
        if now - since >= timeout:
            raise BuildError(
                f"another process has held {place.lock} for {now - begin:.1f} s, the last "
                f"{timeout:g} s without progress",
                "wait for its build to end, or set FUSED_RNN_LOCK_TIMEOUT to more seconds",
            )
        if now - begin > notice and not told:
            told = True
            say(
                f"waiting for another process to build, until it makes no progress for "
                f"{timeout:g} s (lock {place.lock})"
            )
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(handle)


def _state(path: Path) -> tuple[int, int] | None:
    """What changes whenever a file is written."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return None


def forget_failures() -> None:
    """That libraries could not be built: their next use tries again."""
    for cache in readable_caches():
        for path in cache.glob("*.failed"):
            if OURS.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()


def clean() -> list[Path]:
    """Delete what builds have put into the cache, but none under way. Returns what was deleted."""
    deleted = []
    for cache in readable_caches():
        keys = {found[1] for path in cache.glob("*") if (found := OURS.fullmatch(path.name))}
        for key in sorted(keys):
            with contextlib.suppress(BuildError), locked(Place(cache, key), timeout=0):
                for path in sorted(cache.glob(f"{key}*")):
                    if not OURS.fullmatch(path.name):
                        continue
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
                    deleted.append(path)
    return deleted
