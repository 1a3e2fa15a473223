"""From a resolved command to finished runs: joins the ranks, continues or starts, one seed or several, and says how it ended."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from bce3s.checkpoint import CheckpointFolder
from bce3s.config import TrainConfig
from bce3s.distributed import (
    ALONE,
    LostRankError,
    World,
    abandon_world,
    is_abandoned_on_error,
    is_launched,
    is_lost_rank,
    join_world,
    leave_world,
)
from bce3s.interrupt import StopRequest
from bce3s.losses import resolve_method
from bce3s.progress import accuracy_table
from bce3s.retrain.after_training import retrain_after
from bce3s.retrain.classifiers import require_classifier_fits
from bce3s.retrain.record import discard_stage_twos, is_stage_two, require_same_retraining
from bce3s.retrain.stage_one import stage_two_folder
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, read_json
from bce3s.seeds import combine, is_finished, seeds_table, summary_of, write_seeds
from bce3s.trackers import require_tracker
from bce3s.train import RunResult, StoppedError, Telling, Trainer, require_same_record, saved_loader
from pipelines.config import require, require_choice
from pipelines.datasets import shot_groups
from pipelines.format import open_shards
from pipelines.format.bus_error import explain_bus_errors_of
from pipelines.loaders import LOADERS, MADE_UP_PIXELS
from pipelines.types import ConfigError, UserError


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What was asked for.

    Args:
        shards: folder or URL.
        out: run folder; with several seeds, the folder of their run folders.
        resume: continue a run that is there.
        overwrite: start anew where there is one.
        seeds: more than one run of the config, one after the other; empty is the config's own seed.
        arguments: of the command line, to be repeated when a run is stopped.
        stages: 2 retrains the classifier of every run after its training (`config.retrain`).
        quiet: prints the final table and errors only.
        tracker: name in `bce3s.trackers.TRACKERS` ("tensorboard", "wandb") of what the log is sent to as well, or "none".
    """

    shards: Path | str
    out: Path
    resume: bool
    overwrite: bool
    seeds: tuple[int, ...] = ()
    arguments: Sequence[str] = ()
    stages: int = 1
    quiet: bool = False
    tracker: str = "none"


