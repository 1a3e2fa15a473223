"""The package is what it says: what the wheel holds, that its names are guarded, that versions and pins agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bce3s

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PYPROJECT: dict[str, Any] = tomllib.loads(read("pyproject.toml"))
PINS = [Requirement(line.partition("#")[0]) for line in read("constraints.txt").splitlines() if line.partition("#")[0].strip()]
DIRECT = [
    Requirement(text)
    for text in (
        *PYPROJECT["build-system"]["requires"],
        *PYPROJECT["project"]["dependencies"],
        *(text for extra in PYPROJECT["project"]["optional-dependencies"].values() for text in extra if not text.startswith("bce3s[")),
    )
]


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    [path] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {"bce3s", "pipelines", f"bce3s-{bce3s.__version__}.dist-info"}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for package in ("bce3s", "pipelines") for path in (ROOT / package).rglob("*.py")}


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"bce3s-{bce3s.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "Classifier: Private :: Do Not Upload\n" in metadata
    assert f"Version: {bce3s.__version__}\n" in metadata
    assert "bce3s = bce3s.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


# ---- the names


def import_bce3s(*path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", "import bce3s"], env=environment, cwd=path[0], capture_output=True, text=True, timeout=60)


def test_a_foreign_package_named_pipelines_is_noticed(tmp_path: Path) -> None:
    assert import_bce3s(ROOT).returncode == 0
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("")
    shadowed = import_bce3s(tmp_path, ROOT)
    assert shadowed.returncode != 0
    assert f"ImportError: the package 'pipelines' at {tmp_path / 'pipelines'} is not bce3s's own" in shadowed.stderr


@pytest.mark.parametrize("folder", ["tools", "shards", "tests", "benchmarks"])
def test_folders_that_must_not_be_packages(folder: str) -> None:
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_no_script_shadows_the_standard_library() -> None:
    # A script's own folder comes first on its sys.path: a tools/random.py would replace `random` for every import.
    scripts = {path.stem for folder in ("tools", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    assert not scripts & sys.stdlib_module_names


# ---- versions and pins


def test_the_changelog_opens_with_this_version() -> None:
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == bce3s.__version__


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_is_pinned_once(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    wanted = [requirement for requirement in DIRECT if applies(requirement, environment)]
    pins = [pin for pin in PINS if applies(pin, environment)]
    twice = [name for name, count in Counter(canonicalize_name(pin.name) for pin in pins).items() if count > 1]
    assert not twice, f"constraints.txt pins {twice} more than once for Python {python}"
    pinned = {canonicalize_name(pin.name): pinned_version(pin) for pin in pins}
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is a direct dependency, but constraints.txt has no version of it for Python {python}"
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is not {requirement}"


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pinned_version(pin: Requirement) -> str:
    [specifier] = pin.specifier
    assert specifier.operator == "==", f"{pin} in constraints.txt is not an exact version"
    assert "*" not in specifier.version
    return specifier.version
