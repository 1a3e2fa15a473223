"""Figures of a report: what is drawn is what was found, for any number of classes and runs, on screen and in files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from bce3s.report.figures import FIGURE_NAMES, Figure, Missing, draw_figures
from bce3s.report.figures.accuracy_by_count import accuracy_by_count
from bce3s.report.figures.class_counts import class_counts
from bce3s.report.figures.classifier_cosines import classifier_cosines
from bce3s.report.figures.cosine_histogram import cosine_histogram
from bce3s.report.figures.features import features
from bce3s.report.figures.reliability import reliability
from bce3s.report.figures.training_accuracy import training_accuracy
from bce3s.report.figures.training_losses import training_losses
from bce3s.report.findings import CosineHistogram, RunFindings
from pipelines.types import ConfigError
from tests.bce3s.report.made_up import made_up, without_results


def drawn(figure: Figure | Missing) -> Figure:
    assert isinstance(figure, Figure)
    return figure


def records(figure: Figure, panel: int = 0) -> list[dict[str, Any]]:
    """All data of a panel's chart."""
    return [row for rows in figure.panels[panel].page_spec(legend=False)["datasets"].values() for row in rows]


def colour_domains(spec: Any) -> Iterator[list[str]]:
    if isinstance(spec, dict):
        scale = (spec.get("color") or {}).get("scale", {}) if isinstance(spec.get("color"), dict) else {}
        if scale.get("domain") and isinstance(scale["domain"][0], str):
            yield scale["domain"]
        for value in spec.values():
            yield from colour_domains(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from colour_domains(value)


@pytest.mark.parametrize(("num_classes", "num_runs"), [(2, 1), (10, 1), (100, 3)])
def test_all_figures_are_drawn_of_any_number_of_classes_and_runs(num_classes: int, num_runs: int) -> None:
    runs = [made_up(f"run {i}", num_classes, seed=i) for i in range(num_runs)]
    figures = draw_figures(runs)
    assert tuple(figures) == FIGURE_NAMES
    for figure in map(drawn, figures.values()):
        assert figure.findings
        assert all(sentence.endswith(".") for sentence in (*figure.findings, figure.caption))
        assert all(len(row) == len(figure.head) for row in figure.rows)
        assert figure.rows
        for panel in figure.panels:
            assert panel.page_spec(legend=True)["width"] == "container"
        # One run, one colour: the same in every figure.
        domains = {tuple(domain) for domain in colour_domains(figure.static_spec())}
        assert num_runs == 1 or domains <= {("run 0", "run 1", "run 2")}


def test_a_run_that_has_just_begun_has_sentences_instead() -> None:
    figures = draw_figures([without_results(made_up())])
    assert all(isinstance(figure, Missing) and figure.sentence.endswith(".") for figure in figures.values())


def test_points_are_the_classes_and_the_finding_says_how_accuracy_falls() -> None:
    run = replace(
        made_up(num_classes=4),
        class_names=("a", "b", "c", "d"),
        class_counts_K=(20, 5000, 0, 100),
        per_class_K=(10.0, 96.0, 50.0, None),
    )
    figure = drawn(accuracy_by_count([run]))
    points = [(row["class"], row["count"], row["accuracy"], row["group"]) for row in records(figure) if "class" in row]
    assert points == [("b", 5000, 96.0, "many"), ("a", 20, 10.0, "medium")]  # no count has no place on the axis, no accuracy no height
    assert figure.findings == ("Accuracy falls from 96 % at 5,000 training images to 10 % at 20.",)
    assert figure.rows == (("bce3s-s0", "b", 5000, "many", 96.0), ("bce3s-s0", "a", 20, "medium", 10.0))


def test_many_classes_become_few_circles_that_hold_them_all() -> None:
    run = made_up(num_classes=8142, measured=False)
    figure = drawn(accuracy_by_count([run]))
    circles = [row for row in records(figure) if "named" in row]
    assert len(circles) <= 1000
    assert sum(circle["classes"] for circle in circles) == 8142
    mean = np.average([circle["accuracy"] for circle in circles], weights=[circle["classes"] for circle in circles])
    assert mean == pytest.approx(np.mean(run.per_class_K), abs=0.01)
    largest = max(circles, key=lambda circle: circle["classes"])
    assert largest["named"].endswith(f"and {largest['classes'] - 5} more")
    assert len(drawn(class_counts([run])).rows) <= 400


def test_runs_of_two_data_sets_have_a_curve_each() -> None:
    other = replace(made_up("other", 4), dataset="imagenet-lt")
    figure = drawn(class_counts([made_up(), made_up("again", seed=1), other]))
    assert figure.legend == ("cifar10-lt (bce3s-s0 and again)", "imagenet-lt (other)")
    assert figure.findings[1].startswith("imagenet-lt (other): 4 classes of 5,000 down to 5 training images, an imbalance factor of 1,000")


def test_the_heat_map_leaves_out_a_class_with_itself_and_centres_its_colours_on_the_simplex() -> None:
    run = made_up(num_classes=10)
    assert run.measured is not None
    assert run.measured.cosine_map is not None
    figure = drawn(classifier_cosines([run]))
    spec = figure.panels[0].page_spec(legend=True)
    rows = [row for row in records(figure) if "cosine" in row]
    assert [len(row["cosine"]) for row in rows] == [9] * 10
    for row in rows:
        assert row["cosine"] == [round(run.measured.cosine_map.cells[row["i"]][j], 4) for j in row["j"]]
        assert row["i"] not in row["j"]
    scale = spec["encoding"]["color"]["scale"]
    assert scale["domainMid"] == pytest.approx(-1 / 9)
    farthest = max(abs(value + 1 / 9) for row in rows for value in row["cosine"])
    assert scale["domain"] == pytest.approx([max(-1, -1 / 9 - farthest), -1 / 9 + farthest], abs=1e-4)
    assert len(figure.rows) == 45


def test_histograms_of_different_bins_are_compared_by_density() -> None:
    def with_histogram(name: str, edges: tuple[float, ...], counts: tuple[int, ...]) -> RunFindings:
        run = made_up(name)
        assert run.measured is not None
        histogram = CosineHistogram(edges=edges, counts=counts, num_pairs=sum(counts), simplex=-0.1111)
        return replace(run, measured=replace(run.measured, histogram=histogram))

    narrow, wide = with_histogram("narrow", (-0.2, -0.1, 0.0), (30, 15)), with_histogram("wide", (-0.5, 0.5), (45,))
    figure = drawn(cosine_histogram([narrow, wide]))
    spec = figure.panels[0].page_spec(legend=False)
    assert "datum.share / (datum.stop - datum.start)" in str(spec)
    shares = {(row["run"], row["start"]): row["share"] for row in records(figure) if row.get("pairs")}
    assert shares == {("narrow", -0.2): pytest.approx(2 / 3), ("narrow", -0.1): pytest.approx(1 / 3), ("wide", -0.5): 1.0}
    # One run alone: the shares themselves.
    assert "density" not in str(drawn(cosine_histogram([narrow])).panels[0].page_spec(legend=False))


def test_features_of_classes_that_have_no_images_are_left_out() -> None:
    run = made_up(num_classes=10)
    assert run.measured is not None
    geometry = run.measured.geometry
    assert geometry is not None
    assert geometry.class_means is not None
    means = geometry.class_means.mean_K
    unseen = replace(
        geometry,
        compactness_K=(None, *geometry.compactness_K[1:]),
        nearest_K=(None, *geometry.nearest_K[1:]),
        class_means=replace(geometry.class_means, mean_K=means[1:]),
    )
    figure = drawn(features([replace(run, measured=replace(run.measured, geometry=unseen))]))
    assert figure.rows[0][2:] == (5000, None, None, None)
    assert [row[4] for row in figure.rows[1:]] == [round(1 - mean, 4) for mean in means[1:]]  # each still beside its own class


def test_reliability_says_which_way_the_network_errs() -> None:
    run = made_up()
    assert run.calibration is not None
    assert "too sure of itself" in drawn(reliability([run])).findings[0]
    assert len(drawn(reliability([run])).rows) == 12  # three of the fifteen bins are empty
    swapped = replace(run.calibration, bin_accuracy=run.calibration.bin_confidence, bin_confidence=run.calibration.bin_accuracy)
    assert "not sure enough" in drawn(reliability([replace(run, calibration=swapped)])).findings[0]


def test_a_single_evaluation_is_no_curve() -> None:
    run = made_up(epochs=4)
    once = replace(run, epochs=(*(replace(epoch, accuracies={}) for epoch in run.epochs[:-1]), run.epochs[-1]))
    figure = training_accuracy([once])
    assert isinstance(figure, Missing)
    assert figure.sentence.startswith("Evaluated once, after epoch 4: ")
    assert isinstance(training_accuracy([once, made_up("other")]), Figure)


def test_a_term_that_begins_after_a_warm_up_is_told_from_there() -> None:
    run = made_up(epochs=4)
    late = tuple(replace(each, terms={**each.terms, "contrastive": 20.0 - each.epoch}) for each in run.epochs[1:])
    (finding,) = drawn(training_losses([replace(run, epochs=(run.epochs[0], *late))])).findings
    assert "contrastive from 18 (epoch 2) to 16 and uniform" in finding


def test_a_file_holds_the_figure_on_white() -> None:
    picture = Image.open(io.BytesIO(drawn(accuracy_by_count([made_up()])).image("png"))).convert("RGB")
    assert min(picture.size) > 400
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert len(picture.getcolors(maxcolors=1 << 24) or []) > 10


def test_a_file_of_several_runs_has_a_legend() -> None:
    svg = ElementTree.fromstring(drawn(training_losses([made_up(), made_up("other", seed=1)])).image("svg"))
    words = [text.strip() for text in svg.itertext() if text.strip()]
    assert svg.tag.endswith("svg")
    assert words.count("other") == 1  # once for all panels
    assert {"total", "joint", "uniform"} <= set(words)


def test_no_other_format_is_written() -> None:
    with pytest.raises(ConfigError, match="png, svg"):
        drawn(draw_figures([made_up()])["throughput"]).image("pdf")
