"""One `bce3s profile`: measured and shown, or two of them compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from os import getloadavg
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import typer
from rich.console import Console

from bce3s.config import TrainConfig
from bce3s.throughput.advice import advise, verdict_sentences
from bce3s.throughput.chart import draw_chart, require_chart
from bce3s.throughput.compare import changes_table, compare_rows, differences, lost_rows, needed_rows, read_profile
from bce3s.throughput.profile import measure
from bce3s.throughput.record import Findings, profile_record, to_bytes
from bce3s.throughput.table import print_sentences, rows_table
from bce3s.throughput.timing import Budget
from bce3s.throughput.trace import write_trace
from bce3s.throughput.verdict import judge
from bce3s.throughput.workload import Workload
from pipelines.config import require
from pipelines.durable import write_atomically
from pipelines.format import ShardSet
from pipelines.format.bus_error import explain_bus_errors_of
from pipelines.types import ConfigError, UserError

BUSY = 0.25  # load average per core from which rates suffer


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where the findings go.

    Args:
        json: print JSON, and the table to standard error.
        quiet: no word on what is being measured.
        json_out, plot, trace: files to write.
    """

    json: bool = False
    quiet: bool = False
    json_out: Path | None = None
    plot: Path | None = None
    trace: Path | None = None

    def files(self) -> Mapping[str, Path | None]:
        """By the option that names them."""
        return {"--json-out": self.json_out, "--plot": self.plot, "--trace": self.trace}

    def console(self) -> Console:
        """What a person sees; under --json that is JSON alone."""
        return Console(stderr=self.json, quiet=self.json and self.quiet)

    def require_writable(self) -> None:
        """What would stop the writing after minutes of measuring stops the command now.

        Raises:
            ConfigError: a file that cannot be written.
            BackendError: matplotlib is missing.
        """
        for option, path in self.files().items():
            if path is None:
                continue
            require(path.absolute().parent.is_dir(), f"{option} {path} lies in a folder that does not exist; make it first")
            require(not path.is_dir(), f"{option} {path} is a folder; name a file")
            try:
                # Tried, not asked: a read-only file system and a full quota say yes to whoever asks.
                with NamedTemporaryFile(dir=path.absolute().parent, prefix=".bce3s-profile-"):
                    pass
            except OSError as error:
                raise ConfigError(f"{option} {path} cannot be written there ({error.strerror or error}); name another file") from error
        if self.plot is not None:
            require_chart(self.plot)


def run_profile(config: TrainConfig, shards: ShardSet, budget: Budget, compiled: bool | None, outputs: Outputs) -> None:
    """Measures, shows the rows with their verdict, and writes what was asked for.

    Args:
        compiled: measure torch.compile; None where there is a GPU.

    Raises:
        UserError: the workload cannot be set up, or a file not be written.
    """
    console, load_average = outputs.console(), getloadavg()[0]
    workload = Workload(config, shards)
    explain_bus_errors_of(workload.shards.root)
    compiled = workload.device.type == "cuda" if compiled is None else compiled
    shown = console.is_terminal and not outputs.quiet
    with console.status("") if shown else nullcontext() as status:

        def say(stage: str) -> None:
            if status is not None:
                status.update(f"measuring: {stage}")
            elif not outputs.quiet:
                typer.echo(f"measuring: {stage}", err=True)

        measured = measure(workload, budget, compiled=compiled, say=say)
    verdict = judge(measured.facts, measured.rows)
    advice = None if verdict is None else advise(measured.facts, measured.rows, verdict)
    sentences = (
        ["No verdict: the loader or the step could not be measured."]
        if verdict is None or advice is None
        else verdict_sentences(measured.facts, measured.rows, verdict, advice)
    )
    if load_average > BUSY * measured.facts.num_cores:
        sentences.append(
            f"Warning: other programs were running (load average {load_average:.1f} before the start): measure again without them."
        )
    findings = Findings(profile=measured, verdict=verdict, advice=advice, sentences=sentences, load_average=load_average)
    _show(console, workload, budget, findings)
    _write(console, workload, budget, findings, outputs)


def _show(console: Console, workload: Workload, budget: Budget, findings: Findings) -> None:
    binding = None if findings.verdict is None else findings.verdict.binding
    print_sentences(console, [_title(workload)])
    console.print(rows_table(findings.profile.rows, binding, budget.repeats))
    print_sentences(console, [f"Page cache: {findings.profile.page_cache}.", *findings.sentences])


def _title(workload: Workload) -> str:
    config, placement = workload.config, workload.placement
    return (
        f"{config.dataset}, {config.model.arch}, {config.data.image_size} px, batch {config.data.batch_size}, "
        f"loader {workload.choice.name} ({workload.choice.reason}), {placement.device}, {placement.precision}"
    )


def _write(console: Console, workload: Workload, budget: Budget, findings: Findings, outputs: Outputs) -> None:
    record = to_bytes(profile_record(workload, budget, findings))
    path = outputs.json_out
    try:
        if outputs.json_out is not None:
            write_atomically(outputs.json_out, record)
        path = outputs.plot
        if outputs.plot is not None:
            write_atomically(outputs.plot, draw_chart(findings.profile.rows, findings.verdict, _title(workload), outputs.plot.suffix))
        path = outputs.trace
        if outputs.trace is not None:
            write_trace(workload, outputs.trace)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another file") from error
    for written in outputs.files().values():
        if written is not None:
            console.print(f"wrote {written}", highlight=False, soft_wrap=True)
    if outputs.json:
        typer.echo(record.decode(), nl=False)


def compare_profiles(before: Path, after: Path, threshold: float, outputs: Outputs) -> bool:
    """Shows what changed between two profiles; returns whether a row became slower, or one that the run needs was lost.

    Raises:
        UserError: a file that is no profile, or nothing to compare.
    """
    require(0 <= threshold < 1, f"--threshold is a share from 0 to 1, not {threshold}")
    (earlier, earlier_rows), (later, later_rows) = read_profile(before), read_profile(after)
    console = outputs.console()
    changes = compare_rows(earlier_rows, later_rows, threshold)
    if not changes:
        raise UserError(f"{before} and {after} have no measured row in common; compare two profiles of the same run")
    warnings = differences(earlier, later)
    lost, needed = lost_rows(earlier_rows, later_rows), needed_rows(earlier)
    if lost:
        warnings.append(f"measured before and not any more: {'; '.join(row.name for row in lost)}")
    print_sentences(console, [f"warning: {sentence}" for sentence in warnings])
    console.print(changes_table(changes, threshold))
    worse = [change.before.name for change in changes if change.outcome == "slower"]
    worse += [f"{row.name} (not measured any more)" for row in lost if row.key in needed]
    print_sentences(console, [f"regression: {', '.join(worse)}" if worse else "no regression"])
    record: dict[str, Any] = {"before": str(before), "after": str(after), "threshold": threshold, "warnings": warnings, "worse": worse}
    record["changes"] = [{"key": each.key, "ratio": each.ratio, "outcome": each.outcome} for each in changes]
    if outputs.json_out is not None:
        write_atomically(outputs.json_out, to_bytes(record))
    if outputs.json:
        typer.echo(json.dumps(record, indent=1))
    return bool(worse)
