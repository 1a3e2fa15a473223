"""The model card (Mitchell et al. 2019): what the network is, how well it does where data are few, how to load it, where it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from bce3s import __version__
from bce3s.export.figures import RunFigures, figures_of
from bce3s.export.formats import Format, GraphOptions
from bce3s.export.parity import Parity
from bce3s.export.plain import Export
from bce3s.metrics import format_percent
from bce3s.throughput.record import checkout_commit
from pipelines.datasets import shot_groups

_GROUPS = {"many": "many shot (more than 100)", "medium": "medium shot (20 to 100)", "few": "few shot (fewer than 20)"}
_SHOWN_FIGURES = ("all", "many", "medium", "few", "ece")
_WORST_CLASSES, _SHOWN_CLASSES = 3, 10


def model_card(export: Export, options: GraphOptions, chosen: Format, name: str, parity: Parity | None) -> str:
    """Markdown on an export whose file or folder is called `name`; `parity` is None where nobody checked."""
    figures = figures_of(export)
    trained = export.trained
    checked = f"Checked: {parity.sentence()}." if parity else "Not checked against the trained network: it was exported with `--no-check`."
    sections = {
        "What it is": (
            f"A network that names one of the {len(trained.class_names):,} classes of `{trained.config.dataset}` for an image: a "
            f"`{export.arch}`, trained with the method {export.method}. {figures.whose}"
        ),
        "How to load it": f"```python\n{chosen.usage(export, options, name)}\n```\n\n{checked}",
        "Preprocessing": _preprocessing(export, options),
        "Training data": _training_data(export, figures),
        "Accuracy": _accuracy(figures),
        "Use and limits": _limits(export, figures),
        "Training": _training(export, figures),
        "Licence": (
            "Whether the licence of the training images allows your use is for you to check: the weights derive from them. "
            "No licence has been chosen for bce3s yet, so all rights in it are reserved."
        ),
        "Provenance": _provenance(export, figures),
    }
    title = f"{export.arch} trained on {trained.config.dataset} with {export.method}"
    return f"# {title}\n\n" + "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items()) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """A table in Markdown; `align` is of the columns after the first."""
    rule = ["---", *(align for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _preprocessing(export: Export, options: GraphOptions) -> str:
    augment, side = export.augment, export.image_size
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (augment.mean, augment.std))
    share = "" if augment.eval_crop == 1 else f"{augment.eval_crop:g} of "
    steps = [
        "Decode to RGB, 8 bits a channel.",
        f"Cut the centred square whose side is {share}the shorter side.",
        f"Resize it to {side} × {side} px (bilinear, antialiased where it shrinks).",
    ]
    if options.preprocess:
        steps.append("Pass the pixels as they are, uint8 [B, H, W, 3]: the graph normalises them.")
    else:
        steps.append(f"Divide by 255, subtract the mean ({mean}) and divide by the standard deviation ({std}) of each channel.")
        steps.append("Order as [B, 3, H, W], float32.")
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))


def _training_data(export: Export, figures: RunFigures) -> str:
    counts_K = export.trained.class_counts_K
    largest, smallest = int(counts_K.max()), int(counts_K.min())
    factor = f" (imbalance factor {largest / smallest:.4g})" if smallest else ""
    text = (
        f"`{export.trained.config.dataset}`: {int(counts_K.sum()):,} training images of {len(counts_K):,} classes, from {largest:,} images "
        f"of the largest class to {smallest:,} of the smallest{factor}."
    )
    rows = [
        [_GROUPS[group], f"{members_K.sum():,}", f"{counts_K[members_K].sum():,}", format_percent(figures.own_row.get(group))]
        for group, members_K in shot_groups(counts_K).items()
    ]
    return f"{text}\n\n{_table(['classes, by training images', 'classes', 'training images', 'mean accuracy, %'], rows)}"


def _accuracy(figures: RunFigures) -> str:
    if not figures.rows:
        return "No figures are recorded of this run; measure them with `bce3s evaluate RUN`."
    rows = [
        [f"**{label}**" if label == figures.own else label, *(format_percent(row.get(key)) for key in _SHOWN_FIGURES)]
        for label, row in figures.rows.items()
    ]
    text = (
        f"Top-1 accuracy in percent on the {figures.split} split; many, medium and few are means over the classes of the shot group. "
        "The first row is the run's result; a best epoch that was chosen on the split it is measured on flatters. "
    )
    text += "The row in bold is that of these weights." if figures.own else "No row is of exactly these weights."
    table = _table(["measured", *_SHOWN_FIGURES[:-1], "ECE"], rows)
    if not figures.confidence:
        return f"{text}\n\n{table}"
    return f"{text}\n\n{table}\n\nECE: expected calibration error in percent, of the largest {figures.confidence} of the logits."


def _limits(export: Export, figures: RunFigures) -> str:
    names, counts_K = export.trained.class_names, export.trained.class_counts_K
    sentences = [
        "For images like those of the training set, and for research on long-tailed recognition. It names one of its classes whatever "
        "the image shows. It was tested on no other data, and not for decisions about people."
    ]
    found = [(value, k) for k, value in enumerate(figures.per_class) if value is not None]
    few = [value for value, k in found if shot_groups(counts_K)["few"][k]]
    if few:
        sentences.append(
            f"Classes with fewer than 20 training images are named right for {sum(few) / len(few):.1f} % of their images on average, the "
            f"worst of them for {min(few):.1f} %."
        )
    missed = sum(value == 0 for value, _ in found)
    shown = sorted(found)[: min(max(missed, _WORST_CLASSES), _SHOWN_CLASSES)]
    listed = ", ".join(f"{names[k]} ({value:.1f} %, {counts_K[k]:,} training images)" for value, k in shown)
    if found:
        never = f" {missed:,} of {len(found):,} classes {'is' if missed == 1 else 'are'} never recognised." if missed else ""
        sentences.append(f"Worst classes on the {figures.split} split: {listed}.{never}")
    return "\n\n".join(sentences)


def _training(export: Export, figures: RunFigures) -> str:
    config = export.trained.config
    optimizer, data = config.optimizer, config.data
    rows = [
        ("method", export.method),
        ("epochs", f"{config.epochs}" + (f", then {config.retrain.epochs} of the classifier alone" if export.retrained_with else "")),
        ("batch size", f"{data.batch_size} source images"),
        ("optimizer", f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g}"),
        ("schedule", f"{optimizer.schedule}, {optimizer.warmup_epochs:g} warm-up epochs"),
        ("crop and policy", f"{data.augment.crop}, {data.augment.policy}"),
        ("partner stream", f"{data.order.sampling}, exponent {data.order.resample_exponent:g}"),
        ("precision in training", f"{figures.precision or config.precision}; these weights are float32"),
        ("seed", str(config.seed)),
        *([("ran on", figures.hardware)] if figures.hardware else []),
    ]
    command = f"\n\n```bash\n{figures.command}\n```" if figures.command else ""
    settings = json.dumps(asdict(config), indent=1)
    details = f"<details><summary>All settings</summary>\n\n```json\n{settings}\n```\n\n</details>"
    return f"{_table(['setting', 'value'], rows, '---')}{command}\n\n{details}"


def _provenance(export: Export, figures: RunFigures) -> str:
    commit = checkout_commit()
    sentences = [
        f"Trained by bce3s {figures.version} with {figures.packages}." if figures.version else "",
        f"Exported by bce3s {__version__}{f' (commit {commit})' if commit else ''} from the checkpoint `{export.trained.path.name}`.",
        f"Fingerprint of the shards: `{export.trained.state['fingerprint']}`.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)
