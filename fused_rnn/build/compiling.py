"""From sources to a library and its record."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import ninja, record
from .cache import Place, check_space
from .messages import say
from .sources import machine
from .target import Target
from .tools import Tools, find_ninja
from .version import VERSION


def compile_library(
    target: Target, place: Place, name: str = "", tools: Tools | None = None
) -> Path:
    """Compile into ``name.so`` in the place's folder, the facts into ``name.json``; return the
    former.

    All the work is done in a temporary folder beside it and the library is moved in last, so that
    a killed build leaves none. Raises BuildError, and keeps the compilers' output in the place's
    log then.
    """
    import torch

    tools, program = tools or target.find_tools(), find_ninja()
    start = time.monotonic()
    cache = place.cache.absolute()  # ninja runs elsewhere
    place = Place(cache, place.key)
    cache.mkdir(parents=True, exist_ok=True)
    for left_over in cache.glob(f"{place.key}.build-*"):  # of processes that were killed
        shutil.rmtree(left_over, ignore_errors=True)
    check_space(cache, target.space)
    with tempfile.TemporaryDirectory(
        prefix=f"{place.key}.build-", dir=cache, ignore_cleanup_errors=True
    ) as temporary:
        work = Path(temporary)
        ninja.write(work, tools.commands, target.units(work), target.link(), "library.so")
        kinds = [*target.kinds, *tools.kinds]
        say(f"compiling the {target.label(kinds)} into {place.folder}")
        ninja.run(program, work, place.log)
        seconds = round(time.monotonic() - start, 1)
        facts: dict[str, Any] = {
            "version": VERSION,
            "source_hash": target.source_hash(),
            "torch": torch.__version__,
            "compiler": ", ".join(map(str, tools.found)),
            "machine": machine(),
            "flags": list(dict.fromkeys(target.binding_flags + target.kernel_flags)),
            "tiers": kinds,
            **target.facts(),
            "seconds": seconds,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if epoch := os.environ.get("SOURCE_DATE_EPOCH"):  # what is made twice shall be the same
            date = datetime.fromtimestamp(int(epoch), timezone.utc)
            facts |= {"seconds": None, "date": date.isoformat(timespec="seconds")}
        record.write(work / "library.so", work / "record.json", facts)
        place.folder.mkdir(exist_ok=True)
        library = place.folder / f"{name or target.stem}.so"
        os.replace(work / "record.json", library.with_suffix(".json"))
        os.replace(work / "library.so", library)
    place.log.unlink()
    say(f"compiled in {seconds} s")
    return library