def launch(config: TrainConfig, asked: Launch) -> None:
    """Trains what was asked for; in every rank, where a launcher started several.

    Raises:
        UserError: what the user can mend, in one sentence.
    """
    require_choice("loader", config.data.loader, ("auto", *LOADERS))
    require_tracker(asked.tracker)
    if asked.resume and asked.overwrite:
        raise ConfigError("--resume continues a run and --overwrite starts it anew: give one of them")
    require(asked.stages in (1, 2), f"--stages takes 1 or 2, not {asked.stages}")
    if asked.stages == 2:
        require_classifier_fits(config.retrain.method, resolve_method(config).model.classifier)
        require(not is_launched(), "--stages 2 is for one process: train on the ranks, then run 'bce3s retrain-classifier RUN' in one")
    world = join_world(config.device) if is_launched() else ALONE
    console = Console(quiet=not world.is_main)
    try:
        with StopRequest() as stop:
            _Launched(config, asked, console, world, stop).train()
    except StoppedError as stopped:
        console.print(_continuation(stopped, asked, world), highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command with --resume goes on from the newest checkpoint in {asked.out}, if there is one")
        abandon_world(130)
        leave_world()
        raise SystemExit(130) from None
    except BaseException as error:
        if isinstance(error, RuntimeError) and is_lost_rank(error):
            lost = LostRankError.of(error)
            _leave_after(lost)
            raise lost from error
        _leave_after(error)
        raise
    leave_world()


def _leave_after(error: BaseException) -> None:
    """A rank under NCCL, for which peers may wait, says what `bce3s.cli` would and ends at once; others close what they opened."""
    if is_abandoned_on_error():
        text = f"error: {error}" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        print(text, file=sys.stderr)  # noqa: T201
        abandon_world(2 if isinstance(error, UserError) else 1)
    leave_world()


class _Launched:
    """The runs of one launch, on one rank."""

    def __init__(self, config: TrainConfig, asked: Launch, console: Console, world: World, stop: StopRequest) -> None:
        self.config, self.asked, self.console, self.world, self.stop = config, asked, console, world, stop
        self.telling = Telling(quiet=asked.quiet, tracker=asked.tracker, command=shlex.join(["bce3s", *asked.arguments]))
        self.shards = open_shards(asked.shards)
        explain_bus_errors_of(self.shards.root)

    def train(self) -> None:
        """All runs, one a seed; mistakes in any of them are found before the first one trains."""
        asked = self.asked
        if not asked.seeds:
            self._train_stages(self.config, asked.out, self._way(self.config, asked.out))
            return
        runs = {seed: (replace(self.config, seed=seed), asked.out / f"s{seed}") for seed in asked.seeds}
        ways = {seed: self._way(config, out) for seed, (config, out) in runs.items()}
        if self.world.is_main:
            for seed, (config, out) in runs.items():
                if ways[seed] == "anew":  # else a stop in the first run would leave old ones for --resume to find
                    CheckpointFolder(out, config.checkpoint.keep).clear()
                    (out / METRICS_FILE).unlink(missing_ok=True)
        for seed, (config, out) in runs.items():
            self._train_stages(config, out, ways[seed])
        if self.world.is_main:
            self._report_seeds({seed: out for seed, (_, out) in runs.items()})

    def _report_seeds(self, runs: dict[int, Path]) -> None:
        """Mean and standard deviation over finished runs, of each stage."""
        combined = combine({seed: summary_of(out) for seed, out in runs.items()})
        tables = [seeds_table(combined)]
        if self.asked.stages == 2:
            retrained = combine({seed: summary_of(stage_two_folder(out, self.config.retrain)) for seed, out in runs.items()})
            tables.append(seeds_table(retrained))
            tables[-1].title = f"stage two ({self.config.retrain.method}), {tables[-1].title}"
            combined["stage_two"] = {"method": self.config.retrain.method, **retrained}
        write_seeds(self.asked.out, combined)
        for table in tables:
            self.console.print(table)

    def _train_stages(self, config: TrainConfig, out: Path, way: str) -> None:
        """What is not done yet of one run."""
        if way != "finished":
            self._train(config, out, way)
        if self.asked.stages == 2:
            retrain_after(out, config, self.shards, self.console, self.stop, self.telling, may_be_done=way == "finished")

    def _way(self, config: TrainConfig, out: Path) -> str:
        """What is to be done with a run: "anew", "on" from its checkpoint, or nothing because it is "finished", where more is to follow.

        Raises:
            ConfigError: there is a run, and nobody said what to do with it; or it is of another config or other shards.
        """
        asked = self.asked
        has_run = CheckpointFolder(out, config.checkpoint.keep).newest() is not None
        # The launcher has replaced a rank that died: whatever the command said about older runs, this job's own goes on.
        own = self.world.restart > 0 and has_run and read_json(out / ENVIRONMENT_FILE).get("job") == self.world.job
        if has_run and not (asked.resume or asked.overwrite or own):
            raise ConfigError(f"{out} holds a run already; add --resume to continue it, --overwrite to start anew, or choose another --out")
        if has_run and is_stage_two(out):
            raise ConfigError(f"{out} holds a stage two; name the folder of its stage one, or another --out")
        if not has_run or (asked.overwrite and not own):
            return "anew"
        if (asked.seeds or asked.stages == 2) and is_finished(out):
            return self._way_of_finished(config, out)
        return "on"

    def _way_of_finished(self, config: TrainConfig, out: Path) -> str:
        """Nothing is to be done, or "on": where another epoch is to be the result, the run is measured again at its end, without training.

        Raises:
            ConfigError: the run, or the stage two that it has, was made otherwise.
        """
        require_same_record(out, config, self.shards)
        second, before = stage_two_folder(out, config.retrain), read_json(out / CONFIG_FILE).get("select", "last")
        has_second = self.asked.stages == 2 and is_stage_two(second)
        if has_second:
            require_same_retraining(second, config)
        if before == config.select:
            return "finished"
        if has_second:
            raise ConfigError(
                f"{second} was made with --select {before}, this command says {config.select}: give it without --stages 2 first, and then "
                f"'bce3s retrain-classifier {out} --overwrite'"
            )
        return "on"

    def _train(self, config: TrainConfig, out: Path, way: str) -> None:
        if way == "on" and config.data.loader == "auto":
            config = replace(config, data=replace(config.data, loader=saved_loader(out)))
        trainer = Trainer(config, self.shards, out, self.console, self.world, stop=self.stop, continues=way == "on", telling=self.telling)
        try:
            cursor = trainer.resume() if way == "on" else None
            if way == "anew" and self.world.is_main:
                discard_stage_twos(out)  # of a stage one that is no more
            if not self.asked.quiet:
                _introduce(self.console, trainer, f"; continuing after {cursor}" if cursor else "", self.world)
            result = trainer.fit()
        finally:
            trainer.close()
        _print_result(self.console, trainer, result, quiet=self.asked.quiet)


def _introduce(console: Console, trainer: Trainer, continuing: str, world: World) -> None:
    config, placement, choice = trainer.config, trainer.placement, trainer.loader_choice
    ranks = f" on {world.size} ranks" if world.size > 1 else ""
    console.print(
        f"{config.loss.title} with {config.model.arch} on {config.dataset} ({int(trainer.train_counts_K.sum()):,} training images, "
        f"{len(trainer.train_counts_K)} classes); loader {choice.name} ({'as before' if continuing else choice.reason}); "
        f"{placement.device}, {placement.precision}{ranks}{continuing}",
        highlight=False,
        soft_wrap=True,
    )
    if choice.name in MADE_UP_PIXELS:
        console.print(
            f"loader '{choice.name}' is for measuring: its pixels are not those of the labels, so accuracies mean nothing", soft_wrap=True
        )


def _print_result(console: Console, trainer: Trainer, result: RunResult, *, quiet: bool) -> None:
    sizes = {name: int(members.sum()) for name, members in shot_groups(trainer.train_counts_K).items()}
    caption = f"{sizes['many']} many-, {sizes['medium']} medium-, {sizes['few']} few-shot classes; {result.last.num_images:,} images"
    console.print(accuracy_table(f"{result.report_split} split", result.rows(), caption))
    if quiet:
        return
    console.print(f"{result.images_per_s:.0f} source images/s in training, data wait {result.data_wait_share:.0%}", highlight=False)
    console.print(f"run: {trainer.out}   evaluate again: bce3s evaluate {trainer.out}", highlight=False, soft_wrap=True)


def _continuation(stopped: StoppedError, asked: Launch, world: World) -> str:
    """How to go on: the command that was given, with --resume."""
    if world.size > 1:
        return f"{stopped}, and saved; the same launch with --resume continues there"
    arguments = [argument for argument in asked.arguments if argument not in ("--overwrite", "--resume")]
    return f"{stopped}, and saved; continue with: {shlex.join(['bce3s', *arguments, '--resume'])}"
