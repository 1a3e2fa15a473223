"""The one change that would help most, and how far: a table of rules from the row that binds to the knob that lifts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bce3s.throughput.rows import BEHIND, HARDWARE_LOADS, VIEWS_PER_DECODED, Row
from bce3s.throughput.verdict import COPIES_PIXELS, Facts, Verdict, path_of

_DATA = ("storage", "read", "decode", "loader", "copy")
_IN_MEMORY = ("resident", "synthetic", "cached")
_CLOSE = 0.9  # end to end over the binding row, from which nothing is lost between the stages
_CLEARLY = 1.05  # a variant must be this much faster to be worth a change
_OVERSIZED = 1.25


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change.

    Args:
        knob: what to do, in the imperative.
        ceiling: decoded images/s that training can reach with it, at most; None where no measured row sets a limit.
        limit: the row that sets the ceiling.
    """

    knob: str
    ceiling: float | None
    limit: str


def advise(facts: Facts, rows: Sequence[Row], verdict: Verdict) -> Advice:
    """The first rule of the table that applies to the binding row."""
    section = verdict.binding.partition(".")[0]
    if section == "step":
        return _advise_on_step(facts, rows, verdict)
    return next(_ceiling(knob, lifted, facts, rows) for applies, knob, lifted in _data_rules(facts, rows, section) if applies)


