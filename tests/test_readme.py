"""The README's commands, names and paths exist; what it shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bce3s.losses import LOSSES
from bce3s.recipes import RECIPES
from pipelines.datasets import DATASETS
from pipelines.loaders import LOADERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_screen_holds_the_two_commands_and_the_figure() -> None:
    first_screen = "\n".join(README.splitlines()[:20])
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target} " in first_screen
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"!\[[^]]{20,}\]\([^)]+\)", first_screen), "the figure, with a description"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_every_local_link_leads_somewhere(link: str) -> None:
    assert link.startswith("http") or (ROOT / link).exists()


@pytest.mark.parametrize("name", [*DATASETS, *LOADERS, *LOSSES])
def test_every_data_set_loader_and_loss_is_named(name: str) -> None:
    assert name in README


def test_every_flag_and_recipe_it_shows_exists() -> None:
    sources = "".join(path.read_text() for path in (*(ROOT / "bce3s").rglob("c*.py"), *(ROOT / "tools").glob("*.py")))
    ours = re.sub(r"torchrun .*? -m", "", README)  # what stands between is torchrun's
    for flag in set(re.findall(r"(?<=\s)--([a-z][a-z-]+)", ours)):
        assert flag.replace("-", "_") in sources or f"--{flag}" in sources, flag
    for recipe in re.findall(r"\b[a-z0-9]+_[a-z0-9]+_\d+ep\b", README):
        assert recipe in RECIPES


def test_every_file_on_the_map_exists_and_every_file_is_on_it() -> None:
    house = README.split("## The map of the house")[1].split("```")[1]
    for package in ("pipelines", "bce3s"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                folder = path.parent.name if path.parent.name != package else ""
                assert path.stem in house or (folder and f"{folder}/" in house), f"{path.relative_to(ROOT)} is not on the README's map"


def test_no_blank_was_left() -> None:
    assert not re.search(r"@@|TODO|\b[A-Z]+_(TABLE|CAPTION)\b", README), "a blank was left in the README"
