"""Options that several commands and tools have, declared once: the same name is the same thing, of the same type, in the same words.

What differs from command to command (a default, an example) is said by `named`, after the words that are shared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bce3s.command_line import names
from bce3s.command_line.names import completing

# The words with which every command begins the help of an option; what is special about a command follows them.
STEMS = {
    "--shards": "Shard folder",
    "--out": "Folder to write",
    "--overwrite": "Replace what --out holds",
    "--resume": "Continue what --out holds",
    "--set": "Any setting",
    "--json": "Print JSON",
    "--quiet": "Only the result, warnings and errors",
    "--seed": "Seed",
    "--seeds": "One run a seed",
    "--split": "train, val or test",
}


def named(option: str, *spellings: str, more: str = "", **settings: Any) -> Any:
    """What typer knows of `option`: its help is the words shared by all commands and then `more`.

    Args:
        option: an entry of `STEMS`.
        spellings: others that are taken for it.
        more: begins with what separates it: "; default …", ": …".
        settings: anything else for `typer.Option`.
    """
    return typer.Option(option, *spellings, help=f"{STEMS[option]}{more}.", **settings)


DATASET = typer.Option(help=f"Data set of the shards: {', '.join(names.dataset_names())}.", autocompletion=completing(names.dataset_names))
ON_ERROR = typer.Option(help="An image that does not decode: stop, or skip it.", autocompletion=completing(("stop", "skip")))
_DEVICE = typer.Option(help="auto, cpu, cuda or cuda:N.", autocompletion=completing(("auto", "cpu", "cuda", "cuda:0")))
_RECIPE = typer.Option(help="Recipe to start from; default that of the data set.", autocompletion=completing(names.recipe_names))
_ARCH = typer.Option(
    help="Backbone: resnet32-cifar, resnet50, …, timm:NAME, or package.module:factory of your own; default the recipe's.",
    autocompletion=completing(names.arch_names),
)
_LOADER = typer.Option(
    help="auto, resident, dali, ffcv, webdataset, cached or synthetic; default the recipe's.", autocompletion=completing(names.loader_names)
)
_PRECISION = typer.Option(
    help="auto, bf16, fp16 or fp32; default the recipe's.", autocompletion=completing(("auto", "bf16", "fp16", "fp32"))
)
_CHECKPOINT = typer.Option(
    help="last, or best: on val, or on test where there is no val; default the run's result.", autocompletion=completing(("last", "best"))
)
_SPLIT = named("--split", more="; train is without augmentation", autocompletion=completing(("train", "val", "test")))
_SET = named("--set", more=": --set optimizer.weight_decay=1e-4", metavar="PATH=VALUE", autocompletion=completing(names.setting_names))

Dataset = Annotated[str | None, DATASET]
Shards = Annotated[str | None, named("--shards", more=" or URL; default shards/DATASET")]
ShardsOfRun = Annotated[str | None, named("--shards", more=" or URL; default what the run was trained on")]
Recipe = Annotated[str | None, _RECIPE]
Arch = Annotated[str | None, _ARCH]
Loader = Annotated[str | None, _LOADER]
BatchSize = Annotated[int | None, typer.Option(help="Source images a step; three views each (of bcl two).")]
Precision = Annotated[str | None, _PRECISION]
Device = Annotated[str, _DEVICE]
DeviceOfConfig = Annotated[str | None, _DEVICE]  # None: what the recipe and --set say
Checkpoint = Annotated[str | None, _CHECKPOINT]
Split = Annotated[str, _SPLIT]
Settings = Annotated[list[str] | None, _SET]
Json = Annotated[bool, named("--json", more=": all figures, per class too")]
Quiet = Annotated[bool, named("--quiet", "-q")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved settings as JSON and stop.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
