"""The loss in a loop that is not ours is the loss of the trainer, to the last bit; and it stands on its own."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bce3s.config import LossConfig
from bce3s.losses import BCE3SLoss, LossDefaults, LossInputs, LossOutput, StandaloneLoss, loss_class
from pipelines.types import ConfigError
from tests.bce3s.losses.cases import METHODS
from tests.bce3s.test_step import SMALL, batches_for, step_for

COUNTS = (40, 20, 9, 5)


def features_and_labels(num_rows: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, 16, generator=generator), torch.randint(0, 4, (num_rows,), generator=generator)


def fresh(**settings: Any) -> StandaloneLoss:
    torch.manual_seed(0)
    return BCE3SLoss.for_classes(COUNTS, feature_dim=16, projection_dim=8, **settings)


def gradients(*modules: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_trainers_loss_bit_for_bit(make_shards: Any, name: str) -> None:
    """Totals, terms and gradients of three steps, the feature memory of the last among them, in the second epoch of two."""
    shards, config = make_shards(train=COUNTS), replace(SMALL, loss=LossConfig(name=name))
    step = step_for(config)
    loss = StandaloneLoss(loss_class(name), [1] * 4, step.model.backbone.feature_dim, config.loss, projection_dim=16, num_epochs=2)
    loss.load_state_dict({k: v for k, v in step.model.state_dict().items() if not k.startswith("backbone.")}, strict=False)
    backbone = copy.deepcopy(step.model.backbone)
    batches, num_steps = batches_for(shards, config, epoch=1)
    for batch in batches[:3]:
        step.schedule(batch, num_steps)
        views, (labels_B, partner_labels_B) = step.views(batch), batch.labels_S.chunk(2)
        assert batch.mix is not None
        expected = step.evaluate_loss(views, batch)
        step.backward(expected.total)
        step._remember([expected], labels_B)
        loss.draw_key.copy_(step._draw_key)
        backbone.zero_grad()
        loss.zero_grad()
        total, terms = loss(backbone(views), labels_B, partner_labels_B, batch.mix[0], batch.mix[1], epoch=1)
        total.backward()
        assert torch.equal(total, expected.total)
        assert {key: value.item() for key, value in terms.items()} == {key: value.item() for key, value in expected.terms.items()}
        model = step.model
        pairs = zip(
            gradients(backbone, loss.classifier, loss.projector, loss.method_head),
            gradients(model.backbone, model.classifier, model.projector, model.method_head),
            strict=True,
        )
        assert all(one is other or (one is not None and other is not None and torch.equal(one, other)) for one, other in pairs)
    assert torch.equal(loss.feature_memory.rows_KP, step.model.feature_memory.rows_KP)
    assert loss.feature_memory.filled_K.any() == (name in ("bce3s", "tsl"))


def test_images_that_nothing_is_mixed_into_stand_for_all_three_views() -> None:
    features_BD, labels_B = features_and_labels()
    plain, written_out = fresh(), fresh()
    for _ in range(2):  # the second time against what the memory holds
        one, other = plain(features_BD, labels_B)[0], written_out(features_BD.repeat(3, 1), labels_B, labels_B, 1.0)[0]
        assert torch.equal(one, other)
    assert "contrastive" in plain(features_BD, labels_B)[1]


def test_classes_and_backbone_are_learned_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    images, labels_N = torch.randn(120, 10), torch.arange(4).repeat_interleave(30)
    images += 4 * torch.eye(4, 10)[labels_N]
    backbone, loss = nn.Linear(10, 16), fresh()
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    for _ in range(30):
        total, _ = loss(backbone(images), labels_N)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    accuracy = (loss.classifier(backbone(images)).argmax(1) == labels_N).float().mean()
    assert accuracy > 0.9  # chance is 0.25
    assert not any(torch.equal(parameter, old) for parameter, old in zip(loss.parameters(), before, strict=True))


def test_what_is_saved_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    through, resumed = (BCE3SLoss.for_classes([5] * 40, feature_dim=16, negative_ratio=0.3) for _ in range(2))
    steps = [features_and_labels(3, seed) for seed in range(4)]
    for step in steps[:2]:
        through(*step)
    torch.save(through.state_dict(), tmp_path / "loss.pth")
    resumed.load_state_dict(torch.load(tmp_path / "loss.pth", weights_only=True))
    for step in steps[2:]:
        assert torch.equal(through(*step)[0], resumed(*step)[0])


def test_steps_draw_other_classes_and_evaluation_leaves_no_trace() -> None:
    loss = BCE3SLoss.for_classes([5] * 40, feature_dim=16, negative_ratio=0.3, uniform_weight=0.0, contrastive_weight=0.0)
    features_BD, labels_B = features_and_labels()
    assert len({loss(features_BD, labels_B)[0].item() for _ in range(5)}) == 5
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()
    assert loss(features_BD, labels_B)[0] == loss(features_BD, labels_B)[0]
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


class _SavesTheMemory(LossDefaults):
    """A method whose backward pass reads which classes the memory held."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        pass

    def __call__(self, inputs: LossInputs) -> LossOutput:
        logits_VK = inputs.heads.classifier(inputs.features_VD)
        total = torch.where(inputs.heads.feature_memory.filled_K, logits_VK, 2 * logits_VK).sum()
        return LossOutput(total, {}, inputs.heads.projector(inputs.features_VD[: len(inputs.batch_labels_G)]).detach())


