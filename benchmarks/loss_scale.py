"""How the terms of BCE3S and their gradients grow with the number of classes K, and where the contrastive term collapses.

python benchmarks/loss_scale.py [--seeds 3] [--json FILE]          # one CPU thread, a minute and a half; figures: benchmarks/loss_scale.md

Two states: "initial", fresh layers on features as behind a ReLU; "trained", rows near a simplex (K > D: a centred tight frame) with noise,
features near their rows at the scale where the source view's BCE is 1, memory and projections alike. Gradients are per sample and times the
length of what they are of (features, one row, projections), so that layers of any scale compare: the loss for a turn by one radian.

The collapse is that of a small network on drawn clusters that trains with the loss itself: |mean direction| of the memory's rows, which
is 1 where all classes share one.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from turns import current_commit

from bce3s.cli import run_app
from bce3s.config import LossConfig
from bce3s.losses import LossInputs, MixedTargets
from bce3s.losses.bce3s import BCE3SLoss
from bce3s.losses.terms import contrastive_bce, mixed_bce, source_bce
from bce3s.losses.uniform import uniform_term
from bce3s.models import FeatureMemory, NormalizedClassifier, Projector
from bce3s.recipes.class_scaling import contrastive_weight

SHAPES = ((10, 512), (100, 512), (365, 512), (1000, 512), (8142, 512), (100, 64), (1000, 64), (1000, 2048))
ALIGNMENT_CLASSES = (10, 100, 300, 1000)
NOISE = 0.3  # relative length, of rows, features, projections and memory in the trained state
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class State(NamedTuple):
    """Features of the three views [3B, D], raw rows [K, D], biases [K], projections of the mixed views [2B, P] and the memory [K, P]."""

    features_VD: Tensor
    weight_KD: Tensor
    bias_K: Tensor
    projections_VP: Tensor
    memory_KP: Tensor
    targets: MixedTargets


def draw_targets(num_classes: int, batch_size: int) -> MixedTargets:
    """Labels at random, λ = 0.7."""
    labels_B, partner_labels_B = torch.randint(0, num_classes, (2, batch_size))
    return MixedTargets(labels_B, partner_labels_B, torch.tensor(0.7))


def initial_state(num_classes: int, dim: int, batch_size: int, *, bias_prior: bool = False) -> State:
    """Fresh classifier and projector on features that are half zero, as ReLU leaves them; the memory holds other samples' projections."""
    classifier, projector = NormalizedClassifier(dim, num_classes), Projector(dim, 128)
    features_VD = torch.randn(3 * batch_size, dim).relu()
    with torch.no_grad():
        projections_VP, memory_KP = projector(features_VD[batch_size:]), projector(torch.randn(num_classes, dim).relu())
    bias_K = torch.full((num_classes,), -math.log(num_classes - 1)) if bias_prior else classifier.bias.detach()
    targets = draw_targets(num_classes, batch_size)
    return State(features_VD, classifier.weight.detach(), bias_K, projections_VP, functional.normalize(memory_KP, dim=1), targets)


def trained_state(num_classes: int, dim: int, batch_size: int) -> State:
    """Everything near its class's direction."""
    targets, rows_KD, memory_KP = draw_targets(num_classes, batch_size), spread(num_classes, dim), spread(num_classes, 128)
    unit_VD = noisy(torch.cat([rows_KD[targets.labels_B], *[mixture(rows_KD, targets)] * 2]))
    weight_KD = noisy(rows_KD)
    scale, bias = fitted(unit_VD[:batch_size] @ weight_KD.T, targets.labels_B)
    projections_VP = noisy(torch.cat([mixture(memory_KP, targets)] * 2))
    memory_KP = functional.normalize(noisy(memory_KP), dim=1)
    # nn.Linear's rows start at length √(1/3), and weight decay keeps them short.
    bias_K = torch.full((num_classes,), bias)
    return State(scale * unit_VD, weight_KD / math.sqrt(3), bias_K, projections_VP, memory_KP, targets)


