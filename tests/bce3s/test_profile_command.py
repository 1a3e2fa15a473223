"""`bce3s profile` as a user types it: a real profile on small shards, its files, regressions, mistakes and an interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bce3s.throughput.rows import NAMES
from tests import commands

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--recipe", "cifar10lt_resnet20_40ep", "--precision", "fp32", "--device", "cpu", "--batch-size", "4", "--set"]
SETTINGS += ["data.num_threads=1"]
NEED_CUDA = {key for key in NAMES if key.startswith(("decode.gpu", "copy."))} | {"step.graph"}


def start(*arguments: str, cwd: Path, columns: int = 200) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
    command = [sys.executable, "-W", "error", "-m", "bce3s.cli", "profile", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: str, cwd: Path, columns: int = 200) -> subprocess.CompletedProcess[str]:
    return commands.run("profile", *arguments, cwd=cwd, variables={"COLUMNS": str(columns)})


def num_threads(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("Threads:")), 0)


@pytest.fixture(scope="module")
def profiled(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder with a.json, a.svg and trace.json of a quick profile; its record, and what it printed at 80 columns."""
    folder = tmp_path_factory.mktemp("profile")
    files = ["--json", "a.json", "--plot", "a.svg", "--trace", "trace.json"]  # the old spelling of --json-out
    shards = ["--dataset", "cifar10-lt", "--shards", str(make_shards().root), "--loader", "dali"]
    found = run(*shards, *SETTINGS, "--quick", *files, cwd=folder, columns=80)
    assert found.returncode == 0, found.stderr
    said = found.stderr.splitlines()
    assert all(line.startswith("measuring: ") for line in said), found.stderr
    assert {"measuring: host read", "measuring: loader dali", "measuring: parts of the step"} <= set(said)
    return folder, json.loads((folder / "a.json").read_text()), found.stdout


def test_every_row_is_measured_or_says_why_not(profiled: tuple[Path, dict[str, Any], str]) -> None:
    rows = {row["key"]: row for row in profiled[1]["rows"]}
    assert list(rows) == list(NAMES)
    assert {key for key, row in rows.items() if row.get("text") == "not measured: needs a CUDA device"} == NEED_CUDA
    assert rows["step.compiled"]["text"] == "not measured: compiling takes long on a CPU; add --compile"
    assert rows["decode.all.region"]["text"] == "not measured: crop 'pad' decodes whole images"
    unmeasured = {key for key, row in rows.items() if not row["measured"]} - NEED_CUDA - {"step.compiled"}
    assert unmeasured <= {"decode.one.region", "decode.all.region", "storage.cold"}
    for row in rows.values():
        if row["measured"]:
            figures = row["decoded_images_per_s"]
            assert len(figures["samples"]) >= 5
            assert 0 < figures["min"] <= figures["median"] <= figures["max"]
            assert row["forward_views_per_s"]["median"] == pytest.approx(1.5 * figures["median"])


