"""Pages of the site that lie outside docs/, and links that hold on GitHub and in the site alike.

Every link in the sources is relative to its file in the repository. Here the pages of `OUTSIDE` join the site under their own paths,
and links are turned to where their targets are there; what has no page in the site, code say, stays as text. A line
`<!-- section of README.md: TITLE -->`, with the line below it that links there, becomes that section of the README.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("benchmarks/*.md", "benchmarks/reproduce/*.md", "shards/README.md", "CHANGELOG.md")
# The README's pages in the site: the home page says what it says, and its maps stand on a page of their own.
README_PAGES = {"": "index.md", "the-map-of-the-house": "architecture.md", "the-journey-of-a-jpeg": "architecture.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
SECTION = re.compile(r"<!-- section of README\.md: (.+?) -->\n[^\n]+")
CODE = re.compile(r"`[^`\n]+`")
CODE_BLOCK = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the README's sections in, and turns links that leave docs/."""
    del config
    markdown = SECTION.sub(lambda found: section_of_readme(found[1]), markdown)
    here = page.file.src_uri
    in_repository = here if (ROOT / here).is_file() else f"docs/{here}"

    def turned(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        place = site_path(normpath(join(dirname(in_repository), path)), anchor)
        if files.get_file_from_path(place) is None and Path(ROOT / normpath(join(dirname(in_repository), path))).exists():
            return text
        return f"{image}[{text}]({relpath(place, dirname(here) or '.')}{'#' + anchor if anchor else ''})"

    # Blocks of code are left as they are: every second part.
    parts = CODE_BLOCK.split(markdown)
    return "".join(part if number % 2 else CODE.sub(_without_escapes, LINK.sub(turned, part)) for number, part in enumerate(parts))


def _without_escapes(code: re.Match[str]) -> str:
    """Code in a table: GitHub wants `|` escaped there, the site would show the escape."""
    return code[0].replace(r"\|", "|")


def site_path(in_repository: str, anchor: str = "") -> str:
    """Where a file of the repository is in the site, were it in it."""
    if in_repository == "README.md":
        return README_PAGES.get(anchor, "index.md")
    return in_repository.removeprefix("docs/")


def section_of_readme(title: str) -> str:
    """What stands under a heading of the README, headings of the next level included."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section '## {title}', which a page of docs/ shows")
    return found[1].strip()