def spread(num_classes: int, dim: int) -> Tensor:
    """Unit rows [K, D] of mean zero: the simplex where K ≤ D, else equal in all directions as nearly as a few rounds make them."""
    rows_KD = torch.randn(num_classes, dim)
    if num_classes <= dim:
        rows_KD = torch.linalg.qr(rows_KD.T).Q.T
    for _ in range(8):
        rows_KD = functional.normalize(rows_KD - rows_KD.mean(0), dim=1)
        if num_classes > dim:
            values_D, vectors_DD = torch.linalg.eigh(rows_KD.T @ rows_KD)
            rows_KD = rows_KD @ (vectors_DD * values_D.rsqrt()) @ vectors_DD.T
    return functional.normalize(rows_KD - rows_KD.mean(0), dim=1)


def noisy(rows_RD: Tensor) -> Tensor:
    """Unit rows with noise of relative length NOISE."""
    return functional.normalize(rows_RD + NOISE * functional.normalize(torch.randn_like(rows_RD), dim=1), dim=1)


def mixture(rows_KD: Tensor, targets: MixedTargets) -> Tensor:
    """[B, D]."""
    return functional.normalize(targets.lam * rows_KD[targets.labels_B] + (1 - targets.lam) * rows_KD[targets.partner_labels_B], dim=1)


def fitted(cosines_BK: Tensor, labels_B: Tensor) -> tuple[float, float]:
    """The features' length and the bias at which the positive and all negatives cost one half each, by bisection in both."""

    def costs(scale: float, bias: float) -> tuple[float, float]:
        logits_BK = scale * cosines_BK + bias
        positive_B = logits_BK.gather(1, labels_B[:, None])[:, 0]
        negatives = functional.softplus(logits_BK).sum(1) - functional.softplus(positive_B)
        return functional.softplus(-positive_B).mean().item(), negatives.mean().item()

    def bias_of(scale: float) -> float:
        return bisected(lambda bias: costs(scale, bias)[1] - 0.5, -200.0, 20.0)

    scale = bisected(lambda scale: 0.5 - costs(scale, bias_of(scale))[0], 0.0, 200.0)
    return scale, bias_of(scale)


