"""What the build tells people: errors with a remedy, and remarks while it works."""

from __future__ import annotations

import errno
import sys

FULL = (errno.ENOSPC, errno.EDQUOT)  # what a system says where a disk, or a share of it, is full
NO_SPACE = "free disk space, or set FUSED_RNN_CACHE_DIR to a folder on another disk"


class BuildError(RuntimeError):
    """There is no native library: the reason, and what the user can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}\n  remedy: {remedy}")
        self.reason, self.remedy = reason, remedy


class CompileError(BuildError):
    """The compilers refused the sources, as they will again."""


def say(text: str) -> None:
    print(f"fused_rnn: {text}", file=sys.stderr, flush=True)


def listed(words: list[str] | tuple[str, ...]) -> str:
    """The words as a person would write them: a, b or c."""
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
