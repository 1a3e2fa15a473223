"""Show what a shard folder holds: a table, and with --out a histogram of the long tail and a contact sheet of its images.

python tools/inspect_shards.py shards/cifar100-lt --out figures
"""

from __future__ import annotations

if __name__ == "__main__":
    from bce3s.command_line.ending import die_of_interrupts

    die_of_interrupts()  # during the imports below there is nothing to tidy up

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table

from bce3s.cli import run_app
from bce3s.command_line.names import completing
from bce3s.command_line.options import Quiet, named
from pipelines.config import require, require_choice
from pipelines.datasets import shot_groups
from pipelines.durable import write_atomically
from pipelines.format import ShardSet, ShardSplit, open_shards
from pipelines.types import SPLITS, BackendError, IntArray, ShardError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["--help", "-h"]})

_GROUPS = {"many": ("more than 100", "#3f6fb0"), "medium": ("20 to 100", "#dd9a2f"), "few": ("fewer than 20", "#b0435c")}
_MAX_SAMPLES = 25
_NAMED_CLASSES = 40  # up to here the histogram names every class

# The contact sheet, in pixels.
_CLASSES_PER_GROUP = 6
_CELL, _GAP, _MARGIN = 228, 20, 24
_TITLE_HEIGHT, _LINE_HEIGHT, _NAME_LINES = 40, 20, 2
_PAPER, _INK, _FAINT = "#ffffff", "#202020", "#e9e9e9"


def imbalance(counts_K: IntArray) -> tuple[int, int, float]:
    """Images of the largest and of the smallest class that has any, and largest over smallest; zeros where there are no images."""
    filled_K = counts_K[counts_K > 0]
    return (int(filled_K.max()), int(filled_K.min()), filled_K.max() / filled_K.min()) if len(filled_K) else (0, 0, 0.0)


def _shown(text: str) -> str:
    """`text` without what breaks a line or has no glyph anywhere: control characters and bytes of a folder name that was no UTF-8."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


# ---- the tables


def splits_table(shards: ShardSet) -> Table:
    """One row a split; sizes are means over its images."""
    table = Table(title=f"{_shown(shards.dataset)}: {len(shards.class_names):,} classes", title_justify="left")
    table.add_column("split")
    for column in ("images", "classes", "shards", "MB", "kB/image", "width×height"):
        table.add_column(column, justify="right")
    for name in SPLITS:
        entry = shards.manifest["splits"][name]
        if not entry["num_samples"]:
            table.add_row(name, "0", *[""] * 5)
            continue
        split = shards.split(name)
        megabytes = sum(shard["shard_bytes"] for shard in entry["shards"]) / 1e6
        table.add_row(
            name,
            f"{len(split):,}",
            f"{int((shards.class_counts(name) > 0).sum()):,}",
            f"{len(entry['shards']):,}",
            f"{megabytes:,.1f}",
            f"{split.sizes_N.mean() / 1e3:,.1f}",
            f"{split.widths_N.mean():.0f}×{split.heights_N.mean():.0f}",
        )
    return table


def streams_table(shards: ShardSet) -> Table:
    """One row for each resampled stream of the training split."""
    table = Table(title="resampled training streams", title_justify="left")
    table.add_column("stream")
    for column in ("draws", "largest class", "smallest class", "MB"):
        table.add_column(column, justify="right")
    for stream in shards.manifest.get("resampled", []):
        largest, smallest, _ = imbalance(np.array(stream["class_counts"]))
        megabytes = sum(shard["shard_bytes"] for shard in stream.get("shards", [])) / 1e6
        size = f"{megabytes:,.1f}" if stream["materialised"] else "virtual"
        table.add_row(stream["name"], f"{stream['epoch_size']:,}", f"{largest:,}", f"{smallest:,}", size)
    return table


def facts(shards: ShardSet) -> list[str]:
    """What does not fit a table: balance, shot groups, pixels, betons."""
    counts_K, manifest = shards.class_counts(), shards.manifest
    largest, smallest, factor = imbalance(counts_K)
    groups = ", ".join(f"{int(members.sum()):,} {name}" for name, members in shot_groups(counts_K).items())
    lines = [f"training images a class: {largest:,} … {smallest:,}, imbalance factor {factor:.4g}", f"classes by training images: {groups}"]
    if not counts_K.all():
        lines.append(f"classes without a training image: {int((counts_K == 0).sum()):,}")
    pixels = manifest.get("pixels")
    if isinstance(pixels, dict):
        side = f" {pixels['side']}" if pixels.get("side") else ""
        validated = "every image decoded" if pixels.get("validated") else "JPEG headers checked only"
        lines.append(f"pixels: {pixels.get('mode')}{side}, JPEG quality {pixels.get('quality')} where re-encoded, {validated}")
    lines.append(f"images re-encoded: {manifest.get('num_reencoded', 0):,}, skipped: {manifest.get('num_skipped', 0):,}")
    for name in SPLITS:
        if "beton" in manifest["splits"][name]:
            beton = manifest["splits"][name]["beton"]
            lines.append(f"beton: {beton['file']}, {beton['num_samples']:,} images, {beton['beton_bytes'] / 1e6:,.1f} MB")
    return lines


# ---- histogram.png


def draw_histogram(shards: ShardSet) -> Figure:
    """Training images of every class by falling count, log scale, in the colours of the shot groups; resampled counts as lines over it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    counts_K = shards.class_counts()
    order_K = np.argsort(-counts_K, kind="stable")
    sorted_K, num_classes = counts_K[order_K], len(counts_K)
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for name, members_K in shot_groups(sorted_K).items():
        positions = np.flatnonzero(members_K)
        if not len(positions):
            continue
        first, end = int(positions[0]), int(positions[-1]) + 1
        numbers, colour = _GROUPS[name]
        axes.axvspan(first, end, color=colour, alpha=0.10, linewidth=0)
        axes.stairs(
            np.maximum(sorted_K[first:end], 0.5),
            np.arange(first, end + 1),
            baseline=0.5,
            fill=True,
            color=colour,
            label=f"{name} ({numbers} images): {_counted(end - first, 'class')}, {_counted(int(sorted_K[first:end].sum()), 'image')}",
        )
    top = int(counts_K.max())
    for number, stream in enumerate(shards.manifest.get("resampled", [])):
        stream_K = np.array(stream["class_counts"], np.float64)[order_K]
        top = max(top, int(stream_K.max()))
        stream_K[stream_K == 0] = np.nan  # a class that is never drawn has no place on a log scale
        style = ("-", "--", "-.", ":")[number % 4]
        label = f"resampled: {stream['name']} ({stream['epoch_size']:,} draws)"
        axes.stairs(stream_K, np.arange(num_classes + 1), baseline=None, color="#202020", linestyle=style, linewidth=1.3, label=label)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 3 * max(top, 1))
    axes.set_xlim(0, num_classes)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("training images (log scale)")
    factor = imbalance(counts_K)[2]
    title = f"{_shown(shards.dataset)}: {num_classes:,} classes, {int(counts_K.sum()):,} training images, imbalance factor {factor:.4g}"
    axes.set_title(title, parse_math=False)
    if num_classes <= _NAMED_CLASSES:
        names = [_shown(shards.class_names[k]) for k in order_K]
        names = [name if len(name) <= 24 else f"{name[:13]}…{name[-10:]}" for name in names]
        axes.set_xticks(np.arange(num_classes) + 0.5, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False)
        axes.set_xlabel("class")
    else:
        axes.set_xlabel("classes, by falling number of training images")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9)
    return figure