def test_a_backward_pass_sees_the_memory_as_its_forward_pass_did() -> None:
    loss, (features_BD, labels_B) = StandaloneLoss(_SavesTheMemory, COUNTS, 16), features_and_labels()
    loss(features_BD, labels_B)[0].backward()
    assert loss.classifier.bias.grad is not None
    assert loss.classifier.bias.grad.tolist() == [2 * 3 * len(labels_B)] * 4
    assert loss.feature_memory.filled_K.sum() == len(labels_B.unique())


def test_under_autocast_the_loss_stays_near_and_the_memory_is_kept_in_float32() -> None:
    features_BD, labels_B = features_and_labels()
    wide, narrow = fresh(), fresh()
    for _ in range(2):
        expected, _ = wide(features_BD, labels_B)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, _ = narrow(features_BD, labels_B)
        total.backward()
    assert total.dtype == narrow.feature_memory.rows_KP.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_counts_come_as_anything_that_holds_numbers_and_shift_what_the_method_shifts(kind: Any) -> None:
    loss = BCE3SLoss.for_classes(kind([90, 9, 1]), feature_dim=16, sigmoid_adjustment=1.0)
    balanced = BCE3SLoss.for_classes([30, 30, 30], feature_dim=16, sigmoid_adjustment=1.0)
    balanced.load_state_dict(loss.state_dict())
    features_BD = features_and_labels()[0]
    labels_B = torch.tensor([2] * 6)
    assert loss(features_BD, labels_B)[1]["joint"] > balanced(features_BD, labels_B)[1]["joint"]


@pytest.mark.cuda
def test_it_follows_its_module_to_the_device() -> None:
    loss = fresh(sigmoid_adjustment=1.0)
    features_BD, labels_B = features_and_labels()
    expected = loss(features_BD, labels_B)[0]
    moved = fresh(sigmoid_adjustment=1.0).cuda()
    torch.testing.assert_close(moved(features_BD.cuda(), labels_B.cuda())[0].cpu(), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_go_together_is_one_sentence() -> None:
    features_BD, labels_B = features_and_labels()
    with pytest.raises(
        ConfigError, match=r"^6 rows of features do not go with 4 labels: called so, the loss takes one feature row a label$"
    ):
        fresh()(features_BD, labels_B[:4])
    with pytest.raises(ConfigError, match=r"called so, the loss takes three views of each image$"):
        fresh()(features_BD, labels_B, labels_B)
    with pytest.raises(ConfigError, match=r"called so, the loss takes two augmentations of each image$"):
        loss_class("bcl").for_classes(COUNTS, 16)(features_BD, labels_B)
    with pytest.raises(ConfigError, match=r"^unknown setting 'temprature'; known here: name, joint"):
        BCE3SLoss.for_classes(COUNTS, 16, temprature=0.1)
    with pytest.raises(ConfigError, match=r"^class_counts holds the training images of each class"):
        BCE3SLoss.for_classes([], 16)
    for counts in ([0.7, 0.2, 0.1], [-1, 5], [0, 0]):
        with pytest.raises(ConfigError, match=r"^class_counts holds whole numbers of images, none below 0 and not all 0$"):
            BCE3SLoss.for_classes(torch.tensor(counts), 16)
    with pytest.raises(ConfigError, match=r"^features are \[\., 16\] here, not \[6, 15\]$"):
        fresh()(features_BD[:, 1:], labels_B)
    with pytest.raises(ConfigError, match=r"^feature_dim 0 and projection_dim 128 must be positive$"):
        BCE3SLoss.for_classes(COUNTS, 0)
