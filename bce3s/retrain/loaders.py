"""The loaders of a stage two: the run's own, with the order that stage two needs."""

from __future__ import annotations

from dataclasses import replace

from bce3s.config import RetrainConfig, TrainConfig, parse_image_sizes
from bce3s.retrain.stage_one import StageOne
from bce3s.train.selection import resolve_selection
from pipelines.config import DataConfig, OrderConfig
from pipelines.loaders import PlannedLoader, build_loader

BALANCED_METHODS = ("crt", "lws")  # class-balanced sampling (Kang et al. 2020); "bce" takes each image once an epoch


def stage_two_order(method: str, batch_norm: str) -> OrderConfig:
    """Instances once an epoch; partners drawn class-balanced, or for features that are kept the same images augmented anew."""
    partner = "same" if batch_norm == "frozen" else "drawn"
    return OrderConfig(sampling="class-balanced" if method in BALANCED_METHODS else "instance", partner=partner)


def _training_data(config: TrainConfig, retrain: RetrainConfig) -> DataConfig:
    sizes = parse_image_sizes(config.image_sizes)
    kept = retrain.batch_norm == "frozen"
    return replace(
        config.data,
        image_size=sizes[max(sizes)] if sizes else config.data.image_size,  # images that grew go on at their last size
        batch_size=config.data.batch_size if kept else retrain.batch_size,
        order=stage_two_order(retrain.method, retrain.batch_norm),
    )


class StageLoaders:
    """Opened once each, when first asked for.

    Attributes:
        selection: where the best epoch is looked for, and where the result is measured. The result itself is the last epoch.
    """

    def __init__(self, stage_one: StageOne, retrain: RetrainConfig) -> None:
        """Opens nothing yet.

        Raises:
            ConfigError: neither test nor val images.
        """
        self._stage_one, self._retrain = stage_one, retrain
        self.selection = resolve_selection(replace(stage_one.config, select="last"), stage_one.shards)
        self._opened: dict[str, PlannedLoader] = {}

    def __getitem__(self, split: str) -> PlannedLoader:
        """The loader of a split; raises what `build_loader` raises."""
        if split not in self._opened:
            config, device = self._stage_one.config, self._stage_one.placement.device
            data = _training_data(config, self._retrain) if split == "train" else config.data
            self._opened[split] = build_loader(self._stage_one.shards, split, data, seed=config.seed, device=device)
        return self._opened[split]

    def close(self) -> None:
        """Frees all of them."""
        for loader in self._opened.values():
            loader.close()
