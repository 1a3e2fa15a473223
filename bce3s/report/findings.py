"""What a report shows of a run, as data: read from its folder, and measured with its network. Figures and pages only draw this.

Accuracies are in percent, as in a run's summary; shares, confidences and cosines are plain numbers. None, or an empty tuple, is what is
not known: `RunFindings.notes` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bce3s.metrics import Accuracy, Calibration, FeatureGeometry

MEASURES = ("all", "many", "medium", "few", "balanced", "ece")
"""Keys of a measurement: accuracies by shot group, their mean over classes, and the expected calibration error, all in percent."""

SECTIONS = ("headline", "classes", "training", "throughput", "classifier", "features", "confusions", "calibration", "settings")
"""What a note can be about: the parts of a report."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that cannot be shown, and why.

    Args:
        section: of `SECTIONS`, where it is missing.
        sentence: one, with its full stop.
    """

    section: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """Means over the steps of one or, in a long log, of several lines.

    Args:
        epoch: epochs done at the last of these steps, such as 2.35.
        terms: of the loss, "total" among them.
        images_per_s: source images.
        views_per_s: views that went through the network; None in logs that do not say.
        data_wait_share: of the time, in [0, 1].
        device_memory_bytes: None on a CPU, and in logs that do not say.
    """

    epoch: float
    terms: dict[str, float]
    images_per_s: float
    views_per_s: float | None
    data_wait_share: float
    device_memory_bytes: float | None


@dataclass(frozen=True, kw_only=True)
class EpochPoint:
    """One epoch's end.

    Args:
        epoch: epochs done, from 1.
        split: that accuracies are of.
        accuracies: by `MEASURES`; empty where this epoch was not evaluated, None for an empty group.
        terms, images_per_s, data_wait_share: means over the epoch.
        train_s: without the evaluation.
    """

    epoch: int
    split: str
    accuracies: dict[str, float | None]
    terms: dict[str, float]
    images_per_s: float
    data_wait_share: float
    train_s: float


@dataclass(frozen=True, kw_only=True)
class CosineHistogram:
    """Cosines of all K(K−1)/2 pairs of classifier rows.

    Args:
        edges: M + 1 bounds of the bins, equally wide, ascending within [−1, 1]: as far as there are pairs, and the simplex. Those of
            another run may have another width.
        counts: pairs in each of the M bins; the last has its upper bound.
        num_pairs: their sum.
        simplex: −1/(K−1), where all would lie that are as far apart as can be.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    num_pairs: int
    simplex: float


