"""BCE3S with one change each: what the field knows, at no more compute than the reference's recipe."""

from __future__ import annotations

from bce3s.recipes import contrastive_weight
from bce3s.reproduce.grid import AVERAGE, LAST, STAGE_TWO, Budget, Claim, Published, Row, Table

_WARMUP_SHARE = 0.1
_SCALED = ("data.batch_size", "optimizer.learning_rate", "optimizer.warmup_epochs")
_STAGE_ONE = Published(label="authors' log, stage one; last epoch, no TTA", all=54.73)
_STAGE_TWO = Published(label="authors' log, stage two, from another stage one than the log's; last epoch, no TTA", all=57.75)


def beyond_cifar100(budget: Budget) -> Table:
    """CIFAR100-LT, imbalance factor 100 (published: method.md, "Reference recipe"). Goal: 60.0 at the last epoch without TTA.

    The average of the weights and stage two are measured on the runs of the row `bce3s`: neither changes what stage one trains. What a row
    changes by a factor starts from the budget's value, or that of --set.
    """
    shards, base = budget.shards("cifar100-lt"), budget.base("cifar100-lt")
    warmup_epochs = max(1, round(_WARMUP_SHARE * base.epochs))
    average, weight = ("ema_decay=0.999",), contrastive_weight(shards.classes or 100)
    larger = (
        *(f"data.batch_size={4 * base.data.batch_size}", f"optimizer.learning_rate={4 * base.optimizer.learning_rate:g}"),
        f"optimizer.warmup_epochs={max(1.0, base.optimizer.warmup_epochs, 5 * base.epochs / 320):g}",
    )
    rows = [
        Row(name="bce3s", title="BCE3S", shards=shards, settings=average, published=_STAGE_ONE),
        Row(name="average", title="average of the weights, decay 0.999", shards=shards, settings=average, runs="bce3s", headline=AVERAGE),
    ]
    changes = (
        ("adjusted-0.5", "logit adjustment for sigmoids, τ = 0.5", ("loss.sigmoid_adjustment=0.5",)),
        ("adjusted-1", "logit adjustment for sigmoids, τ = 1", ("loss.sigmoid_adjustment=1.0",)),
        ("resampled-0.3", "partner stream resampled, exponent 0.3", ("data.order.resample_exponent=0.3",)),
        ("warm-up", f"contrastive term from epoch {warmup_epochs + 1} on", (f"loss.contrastive_warmup_epochs={warmup_epochs}",)),
        ("contrastive-weight", f"contrastive weight {weight:g} = 10/K²", (f"loss.contrastive_weight={weight:g}",)),
        ("area", "CutMix targets by the pasted area", ("data.augment.cutmix_area_correction=true",)),
        ("bias-prior", "biases start at −log(K − 1)", ("model.bias_prior=true",)),
        (f"batch-{4 * base.data.batch_size}", f"batch {4 * base.data.batch_size}, learning rate × 4, warm-up", larger),
    )
    rows += [
        Row(name=name, title=title, shards=shards, settings=(*average, *change), scales=_SCALED if change is larger else ())
        for name, title, change in changes
    ]
    stage_two = Row(
        name="stage-two",
        title="both stages",
        shards=shards,
        settings=average,
        runs="bce3s",
        stages=2,
        headline=STAGE_TWO + LAST,
        published=_STAGE_TWO,
    )
    claims = tuple(Claim(row.name, "bce3s") for row in (*rows[1:], stage_two))
    notes = ("One change each; the claims are what we hoped for, not what anybody has published, but for stage two.",)
    title = "CIFAR100-LT, imbalance factor 100: BCE3S and one change each"
    return Table(name="beyond-cifar100", title=title, budget=budget, rows=(*rows, stage_two), claims=claims, notes=notes)
