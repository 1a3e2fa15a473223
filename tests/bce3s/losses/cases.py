"""One call of any method on random features, and the two targets of a mixed row written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.heads import FeatureMemory, Projector, build_classifier
from bce3s.losses import LOSSES, LossInputs, LossOutput, MixedTargets, Share, build_loss, loss_class

# What whole steps are tried with each time: all terms and the kernels, the plainest, and phases with a scaled cosine. To a step the others
# are variations of these, and `tests/bce3s/test_methods.py` tries those with layers of their own.
REPRESENTATIVE = ("bce3s", "ce", "ldam-drw")
METHODS = [name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]

COUNTS = [400, 90, 33, 7, 1, 0]  # the last class has no training images


def heads_for(K: int, D: int = 16, P: int = 8, device: str = "cpu", name: str = "bce3s") -> Any:
    torch.manual_seed(0)
    method = loss_class(name)
    heads = {"classifier": build_classifier(method.classifier, D, K), "projector": Projector(D, P), "feature_memory": FeatureMemory(K, P)}
    heads["method_head"] = method.build_head(LossConfig(name=name), D, K) or torch.nn.Identity()
    return SimpleNamespace(**{part: head.to(device) for part, head in heads.items()})


def targets_for(labels: list[int], partners: list[int], lam: float) -> MixedTargets:
    return MixedTargets(torch.tensor(labels), torch.tensor(partners), torch.tensor(lam))


def dense(targets: MixedTargets, K: int) -> Tensor:
    """The soft target [B, K] written out."""
    own, other = (functional.one_hot(labels, K).float() for labels in (targets.labels_B, targets.partner_labels_B))
    return targets.lam * own + (1 - targets.lam) * other


def inputs_for(features_VD: Tensor, targets: MixedTargets, heads: Any, epoch: int = 1, share: Share | None = None) -> LossInputs:
    """One step's inputs, epoch `epoch` of 10; both mixed views have the same targets."""
    return LossInputs(
        features_VD=features_VD,
        mixup=targets,
        cutmix=targets,
        heads=heads,
        epoch=epoch,
        num_epochs=10,
        progress=torch.tensor(epoch / 10, device=features_VD.device),
        batch_labels_G=targets.labels_B,
        draw_key=torch.tensor(7, device=features_VD.device),
        share=share or Share(),
    )


def run(
    name: str,
    K: int = 10,
    B: int = 6,
    epoch: int = 1,
    heads: Any = None,
    scale: float = 1.0,
    share: Share | None = None,
    device: str = "cpu",
    counts: list[int] | None = None,
    **settings: Any,
) -> tuple[LossOutput, Tensor]:
    """The loss of one batch and its features, which want their gradient; one image a class without `counts`."""
    heads = heads or heads_for(K, device=device, name=name)
    generator = torch.Generator().manual_seed(1)
    num_views = 3 if loss_class(name).views == "mixed" else 2
    features = (scale * torch.randn(num_views * B, 16, generator=generator)).to(device).requires_grad_()
    labels, partners = (torch.randint(0, K, (B,), generator=generator).to(device) for _ in range(2))
    targets = MixedTargets(labels, partners, torch.tensor(0.3, device=device))
    class_counts = torch.ones(K, dtype=torch.int64, device=device) if counts is None else torch.tensor(counts, device=device)
    loss = build_loss(LossConfig(name=name, **settings), class_counts)
    return loss(inputs_for(features, targets, heads, epoch, share)), features


def remember(heads: Any, output: LossOutput) -> None:
    """What the step does once it is done; `run` draws these labels."""
    generator = torch.Generator().manual_seed(1)
    torch.randn(18, 16, generator=generator)
    assert output.projections_BP is not None
    heads.feature_memory.update(output.projections_BP, torch.randint(0, 10, (6,), generator=generator))


def host_reads(profile: torch.profiler.profile) -> list[str]:
    """Kernels that waited for the device, by name."""
    return [event.key for event in profile.key_averages() if event.key in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")]


class Logits:
    """Stands for a classifier: the features are the logits, so that a method can be asked about given ones; of some scale."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, features_BD: Tensor) -> Tensor:
        return features_BD * 1

    def normalized_weight(self) -> Tensor:
        raise NotImplementedError


def on_logits(
    name: str, logits_VK: Tensor, targets: MixedTargets, counts: list[int], epoch: int = 1, scale: float = 1.0, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Total and its gradient by the logits [3B, K] of the three views."""
    leaf = logits_VK.clone().requires_grad_()
    inputs = inputs_for(leaf, targets, SimpleNamespace(classifier=Logits(scale)), epoch)
    total = build_loss(LossConfig(name=name, **settings), torch.tensor(counts))(inputs).total
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def random_batch(
    K: int = len(COUNTS), B: int = 4, seed: int = 0, lam: float = 0.3, dtype: Any = torch.float64
) -> tuple[Tensor, MixedTargets]:
    """Logits [3B, K] of the three views, and targets; the first row's labels are one class."""
    generator = torch.Generator().manual_seed(seed)
    labels, partners = torch.randint(0, K, (2, B), generator=generator)
    partners[0] = labels[0]
    return 3 * torch.randn(3 * B, K, generator=generator, dtype=dtype), MixedTargets(labels, partners, torch.tensor(lam, dtype=dtype))


def written_out(logits_VK: Tensor, targets: MixedTargets, label_loss: Any) -> tuple[Tensor, Tensor]:
    """Mean over all rows of λ·label_loss(z, y) + (1−λ)·label_loss(z, y'), row by row in a loop, and its gradient by the logits.

    Args:
        logits_VK: [3B, K]; the source view has its own label alone.
        targets: of both mixed views.
        label_loss: from the logits [K] of a row and one label, a plain number of Python, to the loss [].
    """
    leaf, B = logits_VK.clone().requires_grad_(), len(targets.labels_B)
    total = torch.zeros((), dtype=logits_VK.dtype)
    for row, z_K in enumerate(leaf):
        own, other = int(targets.labels_B[row % B]), int(targets.partner_labels_B[row % B])
        lam = 1.0 if row < B else float(targets.lam)
        total = total + lam * label_loss(z_K, own) + (1 - lam) * label_loss(z_K, other)
    total = total / len(leaf)
    return total.detach(), torch.autograd.grad(total, leaf)[0]
