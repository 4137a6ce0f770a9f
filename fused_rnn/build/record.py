"""The record beside a library: the facts of its making, and whether it is still what was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def write(library: Path, path: Path, facts: dict[str, Any]) -> None:
    """The facts, with the size and hash of the library, into the file ``path``."""
    facts = {**facts, **_fingerprint(library)}
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read(library: Path) -> dict[str, Any]:
    """The facts that were written down when the library was compiled, or nothing."""
    try:
        found = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def damage(library: Path) -> str:
    """How the library differs from what was compiled, "" if it does not.

    A file that lost its end or whose bytes changed would end the process when it is loaded or
    called. Reading it takes a millisecond or two.
    """
    facts = read(library)
    if "sha256" not in facts:
        return f"{library} has no record of what was compiled"
    found = _fingerprint(library)
    if found["size"] != facts.get("size"):
        return f"{library} has {found['size']} bytes instead of {facts.get('size')}"
    return "" if found["sha256"] == facts["sha256"] else f"the content of {library} has changed"


def _fingerprint(library: Path) -> dict[str, Any]:
    content = library.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
