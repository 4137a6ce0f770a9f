"""What mkdocs does beside its configuration, mkdocs.yml.

The site is the repository's own pages at their own places (README.md, docs/, examples/,
benchmarks/), with the pictures and programs that they link, so the links of a page hold here and
there. Every public name must be described, and be in the reference.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN = (
    "*.md",
    "LICENSE",
    "docs/*.md",
    "docs/site/*.css",
    "docs/pictures/*",
    "examples/README.md",
    "examples/*.py",
    "examples/*.cpp",
    "examples/packages/*.py",
    "examples/pictures/*",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/pages/*.md",
    "benchmarks/results/*/*.txt",
    "benchmarks/results/*.png",
)
REFERENCE = "docs/api.md"

log = logging.getLogger("mkdocs.hooks.fused_rnn")


def on_config(config: Any) -> None:
    """The pages of results are many, and found. A page links its source where it has one."""
    config.edit_uri = "edit/main/" if config.repo_url else None
    pages = sorted((ROOT / "benchmarks" / "results" / "pages").glob("*.md"))
    for section in config.nav:
        if "Benchmarks" in section:
            names = [path.relative_to(ROOT).as_posix() for path in pages]
            section["Benchmarks"].append({"All rows": names})


def on_files(files: Any, config: Any) -> Any:
    """In the place of docs/ alone."""
    from mkdocs.structure.files import File

    for file in list(files.documentation_pages() + files.media_files()):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Without badges, whose links are those of the repository's host."""
    if page.file.src_uri == REFERENCE:
        for problem in problems(markdown):
            log.warning(problem)
    return re.sub(r"^\[!\[.*\n", "", markdown, flags=re.M)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """In the reference, names that docstrings mention are links."""
    if page.file.src_uri != REFERENCE:
        return html
    names = "|".join(re.findall(r'id="fused_rnn\.(\w+)"', html))
    return re.sub(rf"<code>({names})</code>", r'<a href="#fused_rnn.\1"><code>\1</code></a>', html)


def problems(reference: str) -> Iterator[str]:
    """Public names without a description, or that the page of reference lacks."""
    import fused_rnn

    shown = set(re.findall(r"^::: fused_rnn\.(\w+)", reference, re.M))
    for name in sorted(set(fused_rnn.__all__) ^ shown):
        yield f"{name}: expected both in fused_rnn.__all__ and in {REFERENCE}"
    for name, thing in public():
        if not (thing.__doc__ or "").strip():
            yield f"{name} has no docstring"


def public() -> Iterator[tuple[str, Any]]:
    """Public names of the package and of its zoo, and what their classes define themselves."""
    import fused_rnn
    from fused_rnn import zoo

    for module in (fused_rnn, zoo):
        for name in module.__all__:
            thing = getattr(module, name)
            yield f"{module.__name__}.{name}", thing
            if module is fused_rnn and inspect.isclass(thing):
                for member, value in vars(thing).items():
                    if not member.startswith("_") and (callable(value) or is_property(value)):
                        yield f"{module.__name__}.{name}.{member}", value


def is_property(value: object) -> bool:
    return isinstance(value, property)
