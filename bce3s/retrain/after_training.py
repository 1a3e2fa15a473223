"""Stage two right behind stage one: `fast-train --stages 2`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bce3s.config import TrainConfig
from bce3s.interrupt import StopRequest
from bce3s.retrain.record import is_stage_two, require_room, require_same_retraining, started_from
from bce3s.retrain.report import print_stage_two
from bce3s.retrain.stage_one import load_stage_one, stage_two_folder
from bce3s.retrain.stage_two import StageTwo
from bce3s.trackers import follow_finished
from bce3s.train import Cursor, StoppedError, Telling, checkpoint_of_result
from pipelines.format import ShardSet


def retrain_after(
    run: Path, config: TrainConfig, shards: ShardSet, console: Console, stop: StopRequest, telling: Telling, *, may_be_done: bool
) -> None:
    """Retrains the classifier of the finished run in folder `run` and prints the result.

    Args:
        run: of stage one.
        config: of the run; its `retrain` says how. The weights are those of the run's result.
        shards: what it was trained on.
        console: what a person sees.
        stop: heard between batches; nothing is left behind then.
        telling: quiet or not, and where its lines go as well.
        may_be_done: stage one was finished before this command: a stage two that came of these very weights by these settings stands.

    Raises:
        StoppedError: SIGTERM or SIGINT asked for it.
        ConfigError: a stage two is there that was made otherwise, which nobody asked to replace.
        UserError: what `StageTwo` raises.
    """
    folder, checkpoint = stage_two_folder(run, config.retrain), checkpoint_of_result(run)
    if is_stage_two(folder):
        require_same_retraining(folder, config)
    if may_be_done and is_stage_two(folder) and started_from(folder, run, checkpoint):
        if not telling.quiet:
            console.print(f"both stages are finished: {folder}", highlight=False, soft_wrap=True)
        return
    require_room(folder, overwrite=True)  # of a stage one that is no more
    stage_one = load_stage_one(run, checkpoint, shards, config.device)
    for sentence in stage_one.skipped:
        console.print(f"warning: {sentence}; taking the one before", highlight=False, soft_wrap=True)

    def check() -> None:
        if stop.name is not None:
            raise StoppedError(stop.name, Cursor(**stage_one.state["cursor"]))

    stage_two = StageTwo(stage_one, config.retrain, console, check, telling)
    result = stage_two.run(folder)
    follow_finished(telling.tracker, folder, lambda sentence: console.print(sentence, style="bold red", highlight=False, soft_wrap=True))
    print_stage_two(console, stage_two, result, folder)
