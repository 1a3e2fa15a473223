"""Every shell block of the README and of docs/ does what it says, or says what it would need.

The blocks of one page run in their order in one shell of the small machine of tests/docs_world.py. A block that cannot run there carries a
mark in the line before it: `<!-- needs: a GPU -->`, `<!-- changes the system -->`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docs_world import ROOT, make_world, programs

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
QUICK = ("README.md", "docs/quickstart.md")
MARK = re.compile(r"<!-- (needs: \w.*|changes the system) -->")
BLOCK = re.compile(r"^(?P<before>[^\n]*)\n```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    line: int
    text: str
    is_marked: bool


def blocks_of(page: str) -> list[Block]:
    """The shell blocks of a page, from its top."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [Block(text.count("\n", 0, each.start()) + 3, each["text"], bool(MARK.fullmatch(each["before"].strip()))) for each in found]


def runnable(page: str) -> list[Block]:
    """Those that run here."""
    has_ffcv = find_spec("ffcv") is not None
    return [block for block in blocks_of(page) if not block.is_marked and (has_ffcv or "ffcv" not in block.text)]


WITH_BLOCKS = [pytest.param(page, marks=() if page in QUICK else pytest.mark.slow) for page in PAGES if runnable(page)]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Where a new user stands, and the environment there."""
    checkout = make_world(tmp_path)
    with programs(tmp_path) as environment:
        yield checkout, environment


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_of_a_page_run_as_they_are_written(page: str, shell: tuple[Path, dict[str, str]]) -> None:
    checkout, environment = shell
    script = "set -euo pipefail\n" + "".join(f"echo '== {page}:{block.line}' >&2\n{block.text}" for block in runnable(page))
    output = checkout.parent / "output"
    with output.open("wb") as file:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
        )
    said = output.read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, said[-6000:]


@pytest.mark.parametrize("page", PAGES)
def test_no_block_of_shell_hides_from_the_test(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^[ >]*(?:```|~~~) *(?:bash|sh|shell|console|zsh)\b", text, re.MULTILINE)
    assert len(fences) == len(blocks_of(page)), "shell stands in ```bash blocks at the margin"
    for block in blocks_of(page):
        syntax = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True, check=False)
        assert syntax.returncode == 0, f"{page}:{block.line}: {syntax.stderr}"
