"""Rows of packages and GPUs, from facts as probes report them on machines that are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bce3s.doctor.rows import Row
from bce3s.doctor.software import EXTRAS, extra_rows, gpu_rows, package_rows
from bce3s.doctor.verdict import accumulate_steps, judge

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

ROOT = Path(__file__).resolve().parents[3]
H100 = {"name": "NVIDIA H100 80GB HBM3", "bytes": 80 << 30, "capability": [9, 0], "works": True}
ABSENT = {"error": "ModuleNotFoundError: No module named 'ffcv'"}
RECIPE = {"dataset": "folder", "batch_size": 128, "image_size": 224, "arch": "resnet50"}


def facts(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a machine with one H100, everything at its place."""
    found: dict[str, dict[str, Any]] = {
        "torch": {"version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "gpus": [H100], "warnings": []},
        "cuda": {"driver": True, "status": 0, "cuda": "13.0", "gpus": [H100]},
        "jpeg": {"engines": 7, "cores": 1},
        "dali": {"version": "2.4.0"},
        "triton": {"version": "3.7.1"},
        "numba": {"version": "0.68.1"},
        "recipe": RECIPE,
    }
    return found | changes


def row_of(rows: list[Row], name: str) -> Row:
    (found,) = [row for row in rows if row.name == name]
    return found


def rows_of(found: dict[str, dict[str, Any]]) -> list[Row]:
    cores = Row(section="machine", name="CPU cores", status="ok", value="", figures={"usable": 16, "affinity": 16})
    memory = Row(section="machine", name="memory", status="ok", value="", figures={"free_bytes": 64 << 30})
    return [*package_rows(found), *gpu_rows(found, "580.65.06"), cores, memory]


def test_a_machine_with_a_gpu_trains_on_it() -> None:
    found = facts()
    rows = rows_of(found)
    assert row_of(rows, "torch").value == "2.13.0+cu130, CUDA 13.0 build"
    assert row_of(rows, "driver").value == "580.65.06, serves CUDA up to 13.0"
    assert row_of(rows, "GPU 0").value == "NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0"
    assert row_of(rows, "JPEG engine").value == "7 engines, by nvJPEG"
    assert row_of(rows_of({**found, "jpeg": {"engines": 1}}), "JPEG engine").value == "1 engine, by nvJPEG"
    verdict = judge(rows, found, None)
    assert verdict.sentence == "Training can run here, on 1 × NVIDIA H100 80GB HBM3."
    assert verdict.command == "bce3s fast-train --dataset folder --shards shards/folder --loader dali --batch-size 128"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "yes (inferred"), ((9, 0), "yes (inferred"), ((8, 9), "none: "), ((7, 0), "none: "), ((12, 0), "not known (inferred")],
)
def test_a_jpeg_engine_is_inferred_where_nobody_can_be_asked_and_said_to_be(capability: tuple[int, int], expected: str) -> None:
    gpu = {**H100, "capability": list(capability)}
    found = facts(torch={**facts()["torch"], "gpus": [gpu]}, jpeg={"error": "crashes (SIGSEGV)"})
    value = row_of(gpu_rows(found, ""), "JPEG engine").value
    assert value.startswith(expected)
    assert f"inferred from compute capability {capability[0]}.{capability[1]}" in value


