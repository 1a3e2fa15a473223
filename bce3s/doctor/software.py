"""Rows of packages and GPUs, from what the probes found."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from bce3s.doctor.probes import PACKAGES
from bce3s.doctor.processes import Facts
from bce3s.doctor.rows import ADVICE, MISSING, OK, Row

MIN_PYTHON = (3, 10)
NEEDED = ("numpy", "PIL", "simplejpeg", "numba", "webdataset", "fsspec", "safetensors", "rich")
# Modules of each optional extra of pyproject.toml, without those of the development.
EXTRAS = {
    "report": ("altair", "vl_convert", "jinja2", "matplotlib"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "timm": ("timm",),
    "gpu": ("pynvml",),
    "docs": ("mkdocs", "mkdocstrings"),
    "hf": ("datasets",),
    "ray": ("ray",),
    "s3": ("s3fs",),
}
DALI = "nvidia-dali-cuda130"
_FFCV_PACKAGES = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}
_GIB = 1 << 30
# JPEG engines by compute capability: A100 and A30 have them, Hopper and data-centre Blackwell do; other GPUs decode on their cores.
_WITH_ENGINE = ((8, 0), (9, 0), (10, 0), (10, 3))
_WITHOUT_ENGINE = ((7, 0), (7, 5), (8, 6), (8, 9))


def python_row() -> Row:
    """The interpreter."""
    old = sys.version_info < MIN_PYTHON
    remedy = f"install Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer and make the environment with it" if old else ""
    value = f"{platform.python_version()} ({sys.executable})"
    return Row(section="software", name="Python", status=MISSING if old else OK, value=value, remedy=remedy, needed=True)


def package_rows(facts: Facts) -> list[Row]:
    """torch, DALI, FFCV, triton, and what the program cannot do without."""
    rows = [python_row(), _torch_row(facts), _dali_row(facts), _ffcv_row(facts), _triton_row(facts)]
    return rows + [_needed_row(name, facts[name]) for name in NEEDED if name in facts]


def _broken(found: dict[str, Any]) -> str:
    return f"does not work here: {found['error']}"


def is_absent(found: dict[str, Any], module: str) -> bool:
    """Whether importing `module` failed because it, and not something it needs, is not there."""
    return str(found.get("error", "")).startswith(f"ModuleNotFoundError: No module named '{module.partition('.')[0]}'")


def _torch_row(facts: Facts) -> Row:
    found, cuda = facts["torch"], facts["cuda"]
    if "error" in found:
        absent = is_absent(found, "torch")
        remedy = "pip install torch" if absent else "pip install --force-reinstall torch"
        value = "not installed" if absent else _broken(found)
        return Row(section="software", name="torch", status=MISSING, value=value, remedy=remedy, needed=True)
    build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found.get("hip") else "CPU"
    value = f"{found['version']}, {build} build"
    figures = {"version": found["version"], "cuda": found["cuda"]}
    row: dict[str, Any] = {"section": "software", "name": "torch", "needed": True, "figures": figures}
    if not cuda["gpus"] or found["gpus"]:
        return Row(status=OK, value=value, **row)
    if not found["cuda"]:
        remedy = _torch_line(cuda["cuda"])
        return Row(status=ADVICE, value=f"{value}: it leaves the GPU idle", remedy=remedy, **row)
    why = f" ({found['warnings'][0]})" if found.get("warnings") else ""
    remedy = f"update the driver, which serves CUDA up to {cuda['cuda']}, or: {_torch_line(cuda['cuda'])}"
    return Row(status=ADVICE, value=f"{value}: it cannot use the GPU{why}", remedy=remedy, **row)


def _torch_line(driver_cuda: str) -> str:
    """The build of torch for what the driver serves: newest first, of those that torch is published for."""
    served = tuple(int(part) for part in driver_cuda.split("."))
    build = next((build for build, needs in (("cu130", (13, 0)), ("cu128", (12, 8)), ("cu126", (12, 6))) if served >= needs), "cu126")
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


def _dali_row(facts: Facts) -> Row:
    found = facts["dali"]
    row: dict[str, Any] = {"section": "software", "name": "DALI", "needed": not _carries(facts)}
    if "error" in found:
        absent = is_absent(found, "nvidia")
        line = f"pip install {DALI}" if absent else f"pip install --force-reinstall {DALI}"
        return Row(status=MISSING, value="not installed" if absent else _broken(found), remedy=line, **row)
    return Row(status=OK, value=f"{found['version']}, decodes a JPEG", figures={"version": found["version"]}, **row)


def _ffcv_row(facts: Facts) -> Row:
    found = facts.get("ffcv", {"error": "ModuleNotFoundError: No module named 'ffcv'"})
    row: dict[str, Any] = {"section": "software", "name": "FFCV"}
    if "error" not in found:
        return Row(status=OK, value=found["version"], **row)
    absent = is_absent(found, "ffcv")
    needed = _apt_packages()
    line = "pip install 'bce3s[ffcv]'" if absent else "pip install --force-reinstall --no-deps ffcv==1.0.2"
    remedy = f"apt-get install {' '.join(needed)} && {line}" if needed else line
    return Row(status=MISSING, value="not installed (optional)" if absent else _broken(found), remedy=remedy, **row)


def _apt_packages() -> list[str]:
    """Debian's packages that building FFCV lacks here; all of them where nobody can be asked."""
    missing = [] if shutil.which("c++") else ["g++"]
    if not shutil.which("pkg-config"):
        return [*missing, "pkg-config", *sorted(_FFCV_PACKAGES.values(), reverse=True)]
    for name, package in _FFCV_PACKAGES.items():
        if subprocess.run(["pkg-config", "--exists", name], capture_output=True, check=False).returncode:
            missing.append(package)
    return missing


