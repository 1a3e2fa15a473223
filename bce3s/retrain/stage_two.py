"""Stage two from the loaded run to the written result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bce3s.config import RetrainConfig, TrainConfig
from bce3s.evaluate import evaluate
from bce3s.metrics import Accuracy, FeatureStatistics, confidence_kind, format_percent
from bce3s.progress import is_live
from bce3s.retrain.class_balanced import ClassBalancedBCE, CrossEntropy, StageTwoLoss
from bce3s.retrain.classifiers import start_retraining
from bce3s.retrain.features import FrozenBackbone, accuracy_on, affordable_epochs, evaluation_features, training_features
from bce3s.retrain.feeds import Feed, KeptFeatures, RunningBackbone
from bce3s.retrain.loaders import BALANCED_METHODS, StageLoaders
from bce3s.retrain.record import write_stage_two
from bce3s.retrain.stage_one import StageOne
from bce3s.retrain.steps import ClassifierSteps
from bce3s.train import SPOKEN, Cursor, RunResult, Telling, TrainingError, measure_with_geometry, summary
from pipelines.config import OrderConfig
from pipelines.order import SampleOrder


class StageTwo:
    """One stage two in one process.

    Its epochs continue stage one's: order, augmentation and class subsets are those of epoch `config.epochs` on, so none is drawn twice.

    Attributes:
        stage_one: where it starts.
        config: of the result, with what "auto" and 0 stand for filled in.
    """

    def __init__(
        self,
        stage_one: StageOne,
        retrain: RetrainConfig,
        console: Console,
        check: Callable[[], None] = lambda: None,
        telling: Telling = SPOKEN,
    ) -> None:
        """Prepares the classifier; opens no data yet.

        Args:
            stage_one: loaded; its network is changed in place, and its config's seed is that of all draws.
            retrain: what to do.
            console: what a person sees.
            check: called before each batch; may raise to stop, and nothing is left behind.
            telling: quiet or not, and the command for its record.

        Raises:
            ConfigError: the method does not fit the classifier, or there is nothing to evaluate on.
        """
        config, self.stage_one, self._telling = stage_one.config, stage_one, telling
        self._retrain = retrain.resolved()
        self._console, self._check, self._placement, self._model = console, check, stage_one.placement, stage_one.model
        self._retraining = start_retraining(self._model.classifier, config.model, self._retrain, config.seed)
        self._loaders = StageLoaders(self.stage_one, self._retrain)
        self._train_counts_K = stage_one.shards.class_counts("train")
        self._first_epoch = config.epochs
        self._kept_evaluation: tuple[Tensor, Tensor] | None = None
        self._lines: list[dict[str, Any]] = []
        self._best: tuple[float, int, dict[str, Tensor]] = (-1.0, -1, {})
        self._features_s = 0.0
        self.config: TrainConfig = replace(
            config, select="last", retrain=self._retrain, model=replace(config.model, classifier=self._retraining.kind)
        )

    def run(self, out: Path) -> RunResult:
        """Trains, evaluates and writes the run folder `out`.

        Raises:
            TrainingError: a loss that is not finite, or no device memory.
            UserError: damaged shards, or a disk that cannot be written.
        """
        began_s = time.perf_counter()
        try:
            steps = self._train() if self._retrain.method != "tau-norm" else 0
            result = self._result()
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"{self._placement.device} ran out of memory; take --batch-norm updated, which keeps no features, or --set data.loader=dali"
            ) from None
        finally:
            self._loaders.close()
        facts = {
            "stage": 2,
            "method": self._retrain.method,
            "stage_one_checkpoint": str(self.stage_one.path),
            "features_s": self._features_s,
            "stage_s": time.perf_counter() - began_s,
        }
        lines = [*self._lines, {"kind": "summary", **summary(result), **facts}]
        accuracy, epoch, _ = self._best
        cursor = Cursor(epoch=len(self._lines), global_step=steps, best_accuracy=accuracy, best_epoch=epoch)
        write_stage_two(out, self.stage_one, self.config, self._model.state_dict(), asdict(cursor), lines, self._telling.command)
        return result

    def _train(self) -> int:
        """All epochs; the number of steps."""
        feed = self._kept_features() if self._retrain.batch_norm == "frozen" else self._running_backbone()
        steps = ClassifierSteps(self._retraining.trained, self._loss(), self._retrain, self.stage_one.config.seed, self._first_epoch)
        num_images = int(self._train_counts_K.sum())
        for epoch in range(self._retrain.epochs):
            self._check()
            began_s = time.perf_counter()
            loss = float(steps.epoch(feed, epoch))
            train_s = time.perf_counter() - began_s
            if not loss < float("inf"):
                raise TrainingError(f"the loss is not finite in epoch {epoch + 1} of stage two; lower --lr")
            self._model.classifier = self._retraining.result()
            accuracy = self._selection_accuracy()
            score = self._loaders.selection.score(accuracy)
            if score > self._best[0]:
                self._best = (score, epoch, {name: value.clone() for name, value in self._model.state_dict().items()})
            rates = {"images_per_s": num_images / train_s, "train_s": train_s, "data_wait_share": feed.data_wait_share}
            terms = {"total": loss, "joint": loss, "split": self._loaders.selection.split}
            self._lines.append({"kind": "epoch", "epoch": epoch, **rates, **terms, **accuracy.headline()})
            self._say_epoch(epoch, loss, accuracy)
        return self._retrain.epochs * feed.num_steps

    def _loss(self) -> StageTwoLoss:
        if self._retrain.method != "bce":
            return CrossEntropy()
        counts_K = torch.from_numpy(self._train_counts_K).to(self._placement.device)
        beta, clamp = self._retrain.effective_number_beta, self.stage_one.config.loss.logit_clamp
        return ClassBalancedBCE(counts_K, beta, self._retrain.negative_ratio, clamp)

    def _kept_features(self) -> Feed:
        """Batch-norm frozen: all features of training and of the selection split, before the first step."""
        labels_N, shards, data = self.stage_one.shards.split("train").labels_N, self.stage_one.shards, self.stage_one.config.data
        asked = min(self._retrain.augmented_epochs, self._retrain.epochs)
        kept = affordable_epochs(asked, len(labels_N), self._model.backbone.feature_dim, self._placement)
        if kept < asked:
            self._say(f"features of {kept} augmented epochs are kept instead of {asked}: more would take over half of the free memory")
        began_s = time.perf_counter()
        backbone = FrozenBackbone(self._model, data.augment, self._placement)
        train, evaluated = self._loaders["train"], self._loaders[self._loaders.selection.split]
        with self._bar("features", train.num_steps * -(-kept // 2) + evaluated.num_steps) as advance:
            features_AND = training_features(backbone, train, labels_N, self._first_epoch, kept, advance)
            evaluation_ND, evaluation_labels_N = evaluation_features(backbone, evaluated, advance)
            self._kept_evaluation = evaluation_ND.float(), evaluation_labels_N
        self._features_s = time.perf_counter() - began_s
        order_config = OrderConfig(sampling="class-balanced")
        order = SampleOrder(labels_N, len(shards.class_names), self._retrain.batch_size, self.stage_one.config.seed, order_config)
        labels = torch.from_numpy(labels_N).to(self._placement.device)
        return KeptFeatures(features_AND, order, labels, self._first_epoch, is_balanced=self._retrain.method in BALANCED_METHODS)

    def _running_backbone(self) -> Feed:
        return RunningBackbone(
            *(self._model, self._loaders["train"], self.stage_one.config.data.augment, self._placement, self._first_epoch, self._check),
            is_balanced=self._retrain.method in BALANCED_METHODS,
        )

    def _selection_accuracy(self) -> Accuracy:
        if self._kept_evaluation is not None:
            # As in `evaluate`: the classifier in float32, whatever the backbone ran in.
            in_full = replace(self._placement, precision="fp32")
            return accuracy_on(*self._kept_evaluation, self._model.classifier, self._train_counts_K, in_full)
        return self._evaluate(self._loaders.selection.split)["plain"]

    def _evaluate(self, split: str, *, flip_tta: bool = False, features: FeatureStatistics | None = None) -> dict[str, Accuracy]:
        loader, config = self._loaders[split], self.stage_one.config
        with self._bar(f"evaluating {split}", loader.num_steps) as advance:
            return evaluate(
                *(self._model, loader, self._train_counts_K, config.data.augment, self._placement),
                flip_tta=flip_tta,
                on_step=advance,
                confidence=confidence_kind(config.loss, self._retrain.method),
                features=features,
            )

    def _result(self) -> RunResult:
        """The last epoch and the best one on the report split; the network ends with the last one's weights."""
        self._model.classifier = self._retraining.result()
        selection = self._loaders.selection
        last, geometry = measure_with_geometry(
            lambda features: self._evaluate(selection.report_split, flip_tta=True, features=features),
            *(self._model, self._train_counts_K, self._placement.device, self._say),
        )
        _, best_epoch, best_weights = self._best
        best = last["plain"] if best_epoch + 1 == len(self._lines) and self._lines else None
        if best is None and best_weights:
            last_weights = {name: value.clone() for name, value in self._model.state_dict().items()}
            self._model.load_state_dict(best_weights)
            best = self._evaluate(selection.report_split)["plain"]
            self._model.load_state_dict(last_weights)
        return RunResult(
            last=last["plain"],
            last_flip_tta=last["flip_tta"],
            best=best,
            best_epoch=best_epoch,
            last_features=geometry,
            last_average=None,
            selection_split=selection.split,
            selection_measure=selection.measure,
            report_split=selection.report_split,
            images_per_s=median(line["images_per_s"] for line in self._lines) if self._lines else 0.0,
            data_wait_share=median(line["data_wait_share"] for line in self._lines) if self._lines else 0.0,
        )

    @contextmanager
    def _bar(self, text: str, num_steps: int) -> Iterator[Callable[[], None]]:
        """A bar on a terminal; yields what advances it, which also checks whether to stop."""
        with Progress(console=self._console, transient=True, disable=self._telling.quiet or not is_live(self._console)) as progress:
            task = progress.add_task(text, total=num_steps)

            def advance() -> None:
                self._check()
                progress.advance(task)

            yield advance

    def _say(self, sentence: str) -> None:
        self._console.print(sentence, highlight=False, soft_wrap=True)

    def _say_epoch(self, epoch: int, loss: float, accuracy: Accuracy) -> None:
        figures = accuracy.headline()
        groups = "  ".join(f"{name} {format_percent(figures[name])}" for name in ("all", "many", "medium", "few"))
        if not self._telling.quiet:
            self._say(f"stage two, epoch {epoch + 1:>3}/{self._retrain.epochs}  loss {loss:.4f}  {groups}")
