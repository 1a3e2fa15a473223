"""What the data side of a run can be told. Frozen, checked when made, saved with the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from pipelines.types import ConfigError

SAMPLINGS: tuple[str, ...] = ("power", "instance", "square-root", "class-balanced", "effective-number", "progressive")
PARTNERS: tuple[str, ...] = ("auto", "drawn", "same")
DRAWS: tuple[str, ...] = ("independent", "systematic")
CROPS: tuple[str, ...] = ("none", "pad", "resized")
POLICIES: tuple[str, ...] = ("none", "autoaugment-cifar10", "randaugment")
FEEDS: tuple[str, ...] = ("memory", "index")
ON_ERROR: tuple[str, ...] = ("stop", "skip")


def require_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `ConfigError` that lists the known values, the nearest to `value` at the end, when `value` is none of them."""
    if value not in known:
        raise ConfigError(f"unknown {option} '{value}'; known: {', '.join(known)}{did_you_mean(value, known)}")


def did_you_mean(typed: str, known: Mapping[str, str] | Iterable[str]) -> str:
    """As in "; did you mean 'resnet18'?": what is spelled nearly like `typed`, in whatever case; empty where nothing is.

    Args:
        known: names, or what is typed for each.
    """
    names = known if isinstance(known, Mapping) else {name: name for name in known}
    by_spelling = {name.casefold(): shown for name, shown in names.items()}
    close = get_close_matches(typed.casefold(), by_spelling, n=1)
    return f"; did you mean '{by_spelling[close[0]]}'?" if close else ""


def require(condition: bool, sentence: str) -> None:
    """Raises `ConfigError(sentence)` unless `condition` holds."""
    if not condition:
        raise ConfigError(sentence)


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Who is drawn when (method.md: instance and partner stream).

    Args:
        sampling: how classes weigh in the partner stream; "power" weighs an image by n_class^(−resample_exponent).
        resample_exponent: 0 is uniform over images, 1 class-balanced; read by "power" only.
        draw: "independent" draws with replacement as the reference does; "systematic" has the same expectation
            but class counts within one of it.
        effective_number_beta: β of "effective-number" (Cui et al. 2019, eq. 3).
        progressive_epochs: epochs over which "progressive" moves from instance to class-balanced (Kang et al. 2020, eq. 3).
        drop_last: leave out the last, smaller batch of an epoch (static shapes).
        partner: the partner stream is "drawn", or holds the "same" samples as the instance stream at the same places, augmented anew;
            "auto" is what the method trains on, and drawn where nobody says.
    """

    sampling: str = "power"
    resample_exponent: float = 0.0
    draw: str = "independent"
    effective_number_beta: float = 0.999
    progressive_epochs: int = 100
    drop_last: bool = False
    partner: str = "auto"

    def __post_init__(self) -> None:
        require_choice("sampling", self.sampling, SAMPLINGS)
        require_choice("draw", self.draw, DRAWS)
        require_choice("partner", self.partner, PARTNERS)
        require(0.0 <= self.effective_number_beta < 1.0, f"effective_number_beta must lie in [0, 1), not {self.effective_number_beta}")
        require(math.isfinite(self.resample_exponent), f"resample_exponent must be a number, not {self.resample_exponent}")
        require(self.progressive_epochs >= 1, f"progressive_epochs must be at least 1, not {self.progressive_epochs}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to pixels between decoding and the network.

    Args:
        crop: "resized" draws an area and an aspect ratio and resizes to image_size; "pad" pads with black by `padding` pixels and
            crops image_size; "none" takes the centre as evaluation does.
        area_range, aspect_range: of "resized", as fractions of the image and width/height.
        color_jitter: strengths of brightness, contrast and saturation after crop and flip, each a factor drawn from 1 ± strength; 0 is off.
        policy: colour and geometry policy after that.
        cutout: side in pixels of the square set to black; 0 is off.
        mix_alpha: λ ~ Beta(mix_alpha, mix_alpha).
        cutmix_area_correction: use the pasted area instead of λ as the cutmix target (the reference does not).
        mean, std: per channel, on the scale 0…1.
        eval_crop: fraction of the shorter side that evaluation keeps (224/256 is 0.875; 1 keeps all).
    """

    crop: str = "resized"
    padding: int = 4
    area_range: tuple[float, float] = (0.08, 1.0)
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    policy: str = "none"
    cutout: int = 0
    mix_alpha: float = 1.0
    cutmix_area_correction: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    eval_crop: float = 0.875

    def __post_init__(self) -> None:
        require_choice("crop", self.crop, CROPS)
        require_choice("policy", self.policy, POLICIES)
        jitters = len(self.color_jitter) == 3 and all(0 <= strength < math.inf for strength in self.color_jitter)
        require(jitters, f"color_jitter takes three strengths of 0 or more, not {self.color_jitter}")
        require(self.padding >= 0 and self.cutout >= 0, "padding and cutout are pixels and cannot be negative")
        require(0 < self.area_range[0] <= self.area_range[1] <= 1, f"area_range must lie in (0, 1] and rise, not {self.area_range}")
        require(0 < self.aspect_range[0] <= self.aspect_range[1], f"aspect_range must be positive and rise, not {self.aspect_range}")
        require(self.mix_alpha > 0, f"mix_alpha must be positive, not {self.mix_alpha}")
        require(0 < self.eval_crop <= 1, f"eval_crop must lie in (0, 1], not {self.eval_crop}")
        require(all(s > 0 for s in self.std), f"std must be positive, not {self.std}")