def _triton_row(facts: Facts) -> Row:
    """Only kernels on a GPU need it; on a CPU they are numba's."""
    found, on_gpu = facts["triton"], bool(facts["torch"].get("gpus"))
    row: dict[str, Any] = {"section": "software", "name": "triton", "needed": on_gpu}
    if "error" not in found:
        return Row(status=OK, value=found["version"], **row)
    absent = is_absent(found, "triton")
    value = ("not installed" if absent else _broken(found)) + ("" if on_gpu else " (only a GPU needs it)")
    return Row(status=MISSING, value=value, remedy="pip install triton" if absent else "pip install --force-reinstall triton", **row)


def _needed_row(module: str, found: dict[str, Any]) -> Row:
    package = PACKAGES.get(module, module)
    row: dict[str, Any] = {"section": "software", "name": package, "needed": True}
    if "error" not in found:
        return Row(status=OK, value=found["version"], **row)
    absent = is_absent(found, module)
    line = f"pip install {package}" if absent else f"pip install --force-reinstall {package}"
    return Row(status=MISSING, value="not installed" if absent else _broken(found), remedy=line, **row)


def extra_rows(facts: Facts) -> list[Row]:
    """One row an optional extra: there, not there, or broken."""
    rows = []
    for extra, modules in EXTRAS.items():
        found = {module: facts[module] for module in modules if module in facts}
        line = f"pip install 'bce3s[{extra}]'"
        absent = [module for module in modules if module not in found or is_absent(found[module], module)]
        broken = [module for module, each in found.items() if "error" in each and module not in absent]
        row: dict[str, Any] = {"section": "extras", "name": extra}
        if broken:
            # Not the extra, with which pip would install all of torch again.
            remedy = f"pip install --force-reinstall {' '.join(PACKAGES.get(module, module) for module in broken)}"
            value = "; ".join(f"{module} {_broken(found[module])}" for module in broken)
            rows.append(Row(status=MISSING, value=value, remedy=remedy, **row))
        elif absent:
            value = "not installed" if len(absent) == len(modules) else f"not complete: {', '.join(absent)} not installed"
            rows.append(Row(status=MISSING, value=value, remedy=line, **row))
        else:
            rows.append(Row(status=OK, value=", ".join(f"{module} {found[module]['version']}" for module in modules), **row))
    return rows


def installed(modules: tuple[str, ...]) -> list[str]:
    """Those of `modules` that lie somewhere on the path; none is imported."""
    return [module for module in modules if find_spec(module) is not None]