def _counted(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


# ---- contact_sheet.png


def draw_contact_sheet(shards: ShardSet, split_name: str, num_samples: int) -> Image.Image:
    """A band for each shot group, classes from its largest to its smallest side by side, `num_samples` images of each."""
    split, counts_K = shards.split(split_name), shards.class_counts(split_name)
    groups = shot_groups(shards.class_counts())
    fonts = _font(22), _font(14)
    caption_height = (_NAME_LINES + 1) * _LINE_HEIGHT + 8
    band_height = _TITLE_HEIGHT + _CELL + caption_height + _GAP
    chosen = {name: _spread(np.flatnonzero(members & (counts_K > 0)), counts_K) for name, members in groups.items()}
    heights = [band_height if len(classes) else _TITLE_HEIGHT + _GAP for classes in chosen.values()]
    width = 2 * _MARGIN + _CLASSES_PER_GROUP * (_CELL + _GAP) - _GAP
    sheet = Image.new("RGB", (width, 2 * _MARGIN + sum(heights) - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for (name, classes), height in zip(chosen.items(), heights, strict=True):
        numbers, colour = _GROUPS[name]
        num_classes = int(groups[name].sum())
        title = f"{name}-shot: {_counted(num_classes, 'class')} with {numbers} training images"
        if num_classes and not len(classes):
            title += f", none with images in {split_name}"
        draw.rectangle((_MARGIN, top + 4, _MARGIN + 10, top + 28), fill=colour)
        draw.text((_MARGIN + 20, top + 16), title, fill=_INK, font=fonts[0], anchor="lm")
        for column, label in enumerate(classes.tolist()):
            left = _MARGIN + column * (_CELL + _GAP)
            sheet.paste(_mosaic(split, label, num_samples), (left, top + _TITLE_HEIGHT))
            lines = _fit(_shown(shards.class_names[label]), fonts[1])
            caption = f"{int(counts_K[label]):,} in {split_name}"
            for number, line in enumerate([*lines, caption]):
                place = (left, top + _TITLE_HEIGHT + _CELL + 8 + number * _LINE_HEIGHT)
                draw.text(place, line, fill="#707070" if line is caption else _INK, font=fonts[1])
        top += height
    return sheet


def _spread(classes: IntArray, counts_K: IntArray) -> IntArray:
    """At most `_CLASSES_PER_GROUP` of `classes`, evenly spread over their falling counts."""
    by_count = classes[np.argsort(-counts_K[classes], kind="stable")]
    positions = np.linspace(0, len(by_count) - 1, min(_CLASSES_PER_GROUP, len(by_count)))
    picked: IntArray = by_count[positions.round().astype(np.int64)]
    return picked


def _mosaic(split: ShardSplit, label: int, num_samples: int) -> Image.Image:
    """A square of one class's images, evenly spread over the split, each whole and in its own proportions."""
    ids = np.flatnonzero(split.labels_N == label)
    ids = ids[np.linspace(0, len(ids) - 1, min(num_samples, len(ids))).round().astype(np.int64)]
    columns = math.ceil(math.sqrt(num_samples))
    mosaic = Image.new("RGB", (_CELL, _CELL), _PAPER)
    edges = np.linspace(0, _CELL + 4, columns + 1).round().astype(int).tolist()
    for position, encoded in enumerate(split.encoded(ids)):
        row, column = divmod(position, columns)
        side = edges[1] - edges[0] - 4
        mosaic.paste(_tile(encoded.tobytes(), side), (edges[column], edges[row]))
    return mosaic


def _tile(encoded: bytes, side: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", (side, side))
            return ImageOps.pad(image.convert("RGB"), (side, side), color=_FAINT)
    except Exception:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        tile = Image.new("RGB", (side, side), _FAINT)
        ImageDraw.Draw(tile).line([(0, 0), (side, side)], fill=_GROUPS["few"][1], width=2)
        ImageDraw.Draw(tile).line([(0, side), (side, 0)], fill=_GROUPS["few"][1], width=2)
        return tile


def _fit(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """`text` in at most `_NAME_LINES` lines as wide as a cell, broken at spaces where possible; too long a one keeps its end."""
    lines: list[str] = []
    rest = text.replace("_", " ").strip()
    while rest and len(lines) < _NAME_LINES:
        length = len(rest)
        while length > 1 and font.getlength(rest[:length]) > _CELL:
            length -= 1
        if length < len(rest):
            space = rest.rfind(" ", 0, length + 1)
            length = space if space > length // 2 else length
        lines.append(rest[:length].rstrip())
        rest = rest[length:].lstrip()
    if rest:
        # Long names are often paths of a taxonomy, which tell species apart at their end.
        end = lines[-1] + " " + rest
        while font.getlength("…" + end) > _CELL:
            end = end[1:]
        lines[-1] = "…" + end
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it has Latin, Greek and Cyrillic."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks: a box stands in their place
            picture.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def write_pictures(shards: ShardSet, out: Path, split_name: str, num_samples: int) -> list[Path]:
    """Draws both pictures into the folder `out`.

    Raises:
        BackendError: matplotlib is missing.
        ShardError: the folder cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendError(f"drawing needs matplotlib ({error}): run \"pip install 'bce3s[report]'\" or leave --out away") from error
    pictures = {"histogram.png": draw_histogram(shards), "contact_sheet.png": draw_contact_sheet(shards, split_name, num_samples)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            write_atomically(out / name, _png(picture))
    except OSError as error:
        raise ShardError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error
    return [out / name for name in pictures]


@app.command()
def inspect(
    root: Annotated[Path, typer.Argument(help="Shard folder.")],
    out: Annotated[Path | None, named("--out", more=": histogram.png and contact_sheet.png; without it only the table")] = None,
    split: Annotated[str, named("--split", more=": of the contact sheet", autocompletion=completing(SPLITS))] = "train",
    samples: Annotated[int, typer.Option(help="Images of a class on the contact sheet.")] = 4,
    quiet: Quiet = False,
) -> None:
    """Show what a shard folder holds."""
    require_choice("split", split, SPLITS)
    require(1 <= samples <= _MAX_SAMPLES, f"--samples must lie in 1…{_MAX_SAMPLES}, not {samples}")
    shards = open_shards(root)
    if out is not None:
        inside = root.resolve() in (out.resolve(), *out.resolve().parents)
        require(not inside, f"--out {out} lies in the shard folder, which holds nothing but shards: choose another --out")
        require(shards.num_samples(split) > 0, f"split '{split}' of {root} has no images to show: choose another --split")
    console = Console(quiet=quiet and out is not None)  # the pictures are the result then, else the tables
    console.print(splits_table(shards))
    if shards.manifest.get("resampled"):
        console.print(streams_table(shards))
    for line in facts(shards):
        console.print(line, markup=False, highlight=False)
    for path in write_pictures(shards, out, split, samples) if out is not None else []:
        print(f"drew {path}")


if __name__ == "__main__":
    run_app(app)
