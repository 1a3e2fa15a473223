"""Annotations in the manner of COCO: a json file with images, annotations and categories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.files import printable
from pipelines.datasets.lists import ImageList, PathFault, clean_path, read_bytes, require_entries, require_label
from pipelines.types import DatasetError


def read_annotations(file: Path, num_classes: int) -> tuple[ImageList, dict[int, str]]:
    """Reads one split; the category id is the label.

    Args:
        file: json with `images` (`id`, `file_name`), `annotations` (`image_id`, `category_id`) and perhaps `categories` (`id`, `name`).
        num_classes: category ids must lie below.

    Returns:
        The images in their own order, and id -> name of the categories, empty where the file has none.

    Raises:
        DatasetError: no JSON, missing keys, wrong types, an image with none or two annotations, or what `ImageList` does not allow.
    """
    content = _load(file)
    if not isinstance(content, dict):
        raise DatasetError(f"{file} holds no object with images and annotations: fetch the annotations again")
    label_of: dict[int, int] = {}
    for number, (image_id, category_id) in _records(content, "annotations", ("image_id", int), ("category_id", int), file):
        if label_of.setdefault(image_id, category_id) != category_id or len(label_of) < number:
            raise DatasetError(f"annotation {number} of {file} is the second one of image id {image_id}: fetch the annotations again")
    paths, labels = [], []
    for number, (image_id, file_name) in _records(content, "images", ("id", int), ("file_name", str), file):
        try:
            if image_id not in label_of:
                raise PathFault(f"(id {image_id}) has no annotation of its own: fetch the annotations again")
            paths.append(clean_path(file_name))
            labels.append(require_label(label_of.pop(image_id), num_classes))
        except PathFault as fault:
            raise DatasetError(f"image {number} of {file} {fault}") from None
    if label_of:
        first = next(iter(label_of))
        raise DatasetError(
            f"{file} annotates {len(label_of):,} images it does not list, the first is id {first}: fetch the annotations again"
        )
    numbers_N = np.arange(1, len(paths) + 1, dtype=np.int64)
    images = ImageList(file=file, paths=paths, labels_N=np.array(labels, np.int64), numbers_N=numbers_N, unit="image")
    require_entries(images)
    return images, _names(content, file) if "categories" in content else {}


def read_categories(file: Path) -> dict[int, str]:
    """Reads id -> name from a json list of categories.

    Raises:
        DatasetError: no JSON, or not a list of objects with `id` and `name`.
    """
    return _names({"categories": _load(file)}, file)


def _names(content: dict[str, Any], file: Path) -> dict[int, str]:
    return {category_id: printable(name) for _, (category_id, name) in _records(content, "categories", ("id", int), ("name", str), file)}


def _load(file: Path) -> Any:
    try:
        # The bytes get no name here, so that they are freed once decoded: 120 MB for iNaturalist.
        return json.loads(read_bytes(file), object_hook=_slim)
    except DatasetError:
        raise
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is not JSON ({printable(str(error))}): fetch it again") from None


def _slim(record: dict[str, Any]) -> dict[str, Any] | tuple[Any, Any]:
    """The two fields that matter of an image or an annotation, as soon as it is parsed: half a million whole ones are 300 MB."""
    if "file_name" in record:
        return record.get("id"), record["file_name"]
    if "image_id" in record:
        return record["image_id"], record.get("category_id")
    return record


def _records(
    content: dict[str, Any], key: str, first: tuple[str, type], second: tuple[str, type], file: Path
) -> list[tuple[int, tuple[Any, Any]]]:
    """(number from 1, the values of two fields) of every object in the list `key`; the list is taken out of `content`, to be freed."""
    records = content.pop(key, None)
    if not isinstance(records, list):
        raise DatasetError(f"{file} has no list '{key}': fetch the annotations again")
    values = []
    for number, record in enumerate(records, 1):
        pair = record if isinstance(record, tuple) else (None, None)
        if isinstance(record, dict):
            pair = (record.get(first[0]), record.get(second[0]))
        # `type`, as True is an int to `isinstance`.
        if type(pair[0]) is not first[1] or type(pair[1]) is not second[1]:
            kinds = " and ".join(f"{name} ({'text' if kind is str else 'an integer'})" for name, kind in (first, second))
            raise DatasetError(f"'{key}' entry {number} of {file} does not have {kinds}: fetch the annotations again")
        values.append((number, pair))
    return values
