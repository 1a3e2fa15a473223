"""Predictions of image files are those of evaluation: the same logits to the bit, the same classes, the same confidence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bce3s.config import LossConfig
from bce3s.evaluate import evaluate
from bce3s.losses.terms import prior_shift
from bce3s.predict import Prediction, Predictor, confidence_of
from bce3s.train import TrainedNetwork, open_network
from pipelines.format import ShardSet
from pipelines.loaders import build_loader
from pipelines.types import BackendError
from tests.bce3s.train.runs import CONFIG, train


@pytest.fixture(scope="module")
def shards(make_shards: Any) -> ShardSet:
    found: ShardSet = make_shards(
        train=(24, 20, 16, 12), size=None, extension="jpg", test=11
    )  # 44 images of 40 to 79 px: batches of 16, 16 and 12
    return found


@pytest.fixture(scope="module", params=["resident", "dali"])
def network(request: pytest.FixtureRequest, shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> TrainedNetwork:
    """Of a short run that crops 14 of 16 pixels' worth, so that kept and cropped sizes differ."""
    run = tmp_path_factory.mktemp("run") / "one"
    data = replace(CONFIG.data, loader=request.param, augment=replace(CONFIG.data.augment, eval_crop=0.875))
    train(replace(CONFIG, epochs=1, data=data), shards, run)
    return open_network(run, device="cpu")


@pytest.fixture(scope="module")
def files(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    split, folder = shards.split("test"), tmp_path_factory.mktemp("files")
    paths = [folder / f"{i:05d}.jpg" for i in range(len(split))]
    for path, encoded in zip(paths, split.encoded(np.arange(len(split))), strict=True):
        path.write_bytes(encoded.tobytes())
    return [str(path) for path in paths]


@contextmanager
def seen_logits(network: TrainedNetwork) -> Iterator[list[torch.Tensor]]:
    """What leaves the network's classifier, batch by batch."""
    seen: list[torch.Tensor] = []
    hook = network.model.classifier.register_forward_hook(lambda module, inputs, logits: seen.append(logits.clone()))
    yield seen
    hook.remove()


def predicted(network: TrainedNetwork, paths: list[str], **options: Any) -> list[Prediction]:
    with closing(Predictor(network, **options)) as predictor:
        return list(predictor.predict(paths, pytest.fail))


def test_logits_are_those_of_evaluation_to_the_bit(network: TrainedNetwork, shards: ShardSet, files: list[str]) -> None:
    config = network.config
    loader = build_loader(shards, "test", config.data, seed=0, device=network.placement.device)
    with seen_logits(network) as evaluated:
        evaluate(network.model, loader, network.class_counts_K, config.data.augment, network.placement)
    loader.close()
    with seen_logits(network) as ours:
        found = predicted(network, files, top=1)
    assert [len(logits_BK) for logits_BK in ours] == [16, 16, 12]
    assert all(torch.equal(one, other) for one, other in zip(evaluated, ours, strict=True))
    assert [prediction.labels[0] for prediction in found] == torch.cat(evaluated).argmax(1).tolist()
    assert [prediction.path for prediction in found] == files


def test_probabilities_are_those_of_the_method(network: TrainedNetwork, files: list[str]) -> None:
    assert confidence_of(network) == "sigmoid"  # bce3s, never trained to be normalised over classes
    with seen_logits(network) as seen:
        sigmoids = predicted(network, files, top=9)
    logits_NK = torch.cat(seen)
    labels_NK = torch.tensor([prediction.labels for prediction in sigmoids])
    assert torch.equal(labels_NK, logits_NK.argsort(dim=1, descending=True, stable=True))  # 9 of 4 classes: all of them
    torch.testing.assert_close(torch.tensor([found.probabilities for found in sigmoids]), logits_NK.gather(1, labels_NK).sigmoid())
    by_ce = replace(network, config=replace(network.config, loss=LossConfig(name="ce")))
    softmaxes = predicted(by_ce, files, top=2)
    torch.testing.assert_close(
        torch.tensor([found.probabilities for found in softmaxes]), logits_NK.softmax(1).gather(1, labels_NK[:, :2]), rtol=1e-5, atol=1e-7
    )


def test_adjusted_logits_are_those_less_the_prior(network: TrainedNetwork, files: list[str]) -> None:
    with seen_logits(network) as seen:
        found = predicted(network, files, top=1, adjust_logits=40.0)
    logits_NK = torch.cat(seen) - prior_shift(torch.from_numpy(network.class_counts_K), 40.0)
    assert [prediction.labels[0] for prediction in found] == logits_NK.argmax(1).tolist()
    assert [prediction.labels[0] for prediction in found] != torch.cat(seen).argmax(1).tolist()


def test_other_batches_give_the_same_classes(network: TrainedNetwork, files: list[str]) -> None:
    one, other = predicted(network, files), predicted(network, files, batch_size=5)
    assert [found.path for found in other] == files
    for first, second in zip(one, other, strict=True):
        assert first.probabilities == pytest.approx(second.probabilities, abs=1e-5)


def test_a_stage_two_says_what_its_own_classifier_was_trained_on(network: TrainedNetwork, tmp_path: Path) -> None:
    assert network.run is not None
    folder = tmp_path / "stage2-crt"
    folder.mkdir()
    record = json.loads((network.run / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**record, "stage": 2}))
    config = json.loads(network.state["config"])
    for method, confidence in (("crt", "softmax"), ("bce", "sigmoid")):
        state = {**network.state, "config": json.dumps({**config, "retrain": {**config["retrain"], "method": method}})}
        assert confidence_of(replace(network, run=folder, state=state)) == confidence


def test_a_checkpoint_without_its_run_predicts_the_same(network: TrainedNetwork, files: list[str], tmp_path: Path) -> None:
    alone = Path(shutil.copy(network.path, tmp_path / "weights.safetensors"))
    moved = open_network(alone, device="cpu")
    assert moved.run is None
    assert predicted(moved, files) == predicted(network, files)


def test_outputs_that_are_not_numbers_are_one_sentence(network: TrainedNetwork, files: list[str]) -> None:
    bias = next(network.model.backbone.parameters())
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(torch.nan)
    try:
        with pytest.raises(BackendError, match=r"the outputs of .* are not finite numbers; predict with another checkpoint"):
            predicted(network, files[:2])
    finally:
        with torch.no_grad():
            bias.copy_(kept)
