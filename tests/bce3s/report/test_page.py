"""The page of a report as a file: whole, safe and complete; and the command that writes it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bce3s.report.command import report
from bce3s.report.figures import THEMES, draw_figures
from bce3s.report.findings import SECTIONS, Findings, Note, SeedsFinding
from bce3s.report.page import render_page
from bce3s.report.tables import headline_label, headline_table, settings_table
from pipelines.types import BackendError, ConfigError, UserError
from tests.bce3s.report.made_up import HOSTILE, findings, made_up, without_results


class Elements(HTMLParser):
    """Every element with its attributes and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._inside, []).append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(found: Findings) -> str:
    return render_page(found, draw_figures(found.runs))


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(findings(made_up()))


def test_sections_come_in_order_and_each_is_named_and_reached(page: str) -> None:
    elements = Elements(page)
    assert [section["id"] for section in elements.named("section")] == list(SECTIONS)
    assert len(elements.named("h1")) == 1
    assert len(elements.named("h2")) == len(SECTIONS)
    links = [link["href"] for link in elements.named("a")]
    ids = {attributes.get("id") for _, attributes in elements.elements}
    assert links == ["#main", *(f"#{name}" for name in SECTIONS)]
    assert {link[1:] for link in links if link} <= ids


def test_every_chart_has_words_and_a_table_and_every_picture_an_alt(page: str) -> None:
    elements = Elements(page)
    charts = [attributes for attributes in elements.named("div") if attributes.get("class") == "chart"]
    assert len(charts) >= 10
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 40 for chart in charts)
    assert len(elements.named("figure")) == len(elements.named("figcaption")) == 10
    assert len(elements.named("table")) >= 10
    assert len(elements.named("img")) == 2
    assert all(picture["alt"] and (picture["src"] or "").startswith("data:image/jpeg;base64,") for picture in elements.named("img"))


def test_nothing_is_loaded_from_elsewhere_and_no_name_becomes_code(page: str) -> None:
    elements = Elements(page)
    sources = [value for _, attributes in elements.elements for name, value in attributes.items() if name in ("src", "href", "srcset")]
    assert all(value is not None and value.startswith(("#", "data:image/jpeg")) for value in sources)
    assert not elements.named("link")
    assert len(elements.named("script")) == 5  # the theme, two of data, the drawing library, the page
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert") >= 5  # and it is there, as text
    assert not [name for _, attributes in elements.elements for name in attributes if name.startswith("on")]
    policy = next(meta["content"] for meta in elements.named("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "eval" not in policy


def test_what_is_missing_is_said_in_its_section() -> None:
    elements = Elements(page_of(findings(without_results(made_up()))))
    words = " ".join(elements.texts["p"])
    assert "It has no result yet." in words
    assert "No run of this page has been evaluated yet." in words
    assert "The mistakes of the network were not measured." in words
    assert "No command can be given." in words
    assert not elements.named("figure")


def test_several_runs_stand_beside_each_other() -> None:
    first, second = made_up(), replace(made_up("other", seed=1), notes=(Note(section="features", sentence="other has no features."),))
    found = Findings(
        runs=(first, second), seeds=(SeedsFinding(folder=Path("runs/seeds"), runs=("a",), figures={}, sentence="all 43 ± 1."),)
    )
    elements = Elements(page_of(found))
    words = " ".join(text for texts in elements.texts.values() for text in texts)
    assert "2 runs on cifar10-lt" in words
    assert "all 43 ± 1." in words
    differing = settings_table([first, second], only_differing=True)
    assert [row.cells for row in differing.rows] == [("seed", "0", "1")]
    notes = [text for text in elements.texts["p"] if "other has no features" in text]
    assert notes == ["other has no features."]  # not with the run's name before its name


def test_results_are_labelled_with_how_they_were_measured() -> None:
    run = made_up()
    assert headline_label(run) == "last epoch, no TTA, test split, 500 images"
    selected = replace(run, headline="best_on_test_no_tta", selected_by="all on val")
    assert headline_label(selected) == "best on test, no TTA (epoch 5), selected by all on val, test split, 500 images"
    table = headline_table([run])
    assert [(row.cells[1], row.strong) for row in table.rows] == [
        ("last epoch, no TTA", True),
        ("last epoch, flip TTA", False),
        ("best on test, no TTA (epoch 5)", False),
    ]
    empty = replace(run, measurements={"last_epoch_no_tta": {**run.measurements["last_epoch_no_tta"], "few": None, "ece": None}})
    assert headline_table([empty]).rows[0].cells[5:] == ("n/a", f"{run.measurements['last_epoch_no_tta']['balanced']:.2f}", "–")


def test_a_page_of_8142_classes_stays_small() -> None:
    found = findings(made_up(num_classes=8142, measured=False, epochs=100))
    assert len(page_of(found).encode()) < 3 << 20


def contrast(first: str, second: str) -> float:
    """Of two colours #rrggbb (WCAG 2.1, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_can_be_read_and_curves_be_seen(name: str) -> None:
    theme = THEMES[name]
    assert all(contrast(ink, paper) >= 4.5 for ink in (theme.text, theme.muted, theme.accent) for paper in (theme.background, theme.panel))
    assert all(contrast(colour, theme.background) >= 3 for colour in theme.series)
    assert len(set(theme.series)) == len(theme.series)


def test_twelve_runs_have_twelve_colours_and_a_note_that_all_share_is_said_once() -> None:
    note = Note(section="calibration", sentence="Calibration was not recorded, and it was not measured.")
    page = page_of(findings(*(replace(made_up(f"run-{i}", epochs=2, measured=False), notes=(note,)) for i in range(12))))
    legend = page.split('<ul class="legend"')[1].split("</ul>")[0]
    assert len(set(re.findall(r"var\(--series-\d+\)", legend))) == 12
    assert page.count(note.sentence) == 1
    assert f"<strong>{', '.join(f'run-{i}' for i in range(12))}:</strong> {note.sentence}" in page


def test_a_page_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"report.html is there already; add --overwrite"):
        report([tmp_path], out=out)
    assert out.read_text() == "mine"
    with pytest.raises(ConfigError, match="is a folder; name the page in it"):
        report([tmp_path], out=tmp_path)
    with pytest.raises(ConfigError, match="make the folder"):
        report([tmp_path], out=tmp_path / "no" / "report.html")
    with pytest.raises(UserError, match="is not a run folder"):
        report([tmp_path], out=out, overwrite=True)
    assert out.read_text() == "mine"


def test_without_the_extra_the_line_that_installs_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(BackendError, match=r"needs vl_convert; run pip install 'bce3s\[report\]'"):
        report([tmp_path], out=tmp_path / "report.html")
