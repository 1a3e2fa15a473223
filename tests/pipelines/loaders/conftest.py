"""What the tests of streamed shards share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.format import ShardSet
from tests.pipelines.loaders.streams import MakeShards, streamed_shards


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> ShardSet:
    return streamed_shards(make_shards)


@pytest.fixture
def folder(shards: ShardSet, tmp_path: Path) -> Path:
    """A copy to be hurt."""
    return Path(shutil.copytree(shards.root, tmp_path / "shards"))
