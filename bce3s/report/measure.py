"""What a report measures itself: one pass of a run's network over a split, and a look at its classifier."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bce3s.checkpoint import require_same_data
from bce3s.evaluate import classifier_rows, evaluate
from bce3s.metrics import Accuracy, FeatureStatistics, confidence_kind
from bce3s.report.confusions import Predictions, most_confused, picture_pairs
from bce3s.report.cosine_blocks import cosine_pictures
from bce3s.report.findings import Measured, Note
from bce3s.train import TrainedNetwork, measure_with_geometry, moment_of, open_network, retrained_with, with_loader_for
from pipelines.format import ShardSet
from pipelines.loaders import build_loader
from pipelines.types import IntArray

Say = Callable[[Note], None]
OnStep = Callable[[int, int], None]


def measure(
    run: Path,
    *,
    shards: ShardSet,
    checkpoint: str | None = None,
    device: str = "auto",
    split: str = "",
    on_step: OnStep = lambda done, total: None,
    say: Say = lambda note: None,
) -> Measured:
    """Measures the network of a run, of a stage two as well.

    Args:
        run: its folder.
        shards: what it was trained on.
        checkpoint: "last" or "best"; None is whichever is the run's result.
        device: "auto", "cpu", "cuda" or "cuda:N".
        split: "val" or "test"; empty is test where there is one.
        on_step: told after each batch how many of how many are done.
        say: told what is left out, and why.

    Raises:
        CheckpointError: it has none, or all are damaged.
        ConfigError: the shards are others than the run's.
        ShardError: the split is missing or damaged.
        BackendError: the device cannot be used.
    """
    return measure_network(open_network(run, checkpoint, device), shards, split=split or report_split(shards), on_step=on_step, say=say)


def report_split(shards: ShardSet) -> str:
    """Test, or val where the data set has no test split."""
    return "test" if shards.num_samples("test") else "val"


def measure_network(
    network: TrainedNetwork, shards: ShardSet, *, split: str, on_step: OnStep = lambda done, total: None, say: Say = lambda note: None
) -> Measured:
    """As `measure`, of a network that is open already."""
    require_same_data(network.state, network.path, shards.dataset, shards.fingerprint, shards.root)
    began_s = time.perf_counter()
    config, counts_K, placement = with_loader_for(network.config, shards), network.class_counts_K, network.placement
    data = build_loader(shards, split, config.data, seed=config.seed, device=placement.device, training=False)
    predictions = Predictions()

    def evaluated(features: FeatureStatistics | None) -> dict[str, Accuracy]:
        nonlocal predictions
        predictions, done = Predictions(), 0  # anew: without room for the features there is a second pass

        def advance() -> None:
            nonlocal done
            done += 1
            on_step(done, data.num_steps)

        return evaluate(
            *(network.model, data, counts_K, config.data.augment, placement),
            confidence=confidence_kind(config.loss, retrained_with(network.state, network.run)),
            features=features,
            on_predictions=predictions.add,
            on_step=advance,
        )

    def leave_out(_: str) -> None:
        say(Note(section="features", sentence=f"Not measured: {placement.device} has no room for it; take --device cpu."))

    try:
        found, geometry = measure_with_geometry(evaluated, network.model, counts_K, placement.device, leave_out)
    finally:
        data.close()
    ids_N, predicted_N = predictions.collected()
    labels_N: IntArray = shards.split(split).labels_N[ids_N]
    confused, complaints = picture_pairs(most_confused(labels_N, predicted_N, ids_N, len(counts_K)), shards, split)
    for sentence in complaints:
        say(Note(section="confusions", sentence=sentence))
    classifier, accuracy = measure_classifier(network, shards), found["plain"]
    took_s = time.perf_counter() - began_s
    return replace(classifier, split=split, accuracy=accuracy, geometry=geometry, confused=confused, took_s=took_s)


def measure_classifier(network: TrainedNetwork, shards: ShardSet | None = None) -> Measured:
    """The classifier alone, which takes no image."""
    began_s = time.perf_counter()
    pictures = cosine_pictures(classifier_rows(network.model.classifier), network.class_counts_K)
    histogram, cosine_map = pictures or (None, None)
    return Measured(
        checkpoint=moment_of(network.state, network.path, shards),
        split="",
        accuracy=None,
        geometry=None,
        histogram=histogram,
        cosine_map=cosine_map,
        confused=(),
        took_s=time.perf_counter() - began_s,
    )
