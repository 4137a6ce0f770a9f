"""The pages say what is there: links lead somewhere, code runs, environment variables exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from test_guides import GUIDES
from torch import nn

from fused_rnn import build

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


def prose(page: Path) -> str:
    """The page without blocks of code, and without code in lines."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """What a heading is called in links: lower case, words joined by dashes."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    links = [(p, link) for p in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", prose(p))]
    for page, link in links:
        if re.match(r"\w+:", link):
            continue
        if workflow := re.match(r"\.\./\.\./actions/workflows/([\w.]+)", link):  # at the host
            assert (ROOT / ".github" / "workflows" / workflow[1]).exists(), link
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page}: {link} does not exist"
        assert not anchor or anchor in anchors(target), f"{page}: {link}: no such heading"


def test_every_page_is_linked_from_the_first() -> None:
    """By the first page or by a page that it links."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", prose(page))
        todo += [page.parent / link for link in links if not re.match(r"\w+:", link)]
    assert (
        not {p for p in PAGES if p.is_relative_to(ROOT / "docs")}
        - reached
        - {ROOT / "docs" / "README.md"}
    )


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


WITH_CODE = [p for p in PAGES if blocks(p) and p.stem not in GUIDES]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_python_runs(page: Path) -> None:
    """Each page from top to bottom; ``model`` is the reader's. For the others: test_guides.py."""
    names = {"torch": torch, "nn": nn, "model": nn.Sequential(nn.GRU(4, 8))}
    rnn = torch.backends.cudnn.rnn  # a page may set it for its reader
    before = rnn.fp32_precision  # type: ignore[attr-defined]
    try:
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), names)
    finally:
        rnn.fp32_precision = before  # type: ignore[attr-defined]


def test_commands_exist() -> None:
    """Targets of make, programs and modules that blocks of shell name."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    pages = "\n".join(page.read_text() for page in PAGES)
    for text in re.findall(r"^```sh\n(.*?)^```", pages, re.M | re.S):
        assert set(re.findall(r"^make ([a-z][\w-]*)", text, re.M)) <= targets
        for program in re.findall(r"\bpython ([\w/]+\.py)", text):
            assert (ROOT / program).exists(), program
        for module in re.findall(r"\bpython -m ((?:fused_rnn|benchmarks)[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            assert (path / "__main__.py").exists() or path.with_suffix(".py").exists(), module


def read_by(*patterns: str) -> set[str]:
    """The environment variables that files read."""
    read = r"""(?:environ(?:\.get\(|\[)|getenv\()\s*"(\w+)\""""
    paths = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    return {name for path in paths for name in re.findall(read, path.read_text())}


def test_environment_variables() -> None:
    """Those that the code reads are those that the page on the build lists."""
    own = read_by("fused_rnn/**/*.py", "csrc/**/*", "setup.py") - {"PATH", "XDG_CACHE_HOME"}
    own |= set(build.settings.RULES)
    of_tests = {name for name in read_by("tests/*.py") if name.startswith("FUSED_RNN_TEST_")}
    page = (ROOT / "docs" / "build.md").read_text()
    assert set(re.findall(r"`([A-Z][A-Z_]+)`", page)) - {"PATH"} == own | of_tests


def test_reference_is_whole() -> None:
    """Every public name is described, and in the reference; ``make docs`` says the same."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert not list(hooks.problems((ROOT / hooks.REFERENCE).read_text()))
    assert "LSTM: expected both in fused_rnn.__all__ and in docs/api.md" in hooks.problems("")


def test_lists_in_lists_are_four_spaces_in() -> None:
    """Less is no list of its own for the site's Markdown."""
    for page in PAGES:
        assert not re.findall(r"^ {1,3}[-*] .*", prose(page), re.M), page


def test_every_page_of_docs_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}\n" in menu, page.name
