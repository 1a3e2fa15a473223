"""A real headless Chromium, for tests of pages. It sees no network; what a page asks for beside its own file is recorded."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", "--force-color-profile=srgb"),
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'bce3s[dev]'")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page from disk, with what it asked for and what its console said."""

    page: Page
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False, **options: Any) -> Iterator[Opened]:
    """`path` as file://, in a fresh profile, offline.

    Args:
        browser: of `chromium`.
        path: of an HTML file.
        width, height: of the window, in CSS pixels.
        dark: what the reader's system prefers.
        options: more of Playwright's `new_context`.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", **options)
    try:
        context.set_offline(True)
        page = context.new_page()
        found = Opened(page)
        page.on("request", lambda request: found.requests.append(request.url))
        page.on("console", lambda message: found.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.console.append(f"error: {error}"))
        page.goto(path.resolve().as_uri())
        yield found
    finally:
        context.close()


def wait_until(page: Page, expression: str, timeout_s: float = 60.0) -> None:
    """Returns once JavaScript `expression` holds. Asked from outside: Playwright's own waiting needs a page that allows eval."""
    deadline_s = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < deadline_s, f"{expression} did not come true"
        time.sleep(0.02)
