"""The documentation holds together: pages, links, options, the drawing of the floors; and the site asks nobody for anything."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bce3s.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
# Options of torchrun, srun and sbatch, and those that typer gives every program.
THEIRS = {
    *("help", "version", "install-completion", "show-completion"),
    *("standalone", "nnodes", "node-rank", "nproc-per-node", "master-addr", "master-port", "max-restarts"),
    *("array", "cpus-per-task", "gpus-per-node", "gpus-per-task", "kill-on-bad-exit", "nodes", "ntasks-per-node", "time"),
}
SOURCES = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("bce3s", "tools", "benchmarks", "docs/slurm")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", ".sbatch")
)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\nmarkdown_extensions:")[0]
    listed = re.findall(r": (\S+\.md)$", menu, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {str(page.relative_to("docs")) for page in PAGES} <= set(listed)
    for name in listed:
        assert (ROOT / "docs" / name).is_file() or (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere_on_github_too(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page.parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_option_and_recipe_it_shows_exists(page: Path) -> None:
    text = re.sub(r"^```diff.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    for flag in set(re.findall(r"(?<=[\s`(])--([a-z][a-z-]*[a-z])", text)) - THEIRS:
        assert f'"--{flag}' in SOURCES or re.search(rf"\b{flag.replace('-', '_')}: ", SOURCES), f"{page}: --{flag}"
    for recipe in re.findall(r"\b[a-z0-9]+_[a-z0-9]+_\d+ep\b", text):
        assert recipe in RECIPES, f"{page}: {recipe}"


def test_the_floors_are_drawn_as_they_are() -> None:
    specification = importlib.util.spec_from_file_location("draw_floors", ROOT / "docs" / "figures" / "draw_floors.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    drawn = (ROOT / "docs" / "figures" / "floors.svg").read_text(encoding="utf-8")
    assert module.draw() == drawn, "the floors have changed: python docs/figures/draw_floors.py"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nobody_else(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        asked = re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(https?:[^\"]+)", page.read_text(encoding="utf-8"))
        assert not asked, f"{page.name} loads {asked}"
    equations = (tmp_path / "site" / "bce3s.html").read_text(encoding="utf-8")
    assert equations.count('<svg role="img"') == TEXTS[Path("docs/bce3s.md")].count("```math")
    benchmark = (tmp_path / "site" / "benchmarks" / "loaders.html").read_text(encoding="utf-8")
    assert 'src="../figures/profile_cpu_resnet18.png"' in benchmark


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["[there](nowhere.md)", "[there](methods.md#no-such-heading)", "[there](../benchmarks/none.md)"])
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path, fault: str) -> None:
    pytest.importorskip("mkdocs")
    for name in ("docs", "benchmarks", "shards", "mkdocs.yml", "README.md", "CHANGELOG.md", "pipelines", "bce3s"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.tar", "__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "faq.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{fault}\n")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    built = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode != 0
    assert "faq.md" in built.stdout + built.stderr