def gpu_rows(facts: Facts, driver_version: str) -> list[Row]:
    """Driver, CUDA, each GPU and its JPEG engine."""
    torch, cuda = facts["torch"], facts["cuda"]
    gpus = torch.get("gpus") or cuda.get("gpus") or []
    if "error" in cuda or not cuda.get("driver"):
        value = _broken(cuda) if "error" in cuda else "none: training runs on the CPU"
        return [Row(section="gpu", name="driver", status=OK if "error" not in cuda else ADVICE, value=value)]
    rows = []
    value = f"{driver_version or 'of unknown version'}, serves CUDA up to {cuda['cuda']}"
    if cuda["status"]:
        remedy = "look at what 'nvidia-smi' says; in a container, start it with --gpus all"
        rows.append(Row(section="gpu", name="driver", status=ADVICE, value=f"{value}; CUDA error {cuda['status']}", remedy=remedy))
    else:
        rows.append(Row(section="gpu", name="driver", status=OK, value=value))
    if torch.get("cuda"):
        rows.append(Row(section="gpu", name="CUDA runtime", status=OK, value=f"{torch['cuda']}, torch's own"))
    for number, gpu in enumerate(gpus):
        capability = ".".join(str(part) for part in gpu["capability"])
        text = f"{gpu['name']}, {gpu['bytes'] / _GIB:.0f} GiB, compute capability {capability}"
        works = gpu.get("works", True)
        figures = {"memory_bytes": gpu["bytes"], "compute_capability": capability}
        status, remedy = (OK, "") if works else (MISSING, _torch_line(cuda["cuda"]))
        text += "" if works else f": torch does not compute on it ({gpu.get('error', 'wrong results')})"
        rows.append(Row(section="gpu", name=f"GPU {number}", status=status, value=text, remedy=remedy, needed=not works, figures=figures))
    if gpus:
        rows += [_jpeg_row(facts.get("jpeg", {}), tuple(gpus[0]["capability"])), *_dali_gpu_rows(facts)]
    else:
        rows.append(Row(section="gpu", name="GPU 0", status=ADVICE, value="the driver is there, but shows no GPU", remedy="nvidia-smi -L"))
    return rows


def _dali_gpu_rows(facts: Facts) -> list[Row]:
    """Nothing where torch leaves the GPU idle, or DALI does not work at all, which is said elsewhere."""
    found = facts.get("dali_gpu", {})
    if not found or not facts["torch"].get("gpus") or "error" in facts["dali"]:
        return []
    row: dict[str, Any] = {"section": "gpu", "name": "DALI on GPU 0", "needed": not _carries(facts)}
    if "error" not in found:
        return [Row(status=OK, value="decodes a JPEG", **row)]
    served = facts["cuda"].get("cuda", "")
    remedy = "update the driver" + (f", or: pip install {DALI.replace('130', '120')}" if served.startswith("12.") else "")
    return [Row(status=MISSING, value=_broken(found), remedy=remedy, **row)]


def _carries(facts: Facts) -> bool:
    """Whether loader ffcv can train where DALI cannot."""
    return "ffcv" in facts and "error" not in facts["ffcv"]


def _jpeg_row(found: dict[str, Any], capability: tuple[int, ...]) -> Row:
    """The hardware JPEG decoder: as nvJPEG counts its engines, else as the compute capability lets one infer."""
    row: dict[str, Any] = {"section": "gpu", "name": "JPEG engine"}
    if found.get("engines") is not None:
        engines = "1 engine" if found["engines"] == 1 else f"{found['engines']} engines"  # an A100 has one, an H100 seven
        value = f"{engines}, by nvJPEG" if found["engines"] else "none, by nvJPEG: the GPU's cores decode"
        return Row(status=OK, value=value, figures={"engines": found["engines"]}, **row)
    inferred = f"inferred from compute capability {'.'.join(str(part) for part in capability)}; nvJPEG could not be asked"
    if capability in _WITH_ENGINE:
        return Row(status=OK, value=f"yes ({inferred})", **row)
    known = capability in _WITHOUT_ENGINE or capability < (8, 0)
    return Row(status=OK, value=f"none: the GPU's cores decode ({inferred})" if known else f"not known ({inferred})", **row)


def driver_version() -> str:
    """The driver's version by nvidia-smi, or by the kernel module where that is not on the path; empty where neither tells."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.split()
        return found[0] if found else ""
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:
            words = file.readline().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "")