@dataclass(frozen=True, kw_only=True)
class CosineMap:
    """Cosines of classifier rows, classes from head to tail, averaged over blocks where there are more classes than cells.

    Args:
        cells: [G][G], symmetric. A cell of one class with itself is 1; larger cells on the diagonal leave a class with itself out.
        cell_classes: [G], the classes of each cell, most training images first.
    """

    cells: tuple[tuple[float, ...], ...]
    cell_classes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small picture.

    Args:
        jpeg: its file.
        width_px, height_px: its sides.
        alt: what it is, in words.
    """

    jpeg: bytes
    width_px: int
    height_px: int
    alt: str


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Images of one class that were taken for another.

    Args:
        true_class, predicted_class: their labels.
        count: images of the true class that were predicted as the other.
        share: of all images of the true class in the split, in (0, 1].
        mistaken: up to three of these images.
        example: a training image of the predicted class; None where it cannot be shown.
    """

    true_class: int
    predicted_class: int
    count: int
    share: float
    mistaken: tuple[Thumbnail, ...]
    example: Thumbnail | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run's network shows: its classifier, and what one pass over a split found, without test-time augmentation.

    Where the shards are gone there is no pass: only the classifier's pictures are there then, and `notes` say why.

    Args:
        checkpoint: whose weights, in words: "last epoch (20)", "best epoch on val (7)", "last checkpoint (step 12 of epoch 4)".
        split: of the pass; empty without one.
        accuracy: of the pass; it equals the summary's where the run is whole. None without a pass.
        geometry: compactness, separability and neural collapse; None without a pass, or where the device has no room for it.
        histogram, cosine_map: of the classifier's rows; None for fewer than two classes, or rows that are not finite.
        confused: the most frequent mistakes, most first; empty without a pass, or without a mistake.
        took_s: of the whole measurement.
    """

    checkpoint: str
    split: str
    accuracy: Accuracy | None
    geometry: FeatureGeometry | None
    histogram: CosineHistogram | None
    cosine_map: CosineMap | None
    confused: tuple[ConfusedPair, ...]
    took_s: float


@dataclass(frozen=True, kw_only=True)
class RunFindings:
    """One run.

    Args:
        name: a short label, unlike those of the other runs of a report.
        folder: of the run.
        title: method, network, data set, and of a stage two what it was retrained with.
        dataset, method, arch: as its config names them; `method` is the loss of stage one.
        retrained_with: method of a stage two; empty for a stage one.
        stage: 1 or 2.
        seed: of the run.
        complete: it came to its end and has a summary.
        split: that its result is measured on.
        headline: which of `measurements` is its result; empty where there is none yet.
        selected_by: "all on val", where the headline's epoch was selected; None for the last epoch.
        measurements: by label as in the summary ("last_epoch_no_tta", the headline first) → `MEASURES`, in percent; None for an empty
            group. Of a run without summary, what `measured` found, under "measured_no_tta".
        measurement_epochs: label → epoch, from 1, of those measurements whose epoch was selected.
        num_images: evaluated for the headline; None where it is not known.
        class_names: K names; empty where neither shards nor checkpoint are there.
        class_counts_K: training images of the K classes; empty alike.
        imbalance_factor: largest over smallest of them that has images.
        per_class_K: accuracy of the headline; None for a class without images, empty where it is not known.
        calibration: the reliability diagram: of `measured` where there is one, else of the headline; None in older runs that were not
            measured.
        features: geometry by shot group, `bce3s.metrics.FeatureGeometry.figures()`: of `measured` where there is one, else of the summary.
        steps: at most 1,000 points.
        epochs: one an epoch.
        loss_floors: by term, the least it can be.
        config, environment: as recorded; a setting's value may be a nested dict.
        command: that trains the run, for a shell.
        measured: with its network; None where there was none, or it was not asked for.
        notes: on everything that cannot be shown.
    """

    name: str
    folder: Path
    title: str
    dataset: str
    method: str
    arch: str
    retrained_with: str
    stage: int
    seed: int
    complete: bool
    split: str
    headline: str
    selected_by: str | None
    measurements: dict[str, dict[str, float | None]]
    measurement_epochs: dict[str, int]
    num_images: int | None
    class_names: tuple[str, ...]
    class_counts_K: tuple[int, ...]
    imbalance_factor: float | None
    per_class_K: tuple[float | None, ...]
    calibration: Calibration | None
    features: dict[str, Any] | None
    steps: tuple[StepPoint, ...]
    epochs: tuple[EpochPoint, ...]
    loss_floors: dict[str, float]
    config: dict[str, Any]
    environment: dict[str, Any]
    command: str
    measured: Measured | None
    notes: tuple[Note, ...]


@dataclass(frozen=True, kw_only=True)
class SeedsFinding:
    """Mean and standard deviation over the runs of one seeds folder.

    Args:
        folder: that holds seeds.json.
        runs: names of its runs in the report.
        figures: what seeds.json says (`bce3s.seeds.combine`): "figures" → measurement → measure → {"mean", "sd"}.
        sentence: the headline in words, "all 43.53 ± 0.42 %, … (n = 3)".
    """

    folder: Path
    runs: tuple[str, ...]
    figures: dict[str, Any]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that one report shows: `bce3s.report.read.read_findings` makes it.

    Args:
        runs: in the order they were named; those of a seeds folder by seed.
        seeds: of each seeds folder that was named.
    """

    runs: tuple[RunFindings, ...]
    seeds: tuple[SeedsFinding, ...]
