"""BCE3S agrees with the reference's numbers: every term, the total, every gradient, the memory afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses import LossInputs, LossOutput, MixedTargets, fused_bce
from bce3s.losses.bce3s import BCE3SLoss
from bce3s.losses.terms import contrastive_bce, mixed_bce, source_bce
from bce3s.models import FeatureMemory, NormalizedClassifier, Projector

ORACLE = Path(__file__).resolve().parents[4] / "shared" / "oracle"
FILES = ["loss_all_classes.npz", "loss_class_subset.npz"]
GRADIENTS = {
    "grad_classifier_weight": ("classifier", "weight"),
    "grad_classifier_bias": ("classifier", "bias"),
    "grad_proj0_weight": ("projector", "hidden.weight"),
    "grad_proj0_bias": ("projector", "hidden.bias"),
    "grad_proj1_weight": ("projector", "output.weight"),
    "grad_proj1_bias": ("projector", "output.bias"),
}


@dataclass
class Heads:
    classifier: NormalizedClassifier
    projector: Projector
    feature_memory: FeatureMemory


@dataclass
class Case:
    arrays: dict[str, np.ndarray]
    heads: Heads
    features: Tensor
    targets: MixedTargets
    mask: Tensor
    loss: BCE3SLoss

    def expected(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))


def partner_labels(soft_targets_BK: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """The second label of each row, or the first where both are the same."""
    rest = soft_targets_BK.copy()
    rest[np.arange(len(labels_B)), labels_B] = 0
    return np.where(rest.max(1) > 0, rest.argmax(1), labels_B)


def load_case(name: str, dtype: torch.dtype) -> Case:
    if not ORACLE.is_dir():
        pytest.skip(f"the oracle numbers are not at {ORACLE}")
    with np.load(ORACLE / name) as stored:
        arrays = dict(stored)
    K, D, P = int(arrays["num_classes"]), int(arrays["feature_dim"]), int(arrays["projection_dim"])
    heads = Heads(NormalizedClassifier(D, K).to(dtype), Projector(D, P).to(dtype), FeatureMemory(K, P).to(dtype))
    parameters = {
        heads.classifier.weight: "classifier_weight",
        heads.classifier.bias: "classifier_bias",
        heads.projector.hidden.weight: "proj0_weight",
        heads.projector.hidden.bias: "proj0_bias",
        heads.projector.output.weight: "proj1_weight",
        heads.projector.output.bias: "proj1_bias",
        heads.feature_memory.rows_KP: "memory_before",
    }
    with torch.no_grad():
        for parameter, array in parameters.items():
            parameter.copy_(torch.from_numpy(arrays[array]))
    heads.feature_memory.filled_K.fill_(True)
    views = [torch.from_numpy(arrays[f"features_{view}"]) for view in ("source", "mixup", "cutmix")]
    labels = arrays["labels"]
    targets = MixedTargets(
        torch.from_numpy(labels),
        torch.from_numpy(partner_labels(arrays["soft_targets"], labels)),
        torch.tensor(float(arrays["lam"]), dtype=dtype),
    )
    mask = torch.zeros(K, dtype=torch.bool)
    mask[torch.from_numpy(arrays["class_subset"])] = True
    config = LossConfig(
        contrastive_weight=float(arrays["contrastive_weight"]),
        uniform_weight=float(arrays["uniform_weight"]),
        temperature=float(arrays["temperature"]),
        contrastive_warmup_epochs=0,
    )
    return Case(
        arrays, heads, torch.cat(views).to(dtype).requires_grad_(), targets, mask, BCE3SLoss(config, torch.ones(K, dtype=torch.int64))
    )


def run(case: Case) -> LossOutput:
    inputs = LossInputs(
        features_VD=case.features,
        mixup=case.targets,
        cutmix=case.targets,
        heads=case.heads,
        epoch=0,
        num_epochs=10,
        progress=torch.zeros(()),
        batch_labels_G=case.targets.labels_B,
        draw_key=torch.tensor(1),
    )
    return case.loss(inputs, class_mask_K=case.mask)


@pytest.fixture(params=["fastest", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss as it runs, and as it runs where there is no compiled kernel."""
    if request.param == "torch":
        monkeypatch.setattr(fused_bce, "_row_kernels", lambda device, dtype: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("way")
class TestOracle:
    def test_total_and_terms_agree(self, name: str, dtype: torch.dtype) -> None:
        case = load_case(name, dtype)
        total, terms, _ = run(case)
        joint = sum(case.expected(f"loss_joint_{view}") for view in ("source", "mixup", "cutmix")) / 3
        contrastive = case.expected("loss_contrastive_mixup") + case.expected("loss_contrastive_cutmix")
        for found, expected in [
            (terms["joint"], joint),
            (terms["contrastive"], contrastive),
            (terms["uniform"], case.expected("loss_uniform")),
            (total, case.expected("loss_total")),
        ]:
            torch.testing.assert_close(found.detach().double(), torch.as_tensor(expected).double(), **tolerance(dtype))

    def test_each_view_of_the_joint_and_contrastive_terms_agrees(self, name: str, dtype: torch.dtype) -> None:
        case = load_case(name, dtype)
        views = dict(zip(("source", "mixup", "cutmix"), case.features.detach().chunk(3), strict=True))
        memory = case.heads.feature_memory
        found = {"loss_joint_source": source_bce(case.heads.classifier(views["source"]), case.targets.labels_B, case.mask)}
        for view in ("mixup", "cutmix"):
            found[f"loss_joint_{view}"] = mixed_bce(case.heads.classifier(views[view]), case.targets)
            found[f"loss_contrastive_{view}"] = contrastive_bce(
                case.heads.projector(views[view]), memory.normalized(), case.targets, case.loss.config.temperature, 64.0, memory.filled_K
            )
        for term, value in found.items():
            torch.testing.assert_close(
                value.detach().double(), case.expected(term).double(), **tolerance(dtype), msg=lambda m, t=term: f"{t}: {m}"
            )

    def test_every_gradient_agrees(self, name: str, dtype: torch.dtype) -> None:
        case = load_case(name, dtype)
        total = run(case).total
        total.backward()
        assert case.features.grad is not None
        torch.testing.assert_close(case.features.grad.double(), case.expected("grad_features"), **tolerance(dtype))
        for array, (head, parameter) in GRADIENTS.items():
            gradient = getattr(case.heads, head).get_parameter(parameter).grad
            torch.testing.assert_close(gradient.double(), case.expected(array), **tolerance(dtype), msg=lambda m, a=array: f"{a}: {m}")

    def test_memory_afterwards_agrees(self, name: str, dtype: torch.dtype) -> None:
        case = load_case(name, dtype)
        projections = run(case).projections_BP
        assert projections is not None
        case.heads.feature_memory.update(projections, case.targets.labels_B)
        torch.testing.assert_close(case.heads.feature_memory.rows_KP.double(), case.expected("memory_after"), **tolerance(dtype))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("name", FILES)
def test_bf16_autocast_stays_near_the_reference(name: str) -> None:
    case = load_case(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = run(case).total
    total.backward()
    torch.testing.assert_close(total.detach().double(), case.expected("loss_total"), rtol=1e-2, atol=1e-2)
    gradients = {"grad_features": case.features.grad}
    gradients |= {array: getattr(case.heads, head).get_parameter(parameter).grad for array, (head, parameter) in GRADIENTS.items()}
    for array, gradient in gradients.items():
        expected = case.expected(array)
        assert gradient is not None, array
        assert (gradient.double() - expected).norm() / expected.norm() < 0.05, array
