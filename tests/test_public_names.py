"""What others may build on: a name that leaves one of these lists, or enters it, does so on purpose."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

PUBLIC = {
    "bce3s": "__version__",
    "bce3s.config": """
        CLASSIFIERS OPTIMIZERS RETRAIN_METHODS CheckpointConfig Interval LossConfig ModelConfig OptimizerConfig RetrainConfig TrainConfig
        by_path from_dict override parse_image_sizes parse_interval to_json
    """,
    "bce3s.losses": """
        LOSSES BCE3SLoss Heads Loss LossDefaults LossInputs LossOutput MixedTargets Phase Share StandaloneLoss build_loss loss_class
        resolve_method
    """,
    "bce3s.metrics": """
        Accuracy Calibration Collapse FeatureGeometry FeatureStatistics PairwiseCosines ReliabilityBins accuracy_from_counts
        accuracy_from_predictions confidence_kind format_percent neural_collapse pairwise_cosines
    """,
    "bce3s.models": """
        ARCHS ArchEntry Backbone CosineClassifier FeatureMemory LinearClassifier NormalizedClassifier Projector Recogniser build_backbone
        build_classifier build_recogniser load_pretrained
    """,
    "bce3s.train": """
        BEST_CHECKPOINT SPOKEN Cursor RunResult StoppedError Telling TrainedNetwork Trainer TrainingError average_applied build_model
        checkpoint_of_result load_last load_run load_trained measure_with_geometry moment_of newest_checkpoint open_network
        require_same_record retrained_with saved_loader shards_of summary with_loader_for
    """,
    "pipelines.augment": "channel_statistics mix_views normalise",
    "pipelines.conversion": """
        EXECUTORS FORMATS RESAMPLINGS Estimate ExecutorOptions Resampling WriteOptions WriteReport estimate_work merge_parts write_shards
    """,
    "pipelines.datasets": """
        DATASETS SUBSETS DatasetEntry DatasetOptions class_counts exponential_counts open_dataset select_subset shot_groups
        stratified_split
    """,
    "pipelines.format": "FORMAT_NAME FORMAT_VERSION INDEX_DTYPE PixelOptions ShardSet ShardSplit open_shards",
    "pipelines.loaders": "LOADERS MADE_UP_PIXELS DataConfig LoaderChoice PlannedLoader build_loader choose_loader",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module: str) -> None:
    found = import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    assert len(set(found.__all__)) == len(found.__all__)
    missing = [name for name in found.__all__ if not hasattr(found, name)]
    assert not missing


@pytest.mark.parametrize("module", PUBLIC)
def test_a_name_that_is_not_there_is_an_attribute_error(module: str) -> None:
    assert not hasattr(import_module(module), "absent_name")


def test_the_packages_names_load_no_network_until_one_is_asked_for() -> None:
    light = ("bce3s", "bce3s.config", "pipelines.augment", "pipelines.datasets", "pipelines.format")
    program = f"import sys, {', '.join(light)}; print([name for name in ('torch', 'timm', 'onnx', 'altair') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
