"""The page of a report in a real Chromium, opened from disk with the network shut off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bce3s.report.figures import THEMES, draw_figures
from bce3s.report.findings import SECTIONS
from bce3s.report.page import render_page
from tests.bce3s.report.made_up import HOSTILE, findings, made_up
from tests.browser import Opened, chromium, opened, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_DRAWN = "document.documentElement.dataset.drawn"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of runs → a page of them."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {}
    for count in (1, 3):
        found = findings(*(made_up(f"run-with-a-long-name-{i}", seed=i) for i in range(count)))
        paths[count] = folder / f"{count}.html"
        paths[count].write_text(render_page(found, draw_figures(found.runs)), encoding="utf-8")
    return paths


def wait_until_drawn(page: Page) -> None:
    wait_until(page, _DRAWN)


def overflow_px(page: Page) -> int:
    width: int = page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
    return width


def assert_quiet(found: Opened, path: Path) -> None:
    """It asked for nothing but itself, and had nothing to complain of."""
    assert [url.partition("#")[0] for url in found.requests] == [path.resolve().as_uri()]
    assert found.console == []


@pytest.fixture(scope="module")
def wide(browser: Browser, pages: dict[int, Path]) -> Iterator[Opened]:
    with opened(browser, pages[1], width=1600) as found:
        wait_until_drawn(found.page)
        yield found


def test_everything_is_drawn_without_a_request_or_a_complaint(wide: Opened, pages: dict[int, Path]) -> None:
    page = wide.page
    assert page.locator("section").evaluate_all("all => all.map(one => one.id)") == list(SECTIONS)
    charts = page.locator(".chart")
    assert charts.count() >= 12
    drawn = charts.evaluate_all("all => all.map(one => one.querySelectorAll('svg, canvas').length)")
    assert drawn == [1] * charts.count()
    sizes = charts.evaluate_all("all => all.map(one => one.querySelector('svg, canvas').getBoundingClientRect().width)")
    assert min(sizes) > 250
    assert page.locator("img").evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0 && one.alt)")
    assert overflow_px(page) <= 0
    assert_quiet(wide, pages[1])


def test_hovering_over_a_point_names_its_class(wide: Opened) -> None:
    page = wide.page
    points = page.locator("#accuracy-by-count-0 .mark-symbol path")
    assert points.count() == 10
    points.nth(0).scroll_into_view_if_needed()
    points.nth(0).hover()
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    text = tooltip.inner_text()
    assert HOSTILE in text  # the largest class has a hostile name, which is text
    assert re.search(r"training images:?\s+5,000", text)
    assert re.search(r"accuracy, %:?\s+\d", text)
    points.nth(4).hover()
    wait_until(page, "document.getElementById('vg-tooltip-element').innerText.includes('class 4')")
    assert page.locator("script").count() == 5


def test_every_chart_has_a_label_and_its_numbers_unfold(wide: Opened) -> None:
    page = wide.page
    labels = page.locator(".chart").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert all(label and len(label) > 40 for label in labels)
    numbers = page.locator("#accuracy-by-count details")
    assert not numbers.locator("table").is_visible()
    numbers.locator("summary").press("Enter")
    assert numbers.locator("table").is_visible()
    assert numbers.locator("tbody tr").count() == 10


def test_the_command_can_be_copied_or_at_least_selected(wide: Opened) -> None:
    page = wide.page
    page.locator("button.copy").first.click()
    wait_until(page, "document.getElementById('said').textContent !== ''")
    if "selected" in (page.locator("#said").text_content() or ""):
        assert page.evaluate("getSelection().toString()").startswith("bce3s fast-train")


def test_the_keyboard_reaches_the_figures_the_theme_and_the_sections(browser: Browser, pages: dict[int, Path]) -> None:
    with opened(browser, pages[1]) as found:
        reached = []
        for _ in range(3 + len(SECTIONS)):
            found.page.keyboard.press("Tab")
            reached.append(found.page.evaluate("document.activeElement.id || document.activeElement.getAttribute('href')"))
        assert reached[:2] == ["#main", "theme"]
        assert [name for name in SECTIONS if f"#{name}" in reached] == list(SECTIONS)
        outline = found.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


def test_on_a_phone_nothing_is_cut_off_and_a_button_changes_the_colours(browser: Browser, pages: dict[int, Path]) -> None:
    with opened(browser, pages[3], width=400, height=800) as found:
        page = found.page
        wait_until_drawn(page)
        assert overflow_px(page) <= 0
        edges = page.locator(".chart").evaluate_all("all => all.map(one => one.querySelector('svg, canvas').getBoundingClientRect().right)")
        assert max(edges) <= 400
        before, ink = _bar_colours(page), page.evaluate("getComputedStyle(document.body).color")
        assert len(set(before)) == 3  # three runs
        page.locator("#theme").press("Enter")
        wait_until(page, f"{_DRAWN} === 'dark'")
        after = _bar_colours(page)
        assert len(set(after)) == 3
        assert not set(before) & set(after)
        assert ink != page.evaluate("getComputedStyle(document.body).color")
        page.reload()  # what was chosen is kept
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert found.console == []


def test_a_reader_who_prefers_dark_gets_dark(browser: Browser, pages: dict[int, Path]) -> None:
    with opened(browser, pages[1], width=400, dark=True) as found:
        wait_until_drawn(found.page)
        assert found.page.evaluate(_DRAWN) == "dark"
        assert overflow_px(found.page) <= 0
        assert set(_bar_colours(found.page)) == {THEMES["dark"].series[0]}
        assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


def _bar_colours(page: Page) -> list[Any]:
    colours: list[Any] = page.locator("#accuracy-by-group-0 .mark-rect path").evaluate_all(
        "all => all.map(one => one.getAttribute('fill'))"
    )
    return colours


@pytest.mark.parametrize("dark", [False, True])
def test_body_text_has_contrast(wide: Opened, dark: bool) -> None:
    """As the browser computes it, on every element that holds text of its own."""
    page = wide.page
    page.evaluate(f"document.documentElement.dataset.theme = '{'dark' if dark else 'light'}'")
    faint = page.evaluate(
        """() => {
        const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
            .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const paper = (element) => {
            for (let at = element; at; at = at.parentElement) {
                const colour = parts(getComputedStyle(at).backgroundColor);
                if (colour.length < 4 || colour[3] > 0) return colour;
            }
            return [255, 255, 255];
        };
        const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        return [...document.querySelectorAll("body *:not(script):not(svg *)")].filter(own).filter((element) => {
            const [high, low] = [luminance(parts(getComputedStyle(element).color)), luminance(paper(element))].sort((a, b) => b - a);
            return (high + 0.05) / (low + 0.05) < 4.5;
        }).map((element) => element.outerHTML.slice(0, 80));
    }"""
    )
    assert faint == []
