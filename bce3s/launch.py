"""From a resolved command to finished runs: joins the ranks, continues or starts, one seed or several, and says how it ended."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from bce3s.checkpoint import CheckpointFolder
from bce3s.config import TrainConfig
from bce3s.distributed import ALONE, LostRankError, World, is_launched, is_lost_rank, join_world, leave_world
from bce3s.progress import accuracy_table
from bce3s.seeds import combine, finished_summary, seeds_table, write_seeds
from bce3s.train import RunResult, StoppedError, Trainer, saved_loader
from pipelines.config import require_choice
from pipelines.datasets import shot_groups
from pipelines.format import ShardSet, open_shards
from pipelines.format.bus_error import explain_bus_errors_of
from pipelines.loaders import LOADERS, MADE_UP_PIXELS
from pipelines.types import ConfigError


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
    """

    shards: Path | str
    out: Path
    resume: bool
    overwrite: bool
    seeds: tuple[int, ...] = ()
    arguments: Sequence[str] = ()


def launch(config: TrainConfig, asked: Launch) -> None:
    """Trains what was asked for; in every rank, where a launcher started several.

    Raises:
        UserError: what the user can mend, in one sentence.
    """
    require_choice("loader", config.data.loader, ("auto", *LOADERS))
    if asked.resume and asked.overwrite:
        raise ConfigError("--resume continues a run and --overwrite starts it anew: give one of them")
    world = join_world(config.device) if is_launched() else ALONE
    if world.restart:  # the launcher has replaced a rank that died: whatever the first command said, the run goes on
        asked = replace(asked, resume=True, overwrite=False)
    console = Console(quiet=not world.is_main)
    try:
        opened = open_shards(asked.shards)
        explain_bus_errors_of(opened.root)
        if asked.seeds:
            _train_seeds(config, opened, asked, console, world)
        else:
            _train(config, opened, asked, console, world)
    except StoppedError as stopped:
        console.print(_continuation(stopped, asked, world), highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"interrupted; --resume continues from the newest checkpoint in {asked.out}", highlight=False, soft_wrap=True)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise LostRankError.of(error) from error
    leave_world()


def _train_seeds(config: TrainConfig, shards: ShardSet, asked: Launch, console: Console, world: World) -> None:
    """One run a seed, in folders of their own; with `resume`, those that are finished are read and not repeated."""
    summaries = {}
    for seed in asked.seeds:
        one = replace(asked, out=asked.out / f"s{seed}", resume=asked.resume)
        found = finished_summary(one.out) if asked.resume else None
        if found is None:
            _train(replace(config, seed=seed), shards, one, console, world)
            found = finished_summary(one.out) if world.is_main else {}
        assert found is not None, "a run that ended well has a summary"
        summaries[seed] = found
    if world.is_main:
        combined = combine(summaries)
        write_seeds(asked.out, combined)
        console.print(seeds_table(combined))


def _train(config: TrainConfig, shards: ShardSet, asked: Launch, console: Console, world: World) -> None:
    out = asked.out
    has_run = CheckpointFolder(out, config.checkpoint.keep).newest() is not None
    if has_run and not (asked.resume or asked.overwrite):
        raise ConfigError(f"{out} holds a run already; add --resume to continue it, --overwrite to start anew, or choose another --out")
    continues = has_run and asked.resume
    if continues and config.data.loader == "auto":
        config = replace(config, data=replace(config.data, loader=saved_loader(out)))
    trainer = Trainer(config, shards, out, console, world)
    try:
        cursor = trainer.resume() if continues else None
        _introduce(console, trainer, f"; continuing after {cursor}" if cursor else "", world)
        result = trainer.fit()
    finally:
        trainer.close()
    _print_result(console, trainer, result)


def _introduce(console: Console, trainer: Trainer, continuing: str, world: World) -> None:
    config, placement, choice = trainer.config, trainer.placement, trainer.loader_choice
    ranks = f" on {world.size} ranks" if world.size > 1 else ""
    console.print(
        f"{config.loss.name} with {config.model.arch} on {config.dataset} ({int(trainer.train_counts_K.sum()):,} training images, "
        f"{len(trainer.train_counts_K)} classes); loader {choice.name} ({'as before' if continuing else choice.reason}); "
        f"{placement.device}, {placement.precision}{ranks}{continuing}",
        highlight=False,
        soft_wrap=True,
    )
    if choice.name in MADE_UP_PIXELS:
        console.print(
            f"loader '{choice.name}' is for measuring: its pixels are not those of the labels, so accuracies mean nothing", soft_wrap=True
        )


def _print_result(console: Console, trainer: Trainer, result: RunResult) -> None:
    rows = {"last epoch": result.last, "last epoch, flip TTA": result.last_flip_tta}
    if result.last_average is not None:
        rows["last epoch, average of weights"] = result.last_average
    rows[f"best epoch on {result.selection_split} ({result.best_epoch + 1})"] = result.best
    sizes = {name: int(members.sum()) for name, members in shot_groups(trainer.train_counts_K).items()}
    caption = f"{sizes['many']} many-, {sizes['medium']} medium-, {sizes['few']} few-shot classes; {result.last.num_images:,} images"
    console.print(accuracy_table(f"{result.report_split} split", rows, caption))
    console.print(f"{result.images_per_s:.0f} source images/s in training, data wait {result.data_wait_share:.0%}", highlight=False)
    console.print(f"run: {trainer.out}   evaluate again: bce3s evaluate {trainer.out}", highlight=False, soft_wrap=True)


def _continuation(stopped: StoppedError, asked: Launch, world: World) -> str:
    """How to go on: the command that was given, with --resume."""
    if world.size > 1:
        return f"{stopped}, and saved; the same launch with --resume continues there"
    arguments = [argument for argument in asked.arguments if argument not in ("--overwrite", "--resume")]
    return f"{stopped}, and saved; continue with: {shlex.join(['bce3s', *arguments, '--resume'])}"
