"""The one change that would help most, and how far: a table of rules from the row that binds to the knob that lifts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bce3s.throughput.rows import VIEWS_PER_DECODED, Row
from bce3s.throughput.verdict import Facts, Verdict, path_of

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
    return next(_ceiling(knob, lifted, facts, rows) for applies, knob, lifted in _data_rules(facts, section) if applies)


def _data_rules(facts: Facts, section: str) -> list[tuple[bool, str, tuple[str, ...]]]:
    """Whether the rule applies, its knob, and the groups of rows that it lifts; the last one always applies."""
    decodes = facts.loader not in _IN_MEMORY
    side = -(-round(facts.needed_side) // 32) * 32
    oversized = decodes and facts.stored_side > _OVERSIZED * facts.needed_side
    more_cores = "give the loader more or faster cores" + ("" if facts.device == "cuda" else ", or a GPU to decode on")
    return [
        (decodes and facts.resident_fits, "take --loader resident: the decoded set fits in memory", _DATA),
        (section == "copy", "take --loader dali, which decodes on the GPU", _DATA),
        (section == "storage", "keep the shards on a faster disk, or in the page cache", ("storage",)),
        (
            decodes and 0 < facts.num_threads < facts.num_cores,
            f"decode on all {facts.num_cores} cores with --set data.num_threads=0",
            ("decode", "loader"),
        ),
        (oversized, f"make shards of smaller images with make_shards.py --min-side {side}", ("storage", "read", "decode", "loader")),
        (facts.policy != "none", "lighten the augmentation with --set data.augment.policy=none, if accuracy allows it", ("loader",)),
        (True, more_cores, _DATA),
    ]


def _advise_on_step(facts: Facts, rows: Sequence[Row], verdict: Verdict) -> Advice:
    resident = facts.resident_fits and facts.loader not in _IN_MEMORY
    by_key = {row.key: row for row in rows if row.rates}
    own = by_key[facts.step_key]
    if verdict.efficiency is not None and verdict.efficiency < _CLOSE and resident:
        return Advice(
            knob="take --loader resident: decoding takes cores and bandwidth away from the step", ceiling=own.median, limit=own.name
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
    return _ceiling("only a faster step helps: a smaller --arch, or a faster device", ("step",), facts, rows)


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
    if verdict.end_to_end is not None and verdict.efficiency is not None:
        sentences.append(f"End to end: {_both(verdict.end_to_end)}, {verdict.efficiency:.0%} of that.")
    sentences.append(
        "Two images are decoded for three forward views: so that the step never waits, the loader must deliver "
        f"{verdict.required:,.0f} decoded images/s; alone it delivers {loader.median:,.0f}, "
        f"{_times(loader.median / verdict.required)} times that."
    )
    parts = []
    if verdict.loader_headroom is not None:
        parts.append(f"loader headroom {_times(verdict.loader_headroom)} × the end-to-end rate")
    if verdict.contention_loss is not None:
        slower = f"{verdict.contention_loss:.0%}" if verdict.contention_loss >= 0.005 else "not"
        parts.append(f"contention: the step is {slower} slower while the loader runs")
    if verdict.stall_share is not None:
        parts.append(f"{verdict.stall_share:.0%} of training time waits for data")
    if parts:
        sentences.append(_sentence("; ".join(parts)))
    if verdict.turns is not None:
        sentences.append(f"On a CPU loader and step share the cores: taking turns they would reach {verdict.turns:,.0f} decoded images/s.")
    limit = "" if advice.ceiling is None else f"; at most {advice.ceiling:,.0f} decoded images/s then, where {advice.limit} sets the limit"
    return [*sentences, f"What would help most: {advice.knob}{limit}."]


def _both(rate: float) -> str:
    return f"{rate:,.0f} decoded images/s, {rate * VIEWS_PER_DECODED:,.0f} forward views/s"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