def _data_rules(facts: Facts, rows: Sequence[Row], section: str) -> list[tuple[bool, str, tuple[str, ...]]]:
    """Whether the rule applies, its knob, and the groups of rows that it lifts; the last one always applies."""
    decodes, cuda, pixels = facts.loader not in _IN_MEMORY, facts.device == "cuda", section in ("decode", "loader")
    sends_pixels = cuda and facts.loader in COPIES_PIXELS
    side = -(-round(facts.needed_side) // 32) * 32
    oversized = decodes and facts.stored_side > max(side, _OVERSIZED * facts.needed_side)
    share = _better_share(rows) if pixels and decodes and cuda and not sends_pixels else None
    more_cores = "give the loader more or faster cores" + ("" if cuda else ", or a GPU to decode on" if decodes else "")
    return [
        (decodes and facts.resident_fits, "take --loader resident, for the decoded set fits in memory", _DATA),
        (
            facts.streamed and decodes,
            "copy the shards to a local disk and take --loader dali, or raise --set data.stream.buffer_bytes where the network has room",
            _DATA,
        ),
        (sends_pixels and (pixels or section == "copy"), "take --loader dali, which decodes on the GPU", _DATA),
        (section == "storage", "keep the shards on a faster disk, or in the page cache", ("storage",)),
        (share is not None, f"set --set data.dali.hw_decoder_load={share}", ("decode", "loader")),
        (
            decodes and pixels and 0 < facts.num_threads < facts.num_cores,
            f"decode on all {facts.num_cores} cores with --set data.num_threads=0",
            ("decode", "loader"),
        ),
        (oversized, f"make shards of smaller images with make_shards.py --min-side {side}", ("storage", "read", "decode", "loader")),
        (
            section == "loader" and facts.policy != "none",
            "lighten the augmentation with --set data.augment.policy=none, if accuracy allows it",
            ("loader",),
        ),
        # What works on the device is not lifted by the host's cores; bytes are handed over by them in any case.
        (cuda and not decodes, "take a faster GPU, where this loader crops and augments", ("loader", "step")),
        (cuda and pixels, "take a GPU that decodes faster", ("decode", "loader")),
        (True, more_cores, _DATA),
    ]


def _better_share(rows: Sequence[Row]) -> str | None:
    """The share of the hardware decoder at which decoding is clearly faster than at the run's own, as it is to be set."""
    by_key = {row.key: row for row in rows if row.rates}
    own = by_key.get("decode.gpu.own")
    swept = {f"{load:g}": by_key[f"decode.gpu.{load:g}"] for load in HARDWARE_LOADS if f"decode.gpu.{load:g}" in by_key}
    if own is None or not swept:
        return None
    best = max(swept, key=lambda load: swept[load].median)
    return best if swept[best].median > _CLEARLY * own.median else None


def _advise_on_step(facts: Facts, rows: Sequence[Row], verdict: Verdict) -> Advice:
    resident = facts.resident_fits and facts.loader not in _IN_MEMORY
    by_key = {row.key: row for row in rows if row.rates}
    own = by_key[facts.step_key]
    if verdict.efficiency is not None and verdict.efficiency < _CLOSE and resident:
        return Advice(
            knob="take --loader resident, for decoding takes cores and bandwidth away from the step", ceiling=own.median, limit=own.name
        )
    knobs = {
        "step.compiled": "compile the step with --set compile=true",
        "step.channels_last": "set --set channels_last=on",
        "step.contiguous": "set --set channels_last=off",
    }
    variants = [by_key[key] for key in knobs if key in by_key]
    best = max(variants, key=lambda row: row.median)
    if best.median > _CLEARLY * own.median:
        below = _ceiling(knobs[best.key], ("step",), facts, rows)
        if below.ceiling is None or best.median < below.ceiling:
            return Advice(knob=knobs[best.key], ceiling=best.median, limit=best.name)
        return below
    if facts.precision == "fp32" and facts.device == "cuda":
        return _ceiling("train with --precision bf16", ("step",), facts, rows)
    return _ceiling("a faster step, by a smaller --arch or a faster device", ("step",), facts, rows)


def _ceiling(knob: str, lifted: tuple[str, ...], facts: Facts, rows: Sequence[Row]) -> Advice:
    """The change that lifts the groups `lifted`; what is left of the path sets its ceiling."""
    left = [row for row in path_of(facts, rows) if row.key.partition(".")[0] not in lifted]
    if not left:
        return Advice(knob=knob, ceiling=None, limit="")
    lowest = min(left, key=lambda row: row.median)
    return Advice(knob=knob, ceiling=lowest.median, limit=lowest.name)


def verdict_sentences(facts: Facts, rows: Sequence[Row], verdict: Verdict, advice: Advice) -> list[str]:
    """The verdict in plain words."""
    by_key = {row.key: row for row in rows if row.rates}
    binding, loader = by_key[verdict.binding], by_key["loader"]
    sentences = [_sentence(f"{binding.name} binds: {_both(binding.median)}")]
    if verdict.end_to_end is not None:
        sentences.append(f"End to end: {_both(verdict.end_to_end)}{_compared(verdict)}.")
    sentences.append(
        "Two images are decoded for three forward views: so that the step never waits, the loader must deliver "
        f"{verdict.required:,.0f} decoded images/s; alone it delivers {loader.median:,.0f}, {_as_much(loader.median / verdict.required)}."
    )
    parts = ["measured from warm pages"] if verdict.from_warm_pages else []
    if verdict.loader_headroom is not None:
        parts.append(f"loader headroom {_times(verdict.loader_headroom)} × the end-to-end rate")
    if verdict.contention_loss is not None:
        parts.append(_contention(by_key[facts.step_key], by_key["together.discarded"], verdict.contention_loss))
    if verdict.stall_share is not None:
        parts.append(f"{verdict.stall_share:.0%} of training time waits for data")
    if len(parts) > verdict.from_warm_pages:
        sentences.append(_sentence("; ".join(parts)))
    if verdict.turns is not None:
        sentences.append(f"On a CPU loader and step share the cores: taking turns they would reach {verdict.turns:,.0f} decoded images/s.")
    limit = "" if advice.ceiling is None else f"; at most {advice.ceiling:,.0f} decoded images/s then, where {advice.limit} sets the limit"
    return [*sentences, f"What would help most: {advice.knob}{limit}."]


def _compared(verdict: Verdict) -> str:
    """End to end beside what binds, as the end of a sentence."""
    if verdict.efficiency is None:
        return ", but measured from warm pages, and the shards do not fit the page cache: a whole run goes no faster than the storage"
    return ", as fast as that within the noise" if verdict.efficiency > 1.0 else f", {verdict.efficiency:.0%} of that"


def _contention(step: Row, beside: Row, loss: float) -> str:
    """What the loader's running costs the step, and whether the loader kept pace."""
    slower = "no slower" if abs(loss) < 0.005 else f"{abs(loss):.0%} {'slower' if loss > 0 else 'faster'}"
    overlap = max(beside.rates) >= min(step.rates) and max(step.rates) >= min(beside.rates)
    text = f"contention: the step is {slower} while the loader runs{', within the noise' if overlap else ''}"
    pace = beside.details.get("batches_per_step", 1.0)
    return text if pace >= BEHIND else f"{text}, which delivers {pace:.2g} batches a step meanwhile"


def _as_much(ratio: float) -> str:
    return "about as much" if 0.95 <= ratio < 1.05 else f"{_times(ratio)} times that"


def _both(rate: float) -> str:
    return f"{rate:,.0f} decoded images/s, {rate * VIEWS_PER_DECODED:,.0f} forward views/s"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
