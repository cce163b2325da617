"""README.md and docs/: code blocks run as printed and give the printed output; links lead somewhere."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from tests.docs import CODE, OTHER, ROOT, Session, blocks, pages

PAGES = [str(page.relative_to(ROOT)) for page in pages()]
# What a run decides, not the code: speeds and memory of eval's table, seconds, versions.
_MEASURED = ("tokens/s", "peak MiB", "load s")
_VOLATILE = re.compile(r"\d+(\.\d+)? s\b|\d+\.\d+\.\d+\S*|\b[0-9a-f]{16,64}\b|─+")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_as_printed(page: str, tmp_path: Path) -> None:
    session = Session(tmp_path)
    for block in blocks(ROOT / page):
        found = session.run(block)
        assert same(block.body, found), f"{block.place}: `make docs` writes the output anew; now it is\n" + (
            "\n".join(found)
        )


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(ROOT / page):
        assert block.language in (*CODE, *OTHER), f"{block.place}: name the language of the block"
        if block.language in OTHER and block.mark != "not run":
            commands = [line for line in block.body if re.match(r"\$ |loadstone [a-z]|python ", line)]
            assert not commands, f"{block.place}: a command in a {block.language} block is never run"
        if block.mark == "not run":
            assert block.value, f"{block.place}: say why it is not run"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    source = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", source.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (source.parent / file).resolve() if file else source
        assert path.exists(), f"{page}: there is no {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {path.name} has no heading #{anchor}"
    for named in re.findall(r"`((?:src|tests|recipes)/[\w./-]*)", source.read_text(encoding="utf-8")):
        assert list(ROOT.glob(f"{named}*")), f"{page}: there is no {named}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def same(printed: list[str], found: list[str]) -> bool:
    """Whether two outputs say the same: words equal, figures within 5 %, and what each run measures left out."""
    return len(printed) == len(found) and all(
        _same_line(*pair) for pair in zip(_without_speeds(printed), _without_speeds(found), strict=True)
    )


def _same_line(printed: str, found: str) -> bool:
    one, other = (_VOLATILE.sub("", line) for line in (printed, found))
    if _NUMBER.sub("", one).split() != _NUMBER.sub("", other).split():
        return False
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(math.isclose(_value(a), _value(b), rel_tol=0.05, abs_tol=2e-3) for a, b in pairs)


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def _without_speeds(lines: list[str]) -> list[str]:
    """Rows of eval's table cut where the measured columns begin."""
    found: list[str] = []
    width: int | None = None
    for line in lines:
        starts = [line.find(name) for name in _MEASURED if name in line]
        if starts:
            width = len(line[: min(starts)].rstrip())
        elif not line.strip():
            width = None
        found.append(line if width is None else line[:width])
    return found


def test_the_comparison_sees_what_is_stale() -> None:
    printed = [" model    loss   tokens/s", " w4     2.1862       4000", "", "w4: 3 files, 1.1 s"]
    assert same(printed, [" model    loss   tokens/s", " w4     2.1870        123", "", "w4: 3 files, 9.0 s"])
    assert not same(printed, [*printed[:1], " w4     2.6862       4000", *printed[2:]])
    assert not same(printed, [*printed[:3], "w8: 3 files, 1.1 s"])
    assert not same(printed, printed[:3])
