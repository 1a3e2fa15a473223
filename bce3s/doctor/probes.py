"""What is imported and tried in a process of its own, because it may crash, hang or fail; each fact is a line of JSON on standard output.

Run as `python -c "from bce3s.doctor.probes import main; main(…)"`. A line that begins something is printed before it is tried, so that
whoever reads knows what a process died of.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import io
import json
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

# Module → the package that installs it, where it is called otherwise.
PACKAGES = {
    "PIL": "pillow",
    "vl_convert": "vl-convert-python",
    "pynvml": "nvidia-ml-py",
    "mkdocs": "mkdocs-material",
    "nvidia.dali": "nvidia-dali-cuda130",
}
_JPEG_ENGINES = ("libnvjpeg.so.13", "libnvjpeg.so.12")


def main(subjects: list[str]) -> None:
    """Looks at one subject after another: "torch", "cuda", "choice DIR", or the name of any module."""
    # What libraries print belongs to the errors; standard output is for facts alone.
    facts, sys.stdout = sys.stdout, sys.stderr
    for subject in subjects:
        name, _, argument = subject.partition(" ")
        print(json.dumps({"subject": name, "begun": True}), file=facts, flush=True)
        found: dict[str, Any]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = _SPECIAL[name](argument) if name in _SPECIAL else _module(name)
            found["warnings"] = [" ".join(str(each.message).split()) for each in caught if each.category is UserWarning]
        except BaseException as error:  # whatever it is, it is what is wrong
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps({"subject": name, **found}), file=facts, flush=True)


def _module(name: str) -> dict[str, Any]:
    module = importlib.import_module(name)
    return {"version": _version(name, module)}


def _version(name: str, module: Any) -> str:
    try:
        return metadata.version(PACKAGES.get(name, name))
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def _torch(_: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": []}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            found["gpus"].append({"name": gpu.name, "bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor], **_adds_up(number)})
    return found


def _adds_up(number: int) -> dict[str, Any]:
    """Whether torch computes on a GPU: a build without kernels for it fails here, and nowhere before."""
    import torch

    try:
        ones = torch.ones(8, device=f"cuda:{number}")
        return {"works": float((ones + ones).sum()) == 16.0}
    except RuntimeError as error:
        return {"works": False, "error": str(error).splitlines()[0]}


def _dali(_: str) -> dict[str, Any]:
    dali = importlib.import_module("nvidia.dali")  # first: what is wrong with it is not to be taken for what is wrong with numpy
    _decode(None)
    return {"version": dali.__version__}


def _dali_gpu(_: str) -> dict[str, Any]:
    """The same on the first GPU; nothing where there is no driver."""
    if _driver() is not None:
        _decode(0)
        return {"works": True}
    return {}


def _decode(gpu: int | None) -> None:
    """A red JPEG through DALI on the CPU or a GPU."""
    import numpy as np
    from nvidia.dali import Pipeline, fn, types
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (255, 0, 0)).save(buffer, "JPEG")
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu" if gpu is None else "mixed", output_type=types.RGB))
    pipeline.feed_input("encoded", [np.frombuffer(buffer.getvalue(), np.uint8)])
    (images,) = pipeline.run()
    if list(images.shape()[0]) != [24, 32, 3]:
        raise RuntimeError(f"it decodes a JPEG of 24 × 32 pixels to {images.shape()[0]}")


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _cuda(_: str) -> dict[str, Any]:
    """What the driver itself says, with or without torch: devices, and the newest CUDA it serves."""
    driver = _driver()
    if driver is None:
        return {"driver": False, "gpus": []}
    number, version = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    found: dict[str, Any] = {"driver": True, "status": status, "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}", "gpus": []}
    if status == 0 and driver.cuDeviceGetCount(ctypes.byref(number)) == 0:
        found["gpus"] = [_device(driver, position) for position in range(number.value)]
    return found


def _device(driver: Any, position: int) -> dict[str, Any]:
    device, num_bytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(device), position)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(num_bytes), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return {"name": name.value.decode(errors="replace"), "bytes": num_bytes.value, "capability": capability}


def _jpeg(_: str) -> dict[str, Any]:
    """Engines of the first GPU's JPEG decoder, as nvJPEG counts them (nvjpegGetHardwareDecoderInfo of nvjpeg.h)."""
    library = None
    for name in _JPEG_ENGINES:
        for folder in ("", *_library_folders()):
            try:
                library = library or ctypes.CDLL(f"{folder}{name}")
            except OSError:
                continue
    if library is None:
        return {"engines": None}
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    if library.nvjpegCreateSimple(ctypes.byref(handle)) != 0:
        return {"engines": None}
    asked = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores)) == 0
    library.nvjpegDestroy(handle)
    return {"engines": engines.value if asked else None, "cores": cores.value}


def _library_folders() -> list[str]:
    """Where pip lays CUDA's libraries."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [f"{root}/{inner}/lib/" for root in roots for inner in ("cu13", "nvjpeg")]


def _choice(shards: str) -> dict[str, Any]:
    """What `--loader auto` takes for these shards on this machine, and what the recipe of their data set asks for."""
    from bce3s.device import resolve_device
    from bce3s.recipes import build_recipe
    from pipelines.format import open_shards
    from pipelines.loaders import choose_loader

    opened, device = open_shards(shards), resolve_device("auto")
    config = build_recipe(None, opened.dataset)
    choice = choose_loader(config.data, opened, device)
    return {"loader": choice.name, "reason": choice.reason, "dataset": opened.dataset, **_recipe_facts(config)}


def _memory(_: str) -> dict[str, Any]:
    from pipelines.loaders.resident_size import free_host_bytes

    return {"free_bytes": free_host_bytes()}


def _recipe(dataset: str) -> dict[str, Any]:
    from bce3s.recipes import build_recipe

    return {"dataset": dataset, **_recipe_facts(build_recipe(None, dataset))}


def _recipe_facts(config: Any) -> dict[str, Any]:
    return {"batch_size": config.data.batch_size, "image_size": config.data.image_size, "arch": config.model.arch}


_SPECIAL: dict[str, Callable[[str], dict[str, Any]]] = {
    "torch": _torch,
    "dali": _dali,
    "dali_gpu": _dali_gpu,
    "cuda": _cuda,
    "jpeg": _jpeg,
    "memory": _memory,
    "choice": _choice,
    "recipe": _recipe,
}
