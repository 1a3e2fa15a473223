"""The verdict over the rows: whether training can run here, and with which loader, threads and batch size, ready to paste."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bce3s.doctor.processes import Facts
from bce3s.doctor.rows import Row

# Bytes that autograd keeps of a view, over the pixels of its image, in bf16: counted by torch.autograd.graph.saved_tensors_hooks on the
# recipes' networks with batch-norm in training. In fp32 twice as many.
KEPT_BYTES_PER_PIXEL = {"resnet50": 872, "resnext50-32x4d": 1134, "resnet34-small-stem": 3894, "resnet20-cifar": 742}
_VIEWS = 3
_OVERHEAD = 1.3  # gradients on their way back, workspaces, what the allocator cannot use
_SHARE = 0.8  # of the memory: weights, optimizer and the loader need the rest
_BF16_FROM = (8, 0)
_MIN_PART = 16


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do next.

    Args:
        can_train: whether everything is there that training needs.
        sentence: the same in words.
        loader, reason: what to give to --loader, and why; empty where nothing can be trained.
        num_threads: for data.num_threads, 0 is one per core.
        batch_size: that of the data set's recipe; its learning rate belongs to it.
        accumulate_steps: parts a batch is cut into so that it fits in memory, by estimate.
        fits: whether it does then.
        command: to paste.
    """

    can_train: bool
    sentence: str
    loader: str = ""
    reason: str = ""
    num_threads: int = 0
    batch_size: int = 0
    accumulate_steps: int = 1
    fits: bool = True
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(rows: Sequence[Row], facts: Facts, shards: str | None) -> Verdict:
    """The verdict.

    Args:
        rows: all of them; those of the machine carry the cores and the memory in their figures.
        facts: of the probes; "choice" where shards were named, else "recipe".
        shards: as they were named.
    """
    blocking = [row for row in rows if row.blocks]
    figures = {row.name: row.figures for row in rows}
    gpus = facts["torch"].get("gpus") or []
    place = f"on {len(gpus)} × {gpus[0]['name']}" if gpus else f"on {figures['CPU cores']['usable']} CPU cores, without a GPU"
    recipe = facts.get("choice") or facts.get("recipe") or {"error": "it was not asked for"}
    if blocking:
        what = "; ".join(f"{row.name}: {row.value}" + (f" ({row.remedy})" if row.remedy else "") for row in blocking)
        return Verdict(can_train=False, sentence=f"Training cannot run here yet. {what}.")
    if "error" in recipe:
        return Verdict(can_train=False, sentence=f"Training cannot run here yet. The loader cannot be chosen: {recipe['error']}.")
    loader, reason = _loader(recipe, facts)
    threads = _threads(figures["CPU cores"])
    memory = gpus[0]["bytes"] if gpus else figures["memory"]["free_bytes"]
    # A CPU without bf16 instructions trains in fp32; which it is, torch says only once a run begins, so the larger need is assumed.
    in_bf16 = bool(gpus) and tuple(gpus[0]["capability"]) >= _BF16_FROM
    parts, fits = accumulate_steps(recipe["arch"], recipe["image_size"], recipe["batch_size"], memory, in_bf16=in_bf16)
    settings = [f"data.num_threads={threads}"] if threads else []
    settings += [f"accumulate_steps={parts}"] if parts > 1 else []
    where = ["--dataset", recipe["dataset"], "--shards", shards or f"shards/{recipe['dataset']}"]
    choice = ["--loader", loader, "--batch-size", str(recipe["batch_size"])]
    command = shlex.join(["bce3s", "fast-train", *where, *choice, *(part for setting in settings for part in ("--set", setting))])
    return Verdict(
        can_train=True,
        sentence=f"Training can run here, {place}.",
        loader=loader,
        reason=reason,
        num_threads=threads,
        batch_size=recipe["batch_size"],
        accumulate_steps=parts,
        fits=fits,
        command=command,
    )


def _loader(recipe: dict[str, Any], facts: Facts) -> tuple[str, str]:
    if "error" in facts["dali"] or (facts["torch"].get("gpus") and "error" in facts.get("dali_gpu", {})):
        return "ffcv", "DALI does not work here; the shards must be made with --format wds,ffcv"
    if "loader" in recipe:
        return recipe["loader"], recipe["reason"]
    return "dali", "with --shards DIR doctor says whether the decoded set fits in memory, where nothing is faster than resident"


def _threads(cores: dict[str, Any]) -> int:
    """0, one per core, unless a control group allows less time than the affinity does: more threads would only be throttled."""
    return int(cores["usable"]) if cores["usable"] < cores["affinity"] else 0


def accumulate_steps(arch: str, image_size: int, batch_size: int, memory_bytes: int, *, in_bf16: bool) -> tuple[int, bool]:
    """Parts into which a batch must be cut to fit, by estimate, and whether it fits then; (1, True) where the network is not known.

    A power of two that divides the batch and leaves 16 images or more to each part, for batch-norm sees one part at a time.

    Args:
        arch: of the recipe.
        image_size: pixels.
        batch_size: source images.
        memory_bytes: of the GPU, or free on the host.
        in_bf16: whether activations take 2 bytes; else 4.
    """
    per_pixel = KEPT_BYTES_PER_PIXEL.get(arch)
    if per_pixel is None:
        return 1, True
    needed = batch_size * _VIEWS * image_size**2 * per_pixel * (1 if in_bf16 else 2) * _OVERHEAD
    parts, room = 1, _SHARE * memory_bytes
    while needed / parts > room and batch_size % (2 * parts) == 0 and batch_size // (2 * parts) >= _MIN_PART:
        parts *= 2
    return parts, needed / parts <= room