def test_the_record_says_what_was_measured_where(profiled: tuple[Path, dict[str, Any], str], make_shards: Any) -> None:
    record = profiled[1]
    shards = make_shards()
    assert record["data"] | {"dataset": "cifar10-lt", "fingerprint": shards.fingerprint, "num_train": 74} == record["data"]
    assert record["environment"]["versions"]["torch"] != "not installed"
    assert record["hardware"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert record["hardware"]["gpu"] is record["hardware"]["driver"] is None
    assert record["config"]["data"]["batch_size"] == 4
    assert "--quick" in record["command"]
    assert "cold row" in record["page_cache"]
    assert "all other rows: the first 100% of what an epoch draws read once before, " in record["page_cache"]
    assert re.search(r"\d+% of the training shards' pages in memory before them, \d+% after the last$", record["page_cache"])
    assert record["loader"] == "dali"
    assert 0 <= record["verdict"]["stall_share"] <= 1
    assert record["verdict"]["binding"] in record["verdict"]["path"]
    rates = {row["key"]: row["decoded_images_per_s"]["median"] for row in record["rows"] if row["measured"]}
    assert record["verdict"]["efficiency"] == pytest.approx(rates["together.real"] / min(rates[key] for key in record["verdict"]["path"]))


def test_the_output_fits_80_columns_and_ends_with_the_verdict(profiled: tuple[Path, dict[str, Any], str]) -> None:
    lines = profiled[2].splitlines()
    table = lines[1 : next(i for i, line in enumerate(lines) if line.startswith("medians of 5 repeats"))]
    assert all(len(line) <= 80 for line in table)
    assert sum("not measured: needs a CUDA device" in line for line in table) == len(NEED_CUDA)
    for sentence in profiled[1]["sentences"]:
        assert sentence in lines
    assert "binds" in profiled[1]["sentences"][0]


def test_chart_and_trace_are_whole(profiled: tuple[Path, dict[str, Any], str]) -> None:
    folder = profiled[0]
    chart = (folder / "a.svg").read_text()
    assert chart.rstrip().endswith("</svg>")
    ranges = {event["name"] for event in json.loads((folder / "trace.json").read_text())["traceEvents"] if "name" in event}
    assert {"data wait", "views", "forward", "loss", "backward", "optimizer"} <= ranges
    assert {path.name for path in folder.iterdir()} >= {"a.json", "a.svg", "trace.json"}
    assert not list(folder.glob("*.partial"))


def write_slower(record: dict[str, Any], path: Path, factor: float) -> None:
    """A profile in which the loader alone is `factor` as fast."""
    changed = json.loads(json.dumps(record))
    for row in changed["rows"]:
        if row["key"] == "loader":
            figures = row["decoded_images_per_s"]
            slowest, fastest = figures["min"], figures["max"]
            figures["samples"] = [rate * factor * slowest / fastest for rate in figures["samples"]]
    path.write_text(json.dumps(changed))


def without(record: dict[str, Any], path: Path, lost: set[str]) -> Path:
    """A profile in which the rows `lost` were not measured."""
    rows = [{**row, "measured": False, "text": "not measured: it broke"} if row["key"] in lost else row for row in record["rows"]]
    path.write_text(json.dumps({**record, "rows": rows}))
    return path


def test_a_row_that_the_run_depends_on_and_that_is_lost_is_a_regression(profiled: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    earlier, record = str(profiled[0] / "a.json"), profiled[1]
    spare = run("--compare", earlier, str(without(record, tmp_path / "spare.json", {"together.cached"})), cwd=tmp_path)
    assert (spare.returncode, spare.stdout.splitlines()[-1]) == (0, "no regression")
    assert spare.stdout.startswith("warning: measured before and not any more: cached replay")
    for key, name in (("together.real", "end to end"), ("decode.all.full", "decode (all threads, whole)")):
        found = run("--compare", earlier, str(without(record, tmp_path / "lost.json", {key})), cwd=tmp_path)
        assert (found.returncode, found.stdout.splitlines()[-1]) == (1, f"regression: {name} (not measured any more)")


def test_profiles_without_a_row_in_common_are_a_mistake(profiled: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    one = without(profiled[1], tmp_path / "one.json", set(NAMES) - {"loader"})
    other = without(profiled[1], tmp_path / "other.json", {"loader"})
    found = run("--compare", str(one), str(other), cwd=tmp_path)
    assert found.returncode == 2
    assert "have no measured row in common" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_compare_finds_a_regression_by_exit_status(profiled: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    earlier = str(profiled[0] / "a.json")
    same = run("--compare", earlier, earlier, cwd=tmp_path)
    assert (same.returncode, same.stderr) == (0, "")
    assert "no regression" in same.stdout
    write_slower(profiled[1], tmp_path / "b.json", 0.5)
    slower = run("--compare", earlier, "b.json", cwd=tmp_path, columns=80)
    assert slower.returncode == 1
    assert "regression: loader" in slower.stdout.splitlines()
    assert run("--compare", earlier, "b.json", "--threshold", "0.99", cwd=tmp_path).returncode == 0
    assert run("--compare", "b.json", earlier, cwd=tmp_path).returncode == 0  # faster is no regression
    printed = run("--compare", earlier, "b.json", "--json", cwd=tmp_path)
    assert (printed.returncode, json.loads(printed.stdout)["worse"]) == (1, ["loader"])
    assert {change["outcome"] for change in json.loads(printed.stdout)["changes"]} == {"same", "slower"}
    other = json.loads((tmp_path / "b.json").read_text())
    other["data"]["fingerprint"] = "0" * 64
    (tmp_path / "c.json").write_text(json.dumps(other))
    warned = run("--compare", "b.json", "c.json", cwd=tmp_path)
    assert warned.returncode == 0
    assert warned.stdout.startswith("warning: the two profiles differ in their data set")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compare", "absent.json", "absent.json"], "cannot read absent.json"),
        (["--compare", "empty.json", "empty.json"], "empty.json is not JSON"),
        ([], "--dataset is missing"),
        (["--dataset", "cifar10-lt", "--shards", "absent"], "no shards at absent"),
        (["--dataset", "cifar10-lt", "--repeats", "4"], "--repeats must be at least 5"),
        (["--dataset", "cifar10-lt", "--json-out", "absent/a.json"], "lies in a folder that does not exist"),
        (["--dataset", "cifar10-lt", "--json-out", "/sys/a.json"], "--json-out /sys/a.json cannot be written there"),
        (["--dataset", "cifar10-lt", "--json", "--json-out", "a.json", "b.json"], "--json FILE means --json-out FILE: give one of them"),
        (["--dataset", "cifar10-lt", "a.json"], "'a.json' belongs to no option; --json-out a.json writes JSON there"),
        (["--dataset", "cifar10-lt", "--plot", "a.gif"], "--plot writes .png or .svg, not 'a.gif'"),
        (["--dataset", "cifar10-lt", "--set", "speed=1"], "unknown setting 'speed'"),
        (["--dataset", "cifar10-lt", "--shards", "SHARDS", "--arch", "vgg"], "unknown arch 'vgg'"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(make_shards: Any, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "empty.json").write_text("")
    named = [str(make_shards().root) if argument == "SHARDS" else argument for argument in arguments]
    found = run(*named, cwd=tmp_path)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert sentence in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty.json"]


def test_an_interruption_leaves_nothing_half_written(make_shards: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("as before")
    shards = ["--dataset", "cifar10-lt", "--shards", str(make_shards().root), "--loader", "dali"]
    process = start(*shards, *SETTINGS, "--seconds", "60", "--json-out", "a.json", cwd=tmp_path)
    while num_threads(process.pid) < 17:  # sixteen read the storage, for a minute
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[1:] == ["interrupted: a file that was not finished is as it was before"]
    assert (tmp_path / "a.json").read_text() == "as before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.cuda
def test_on_a_gpu_no_row_is_left_out(make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = make_shards(size=None, extension="jpg", name="folder")
    settings = ["--device", "cuda", "--arch", "resnet20-cifar", "--batch-size", "8", "--set", "data.image_size=32", "--loader", "dali"]
    found = run("--dataset", "folder", "--shards", str(shards.root), *settings, "--seconds", "0.2", "--json-out", "a.json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    unmeasured = {row["key"]: row["text"] for row in record["rows"] if not row["measured"]}
    assert set(unmeasured) <= {"step.graph", "storage.cold"}, unmeasured
    assert unmeasured.get("step.graph", "not measured: the step cannot be captured").startswith("not measured: the step cannot be captured")
    assert record["hardware"]["gpu"] in json.loads((tmp_path / "cache" / "bce3s" / "hw_decoder_load.json").read_text())


def test_the_command_is_known_before_torch_is(tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from bce3s.cli import app; "
        "found = CliRunner().invoke(app, ['profile', '--help']); assert found.exit_code == 0 and '--compare' in found.output; "
        "assert 'pages' in found.output; "
        "loaded = {'torch', 'nvidia.dali', 'matplotlib'} & set(sys.modules); assert not loaded, loaded"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
