"""CIFAR10-LT and CIFAR100-LT: the reference recipe, a fast one, and one for a CPU.

The imbalance factor is a property of the shards (`make_shards.py --imbalance-factor`), so each recipe serves 10, 50 and 100. Published for
BCE3S after both stages, which includes flip TTA and the best epoch on test as far as the authors' log shows (traps.md A2, A3), top-1 in
%; none is measured here:

    imbalance factor        100      50      10
    CIFAR10-LT            90.08       ?       ?     figure not found
    CIFAR100-LT           59.50   65.23   76.13

Stage two is the authors' defaults, those of their log: 10 epochs, rate 1e-4, β = 0.99999, 0.4 of the classes. Their run_stage2.sh has 20
epochs and β = 0.9999, their run_full_pipeline.sh 40 epochs from the epoch that was best on test (field.md 2.1).
"""

from __future__ import annotations

from bce3s.config import LossConfig, ModelConfig, OptimizerConfig, RetrainConfig, TrainConfig
from bce3s.recipes.class_scaling import PUBLISHED_WEIGHT, contrastive_weight
from pipelines.config import AugmentConfig, DataConfig

# Trap B2: the reference normalises CIFAR-100 with these, CIFAR-10's mean and a widely copied std; kept for comparability.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)

# The rate and weight decay are the method's own, so that --set retrain.method=crt has those of cRT.
STAGE_TWO = RetrainConfig(method="bce", epochs=10, batch_size=64, effective_number_beta=0.99999, negative_ratio=0.4)


def cifar10lt_resnet20_40ep() -> TrainConfig:
    """CIFAR10-LT on a CPU: the smallest of the field's networks, crop and flip only. Figures: benchmarks/cpu.md."""
    return TrainConfig(
        dataset="cifar10-lt",
        epochs=40,
        data=_cifar_data(policy="none", cutout=0),
        model=ModelConfig(arch="resnet20-cifar"),
        optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=5e-4, warmup_epochs=1),
        retrain=STAGE_TWO,
    )


def cifar10lt_resnet34_320ep() -> TrainConfig:
    """The reference recipe on CIFAR10-LT; not measured here.

    Published for imbalance factor 100, both stages: 90.08, which includes flip TTA and the best epoch on test as far as the authors' log
    shows.
    """
    return _reference("cifar10-lt")


def cifar100lt_resnet34_320ep() -> TrainConfig:
    """The reference recipe (method.md; the authors' log, imbalance factor 100). Not measured here.

    Published by the authors' log, stage one: last epoch 54.73 without TTA, 55.43 with flip TTA; best on test 55.81 with flip TTA (83.11
    many, 56.51 medium, 23.13 few), 90 minutes, GPU not stated. Stage two: last epoch 57.75, best on test 58.32 without TTA, 59.20 with flip
    TTA (77.37, 55.03, 42.87), from another stage one than the log's (traps.md A10), 44 s.

    λ_ss is the published 0.1, at which projections collapse and the contrastive term ends as a constant; the total of the authors' log
    is what such a run reads (docs/methods.md, "How the weights scale with K").
    """
    return _reference("cifar100-lt")


def cifar10lt_resnet34_100ep() -> TrainConfig:
    """The fast recipe on CIFAR10-LT: see `cifar100lt_resnet34_100ep`. Not measured."""
    return _fast("cifar10-lt", num_classes=10)


def cifar100lt_resnet34_100ep() -> TrainConfig:
    """The fast recipe: the reference's network and augmentation for 100 epochs. Not measured: nothing is promised.

    Batches of 256 with Nesterov's momentum, warm-up, a rate that changes every step, bf16 where the device has it, channels-last. The rate
    of 0.1 keeps what weight decay does over the run: rate × decay × steps is 2.2, the reference's 2.7; norms and biases are spared it.
    Biases start at the prior, and λ_ss is that of `contrastive_weight`.
    """
    return _fast("cifar100-lt", num_classes=100)


def _cifar_data(policy: str, cutout: int, batch_size: int = 64) -> DataConfig:
    """Pad-and-crop, flip, and optionally AutoAugment and Cutout, at 32 px."""
    augment = AugmentConfig(crop="pad", padding=4, policy=policy, cutout=cutout, mean=CIFAR_MEAN, std=CIFAR_STD, eval_crop=1.0)
    return DataConfig(batch_size=batch_size, image_size=32, augment=augment)


def _reference(dataset: str) -> TrainConfig:
    return TrainConfig(
        dataset=dataset,
        epochs=320,
        precision="fp32",
        data=_cifar_data(policy="autoaugment-cifar10", cutout=16),
        model=ModelConfig(arch="resnet34-small-stem"),
        loss=LossConfig(contrastive_weight=PUBLISHED_WEIGHT, uniform_weight=1.0, temperature=1.0, negative_ratio=0.4),
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=5e-3, schedule="epoch"),
        retrain=STAGE_TWO,
    )


def _fast(dataset: str, num_classes: int) -> TrainConfig:
    return TrainConfig(
        dataset=dataset,
        epochs=100,
        eval_every=10,
        data=_cifar_data(policy="autoaugment-cifar10", cutout=16, batch_size=256),
        model=ModelConfig(arch="resnet34-small-stem", bias_prior=True),
        loss=LossConfig(contrastive_weight=contrastive_weight(num_classes)),
        optimizer=OptimizerConfig(learning_rate=0.1, nesterov=True, weight_decay=5e-3, decay_norm_and_bias=False, warmup_epochs=5),
        retrain=STAGE_TWO,
    )
