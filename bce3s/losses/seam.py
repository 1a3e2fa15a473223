"""What every loss is given and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

from torch import Tensor, nn

from bce3s.config import LossConfig, from_dict
from pipelines.types import IntArray

if TYPE_CHECKING:
    from bce3s.losses.standalone import StandaloneLoss


@dataclass(frozen=True)
class MixedTargets:
    """The soft target t = λ·onehot(labels) + (1−λ)·onehot(partner_labels) without its [B, K] matrix.

    Args:
        labels_B, partner_labels_B: int64 [B].
        lam: float32 [] on the device, in [0, 1]; [B] where rows differ.
    """

    labels_B: Tensor
    partner_labels_B: Tensor
    lam: Tensor


class LossOutput(NamedTuple):
    """What a loss gives back.

    Args:
        total: float32 [], what is differentiated.
        terms: detached float32 [] for the log, before their weights.
        projections_BP: of the source view, detached, which the step writes into the feature memory once the whole batch is done; None
            where the loss keeps none.
    """

    total: Tensor
    terms: dict[str, Tensor]
    projections_BP: Tensor | None = None


class Phase(NamedTuple):
    """A stretch of epochs in which a loss computes the same thing: one captured graph, one set of parameters with gradients."""

    name: str
    trains_projector: bool


@dataclass(frozen=True)
class Share:
    """Which of `count` parts of the step's batch this is: ranks times micro-batches.

    The step sums the totals of all parts, each by its `weight`, its share of the images. A term that does not depend on the batch may
    compute its part number `index` only, divided by `weight`.
    """

    index: int = 0
    count: int = 1
    weight: float = 1.0


class Classifier(Protocol):
    """Features to logits."""

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Logits [B, K]."""
        ...

    @property
    def scale(self) -> float:
        """What logits are multiplied by, the unit of margins: 1 unless the classifier is a scaled cosine."""
        ...

    def normalized_weight(self) -> Tensor:
        """L2-normalised rows [K, D]."""
        ...


class Projector(Protocol):
    """Features to the space of the contrastive term."""

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Projections [B, P]."""
        ...


class FeatureMemory(Protocol):
    """One projection a class."""

    filled_K: Tensor

    def normalized(self) -> Tensor:
        """L2-normalised rows [K, P], float32; zeros where a class is not filled."""
        ...


class Heads(Protocol):
    """What a loss may use of the model beside the features."""

    @property
    def classifier(self) -> Classifier:
        """Of the kind that `model.classifier` says."""
        ...

    @property
    def projector(self) -> Projector:
        """Projector of the contrastive term."""
        ...

    @property
    def feature_memory(self) -> FeatureMemory:
        """Feature memory of the contrastive term."""
        ...

    @property
    def method_head(self) -> nn.Module:
        """What the method's own `build_head` built."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What one step hands to its loss: one share of the batch.

    Args:
        features_VD: [3B, D], the views source, mixup and cutmix one after the other; of a method with views "pair" [2B, D], two
            augmentations of the same images.
        mixup: target of the mixup view; its `labels_B` are the labels of the source view.
        cutmix: target of the cutmix view.
        heads: of the model.
        epoch: from 0; only its phase may matter.
        num_epochs: of the whole run.
        progress: float32 [] on the features' device, share of the epochs that is done: what changes from epoch to epoch within a phase.
        batch_labels_G: int64 [G], labels of the source view of the whole batch, over all shares.
        draw_key: int64 [] on the features' device, a number of its own for every step and the same on every rank: what a loss draws is a
            function of it, so that nothing depends on a generator's state.
        share: which part of the batch this is.
    """

    features_VD: Tensor
    mixup: MixedTargets
    cutmix: MixedTargets
    heads: Heads
    epoch: int
    num_epochs: int
    progress: Tensor
    batch_labels_G: Tensor
    draw_key: Tensor
    share: Share = Share()


class LossDefaults:
    """What most methods have in common: the three views, the normalised classifier, no layers of their own, one phase, no known floor."""

    views: ClassVar[str] = "mixed"
    classifier: ClassVar[str] = "normalized"
    needs_its_classifier: ClassVar[bool] = False

    @classmethod
    def for_classes(
        cls, class_counts_K: Sequence[int] | IntArray | Tensor, feature_dim: int, *, projection_dim: int = 128, **settings: Any
    ) -> StandaloneLoss:
        """This loss for a training loop of one's own, with its classifier, projector and feature memory; see `StandaloneLoss`.

        Args:
            class_counts_K: training images of each class, whole numbers [K].
            feature_dim: D of the features it will be given.
            projection_dim: P.
            settings: of `LossConfig`, such as `negative_ratio=1.0`.

        Raises:
            ConfigError: a setting or size that cannot be.
        """
        from bce3s.losses.standalone import StandaloneLoss  # which is made of what this file says

        config = from_dict(LossConfig, settings)
        return StandaloneLoss(cast("type[Loss]", cls), class_counts_K, feature_dim, config, projection_dim=projection_dim)

    @staticmethod
    def build_head(config: LossConfig, feature_dim: int, num_classes: int) -> nn.Module | None:
        """See `Loss`."""
        del config, feature_dim, num_classes
        return None

    def floors(self, num_classes: int) -> dict[str, float]:
        """See `Loss`."""
        del num_classes
        return {}

    def phase(self, epoch: int, num_epochs: int) -> Phase:
        """See `Loss`."""
        del epoch, num_epochs
        return Phase("full", trains_projector=False)


class Loss(Protocol):
    """One method.

    Attributes:
        views: "mixed" trains on source, mixup and cutmix; "pair" on two augmentations of each image.
        classifier: what `model.classifier=auto` is for this method.
        needs_its_classifier: it computes something else on any other kind.
    """

    views: ClassVar[str]
    classifier: ClassVar[str]
    needs_its_classifier: ClassVar[bool]

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Of `config`, for classes with these numbers of training images, int64 [K], on the device of the run."""
        ...

    @staticmethod
    def build_head(config: LossConfig, feature_dim: int, num_classes: int) -> nn.Module | None:
        """Layers of the method's own beside classifier and projector, trained and saved with them; None has none."""
        ...

    def floors(self, num_classes: int) -> dict[str, float]:
        """The least value each term can reach at K classes, where it is known and not 0; sums over classes have large ones."""
        ...

    def phase(self, epoch: int, num_epochs: int) -> Phase:
        """What the loss computes in `epoch`, from 0, of `num_epochs`."""
        ...

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The loss of one step."""
        ...