def test_a_build_of_torch_that_does_not_fit_the_driver_is_named_with_the_one_that_does() -> None:
    warning = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12080)."
    torch = {"version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "gpus": [], "warnings": [warning]}
    found = facts(torch=torch, cuda={"driver": True, "status": 0, "cuda": "12.8", "gpus": [H100]})
    row = row_of(package_rows(found), "torch")
    assert row.status == "advice"
    assert f"it cannot use the GPU ({warning})" in row.value
    assert row.remedy.endswith("pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128")


def test_a_cpu_build_beside_a_gpu_leaves_it_idle() -> None:
    found = facts(torch={"version": "2.13.0+cpu", "cuda": None, "hip": None, "gpus": [], "warnings": []})
    row = row_of(package_rows(found), "torch")
    assert (row.status, row.value) == ("advice", "2.13.0+cpu, CPU build: it leaves the GPU idle")
    assert row.remedy == "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"


def test_without_dali_ffcv_carries_the_training_and_without_both_nothing_does() -> None:
    broken = {"error": "ImportError: libcufile.so.0: cannot open shared object file"}
    alone = facts(dali=broken, ffcv={"version": "1.0.2"})
    verdict = judge(rows_of(alone), alone, None)
    assert (verdict.can_train, verdict.loader) == (True, "ffcv")
    neither = facts(dali=broken, ffcv=ABSENT)
    verdict = judge(rows_of(neither), neither, None)
    assert not verdict.can_train
    assert verdict.command == ""
    expected = (
        "DALI: does not work here: ImportError: libcufile.so.0: cannot open shared object file (pip install --force-reinstall nvidia-dali"
    )
    assert expected in verdict.sentence


def test_a_gpu_that_torch_or_dali_cannot_work_on_stands_in_the_way() -> None:
    gpu = {**H100, "works": False, "error": "CUDA error: no kernel image is available for execution on the device"}
    found = facts(torch={**facts()["torch"], "gpus": [gpu]})
    row = row_of(gpu_rows(found, ""), "GPU 0")
    assert row.blocks
    assert "torch does not compute on it (CUDA error: no kernel image" in row.value
    found = facts(dali_gpu={"error": "RuntimeError: CUDA driver version is insufficient"}, cuda={**facts()["cuda"], "cuda": "12.8"})
    row = row_of(gpu_rows(found, ""), "DALI on GPU 0")
    assert row.blocks
    assert row.remedy == "update the driver, or: pip install nvidia-dali-cuda120"
    beside = found | {"ffcv": {"version": "1.0.2"}}
    verdict = judge(rows_of(beside), beside, None)
    assert (verdict.can_train, verdict.loader) == (True, "ffcv")


def test_what_torch_needs_and_lacks_is_not_called_torch_missing() -> None:
    row = row_of(package_rows(facts(torch={"error": "ModuleNotFoundError: No module named 'sympy'"})), "torch")
    assert (row.status, row.needed) == ("missing", True)
    assert row.value == "does not work here: ModuleNotFoundError: No module named 'sympy'"
    row = row_of(package_rows(facts(torch={"error": "ModuleNotFoundError: No module named 'torch'"})), "torch")
    assert (row.value, row.remedy) == ("not installed", "pip install torch")


def test_an_extra_is_there_or_not_or_incomplete_or_broken() -> None:
    found = {
        "altair": {"version": "6.3.0"},
        "onnx": {"version": "1.23.2"},
        "onnxscript": {"version": "0.7.2"},
        "onnxruntime": {"error": "ImportError: GLIBC_2.38 not found"},
        "wandb": {"version": "0.31.0"},
    }
    rows = {row.name: row for row in extra_rows(found)}
    assert rows["wandb"].status == "ok"
    assert rows["report"].value == "not complete: vl_convert, jinja2, matplotlib not installed"
    assert rows["report"].remedy == "pip install 'bce3s[report]'"
    assert rows["export"].value == "onnxruntime does not work here: ImportError: GLIBC_2.38 not found"
    assert rows["timm"].value == "not installed"
    assert not any(row.blocks for row in rows.values())


def test_every_optional_extra_of_the_package_has_a_row() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"dev", "ffcv"}  # FFCV has a row of its own


def test_a_batch_is_cut_into_parts_that_fit() -> None:
    # ResNet-50 at 224 px: 43.75 MB a view in bf16, so 3 · 512 views take 67 GB, and with a third more 87 GB.
    options: dict[str, Any] = {"arch": "resnet50", "image_size": 224, "batch_size": 512}
    assert accumulate_steps(**options, memory_bytes=141 << 30, in_bf16=True) == (1, True)
    assert accumulate_steps(**options, memory_bytes=80 << 30, in_bf16=True) == (2, True)
    assert accumulate_steps(**options, memory_bytes=80 << 30, in_bf16=False) == (4, True)
    assert accumulate_steps(**options, memory_bytes=1 << 30, in_bf16=True) == (32, False)  # of 16 images each: batch-norm needs them
    assert accumulate_steps(**{**options, "batch_size": 96}, memory_bytes=1 << 20, in_bf16=True) == (4, False)
    assert accumulate_steps(**{**options, "arch": "timm:vit"}, memory_bytes=1 << 20, in_bf16=True) == (1, True)