@dataclass(frozen=True, kw_only=True)
class DaliConfig:
    """Of the loader `dali`.

    Args:
        feed: "memory" hands views of the mapped tars to DALI, "index" lets DALI's own reader follow index files written in the order.
        hw_decoder_load: share of JPEGs that the GPU's hardware decoder takes, 0…1; −1 is what `bce3s profile` found best on this
            machine, or DALI's own default where it has not run.
    """

    feed: str = "memory"
    hw_decoder_load: float = -1.0

    def __post_init__(self) -> None:
        require_choice("dali.feed", self.feed, FEEDS)
        load = self.hw_decoder_load
        require(load == -1 or 0 <= load <= 1, f"dali.hw_decoder_load is a share from 0 to 1, or -1 for the best known, not {load}")


@dataclass(frozen=True, kw_only=True)
class ResidentConfig:
    """Of the loader `resident`.

    Args:
        min_side: shorter side in pixels of the images kept; 0 is what evaluation needs, image_size / eval_crop. No image is enlarged.
        cache: where decoded sets are kept for the next run: "auto" is beside the shards, from 1 GiB on; "off"; or a folder.
    """

    min_side: int = 0
    cache: str = "auto"

    def __post_init__(self) -> None:
        require(self.min_side >= 0, f"resident.min_side is pixels and cannot be negative, not {self.min_side}")
        require(self.cache != "", "resident.cache takes auto, off or a folder")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Of the loader `webdataset`.

    Args:
        buffer_bytes: memory for shards a rank, those in use and those on their way.
        patience_s: seconds a server may fail before a shard counts as missing.
    """

    buffer_bytes: int = 2 << 30
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        require(self.buffer_bytes >= 1, f"stream.buffer_bytes must be at least 1, not {self.buffer_bytes}")
        require(0 <= self.patience_s < math.inf, f"stream.patience_s must be seconds, not {self.patience_s}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which loader feeds the run, and how.

    Args:
        loader: a name of `LOADERS`, or "auto": by size, memory and device.
        batch_size: source images a step over all ranks; a training step decodes twice as many.
        image_size: side in pixels of what the network sees.
        num_threads: decoding threads a rank; 0 is one per core.
        prefetch_batches: batches decoded ahead while a step runs.
        on_error: what a sample that does not decode any more does in training: "stop" ends the run and names it, "skip" names it and goes
            on with the next sample of its class in its place. Evaluation always stops.
    """

    loader: str = "auto"
    batch_size: int = 64
    image_size: int = 32
    num_threads: int = 0
    prefetch_batches: int = 2
    on_error: str = "stop"
    dali: DaliConfig = DaliConfig()
    resident: ResidentConfig = ResidentConfig()
    stream: StreamConfig = StreamConfig()
    order: OrderConfig = OrderConfig()
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        require_choice("on_error", self.on_error, ON_ERROR)
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(self.image_size >= 8, f"image_size must be at least 8 pixels, not {self.image_size}")
        require(self.num_threads >= 0, f"num_threads cannot be negative, not {self.num_threads}")
        require(self.prefetch_batches >= 1, f"prefetch_batches must be at least 1, not {self.prefetch_batches}")
