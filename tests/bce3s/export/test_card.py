"""The model card says what the record says: data, accuracies, whose weights they are, and where the network fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bce3s.export.card import model_card
from bce3s.export.figures import figures_of
from bce3s.export.formats import GraphOptions, load_format
from bce3s.export.plain import Export
from bce3s.export.write import Written
from bce3s.runlog import read_metrics


def card_of(export: Export, **options: bool) -> str:
    return model_card(export, GraphOptions(**options), load_format("torchscript", GraphOptions()), "net.pt", None)


def section(card: str, heading: str) -> str:
    return card.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_cards_figures_are_those_of_the_run(run: Path, export: Export) -> None:
    summary = read_metrics(run)[-1]
    last = summary["last_epoch_no_tta"]
    card = card_of(export)
    data, accuracy = section(card, "Training data"), section(card, "Accuracy")
    assert "74 training images of 4 classes, from 40 images of the largest class to 5 of the smallest (imbalance factor 8)" in data
    assert f"| medium shot (20 to 100) | 2 | 60 | {last['medium']:.2f} |" in data
    assert f"| few shot (fewer than 20) | 2 | 14 | {last['few']:.2f} |" in data
    assert "| many shot (more than 100) | 0 | 0 | n/a |" in data
    row = f"| **last epoch** | {last['all']:.2f} | n/a | {last['medium']:.2f} | {last['few']:.2f} | {last['ece']:.2f} |"
    assert row in accuracy
    assert accuracy.index("**last epoch**") < accuracy.index("flip test-time") < accuracy.index("best epoch on test (")
    assert "of the largest sigmoid of the logits" in accuracy
    assert f"{last['few']:.1f} % of their images on average" in section(card, "Use and limits")


def test_it_names_the_classes_that_are_never_recognised(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = replace(figures_of(export), per_class=(100.0, 40.0, 0.0, None))
    monkeypatch.setattr("bce3s.export.card.figures_of", lambda export: figures)
    limits = section(card_of(export), "Use and limits")
    worst = "class-2 (0.0 %, 9 training images), class-1 (40.0 %, 20 training images), class-0 (100.0 %, 40 training images)"
    assert f"Worst classes on the test split: {worst}. 1 of 3 classes is never recognised." in limits
    assert "right for 0.0 % of their images on average" in limits


def test_it_says_whose_weights_they_are(run: Path, export: Export) -> None:
    def of(**changes: object) -> str:
        return section(card_of(replace(export, **changes)), "What it is")  # type: ignore[arg-type]

    assert "These are the weights of the last epoch." in of()
    assert "These are the weights of the last epoch, average of weights." in of(average=True)
    best = read_metrics(run)[-1]["best_on_test_no_tta"]["epoch"] + 1
    assert f"These are the weights of the best epoch on test ({best})." in of(
        trained=replace(export.trained, path=run / "best.safetensors")
    )
    state = {**export.trained.state, "cursor": {**export.trained.state["cursor"], "epoch": 0, "step": 3}}
    middle = replace(export, trained=replace(export.trained, state=state))
    assert "These are the weights of step 3 of epoch 1." in section(card_of(middle), "What it is")
    assert "No row is of exactly these weights." in section(card_of(middle), "Accuracy")
    loose = replace(export, trained=replace(export.trained, run=None))
    assert "No figures are recorded of this run" in section(card_of(loose), "Accuracy")


def test_it_says_how_to_prepare_an_image(export: Export) -> None:
    plain, pixels = (section(card_of(export, preprocess=value), "Preprocessing") for value in (False, True))
    assert "the centred square whose side is the shorter side.\n3. Resize it to 16 × 16 px" in plain
    assert "subtract the mean (0.485, 0.456, 0.406) and divide by the standard deviation (0.229, 0.224, 0.225)" in plain
    assert "uint8 [B, H, W, 3]: the graph normalises them" in pixels
    assert "subtract the mean" not in pixels
    data = export.trained.config.data
    config = replace(export.trained.config, data=replace(data, augment=replace(data.augment, eval_crop=0.875)))
    cropped = section(card_of(replace(export, trained=replace(export.trained, config=config))), "Preprocessing")
    assert "the centred square whose side is 0.875 of the shorter side" in cropped


def test_it_holds_all_settings_and_the_check(written: Callable[[str], tuple[Written, Export]]) -> None:
    made, export = written("timm")
    card = made.card.read_text()
    settings = json.loads(section(card, "Training").split("```json\n")[1].split("```")[0])
    assert settings["model"]["arch"] == "resnet18"
    assert made.parity is not None
    assert f"Checked: {made.parity.sentence()}." in card
    assert "the weights derive from them" in section(card, "Licence")
    assert export.trained.state["fingerprint"] in section(card, "Provenance")
    assert str(export.trained.run) not in card