def bisected(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where `rising` crosses 0."""
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def measure(state: State) -> dict[str, float]:
    """Values of the terms, unweighted, and their gradients times lengths: by features, by projections, and by the classifier's rows."""
    features_VD, weight_KD, projections_VP = (
        part.clone().requires_grad_() for part in (state.features_VD, state.weight_KD, state.projections_VP)
    )
    batch_size, num_classes, targets = len(state.targets.labels_B), len(state.bias_K), state.targets
    rows_KD, filled_K = functional.normalize(weight_KD, dim=1, eps=1e-5), torch.ones(num_classes, dtype=torch.bool)
    source_BK, mixup_BK, cutmix_BK = functional.linear(features_VD, rows_KD, state.bias_K).chunk(3)
    joint = (source_bce(source_BK, targets.labels_B, filled_K) + mixed_bce(mixup_BK, targets) + mixed_bce(cutmix_BK, targets)) / 3
    uniform = uniform_term(rows_KD)
    views = [contrastive_bce(part, state.memory_KP, targets, 1.0, 64.0, filled_K) for part in projections_VP.chunk(2)]
    contrastive = views[0] + views[1]
    by_features, joint_by_rows = torch.autograd.grad(joint, [features_VD, weight_KD], retain_graph=True)
    (uniform_by_rows,) = torch.autograd.grad(uniform, weight_KD)
    (by_projections,) = torch.autograd.grad(contrastive, projections_VP)
    return {
        "joint": joint.item(),
        "uniform": uniform.item(),
        "contrastive": contrastive.item(),
        "joint_by_features": 3 * batch_size * per_radian(by_features, features_VD),
        "contrastive_by_projections": batch_size * per_radian(by_projections, projections_VP),
        "joint_by_row": per_radian(joint_by_rows, weight_KD),
        "uniform_by_row": per_radian(uniform_by_rows, weight_KD),
    }


def per_radian(gradient_RD: Tensor, rows_RD: Tensor) -> float:
    """Root mean square over rows of the gradient across the row, times the row's length."""
    units_RD = functional.normalize(rows_RD.detach(), dim=1)
    across_RD = gradient_RD - (gradient_RD * units_RD).sum(1, keepdim=True) * units_RD
    return float((across_RD.norm(dim=1) * rows_RD.detach().norm(dim=1)).square().mean().sqrt())


def memory_alignment(num_classes: int, weight: float, *, batch_size: int = 128, seed: int = 0, num_steps: int = 200) -> float:
    """|mean direction| of the memory's rows after training a small network whose memory filled for 50 steps before the term joined.

    Clusters in 128 dimensions, imbalance factor 100, biases at the prior, SGD with momentum 0.9 at rate 0.1 and decay 5e-4.
    """
    torch.manual_seed(seed)
    centres_KI = torch.randn(num_classes, 128)
    layers = [nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU()]
    network, memory = nn.Sequential(*layers), FeatureMemory(num_classes, 128)
    heads: Any = SimpleNamespace(classifier=NormalizedClassifier(64, num_classes), projector=Projector(64, 128), feature_memory=memory)
    nn.init.constant_(heads.classifier.bias, -math.log(num_classes - 1))
    parameters = [*network.parameters(), *heads.classifier.parameters(), *heads.projector.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    loss = BCE3SLoss(LossConfig(contrastive_weight=weight), torch.ones(num_classes, dtype=torch.int64))
    shares_K = 100.0 ** (-torch.arange(num_classes) / (num_classes - 1))
    for step in range(num_steps):
        labels_B, partner_labels_B = torch.multinomial(shares_K, 2 * batch_size, replacement=True).chunk(2)
        images_BI, partners_BI = (centres_KI[part] + 0.7 * torch.randn(batch_size, 128) for part in (labels_B, partner_labels_B))
        lam, box_I = torch.rand(()), torch.rand(128)
        mixed_BI, pasted_BI = torch.lerp(partners_BI, images_BI, lam), torch.where(box_I < lam, images_BI, partners_BI)
        targets = MixedTargets(labels_B, partner_labels_B, lam)
        inputs = LossInputs(
            features_VD=network(torch.cat([images_BI, mixed_BI, pasted_BI])),
            mixup=targets,
            cutmix=targets,
            heads=heads,
            epoch=int(step >= 50),
            num_epochs=2,
            progress=torch.zeros(()),
            batch_labels_G=labels_B,
            draw_key=torch.tensor(step),
        )
        output = loss(inputs)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        assert output.projections_BP is not None, "the term is on"
        memory.update(output.projections_BP, labels_B)
    return float(memory.normalized()[memory.filled_K].mean(0).norm())


def spread_of(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    return f"{statistics.fmean(values):.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


@app.command()
def main(
    seeds: Annotated[int, typer.Option(help="Draws of each state, and trainings of each weight.")] = 3,
    batch_size: Annotated[int, typer.Option(help="B of the states.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure and print markdown tables."""
    figures: dict[str, Any] = {"torch": torch.__version__, "commit": current_commit(), "seeds": seeds, "batch": batch_size}
    states = {"initial": initial_state, "initial, bias prior": prior_state, "trained": trained_state}
    for name, build in states.items():
        for number, (num_classes, dim) in enumerate(SHAPES):
            found = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                found.append(measure(build(num_classes, dim, batch_size)))
            row = figures[f"{name}, K {num_classes}, D {dim}"] = {key: [each[key] for each in found] for key in found[0]}
            if number == 0:
                print(f"\n{name}: {' | '.join(['K', 'D', *row])}")
            print(f"| {num_classes} | {dim} | {' | '.join(map(spread_of, row.values()))} |", flush=True)
    print("\n|mean direction| of the memory after 200 steps: K | the recipes' weight | larger ones")
    for num_classes in ALIGNMENT_CLASSES:
        own = contrastive_weight(num_classes)
        weights = sorted({own, *(weight for weight in (10 * own, 100 * own) if weight <= 0.1)})
        reached = {weight: [memory_alignment(num_classes, weight, seed=seed) for seed in range(seeds)] for weight in weights}
        figures[f"alignment, K {num_classes}"] = {f"{weight:g}": values for weight, values in reached.items()}
        print(
            f"| {num_classes} | " + " | ".join(f"{weight:.2g}: {spread_of(values)}" for weight, values in reached.items()) + " |",
            flush=True,
        )
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def prior_state(num_classes: int, dim: int, batch_size: int) -> State:
    """The initial state with biases at −log(K − 1)."""
    return initial_state(num_classes, dim, batch_size, bias_prior=True)


if __name__ == "__main__":
    run_app(app)
