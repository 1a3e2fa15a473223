"""What lies in shards: image bytes, tars, index, manifest. The specification is `shards/README.md`; `pipelines.conversion` makes them."""

from pipelines.format.encoding import PixelOptions
from pipelines.format.index import FORMAT_NAME, FORMAT_VERSION, INDEX_DTYPE
from pipelines.format.reader import ShardSet, ShardSplit, open_shards

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "INDEX_DTYPE",
    "PixelOptions",
    "ShardSet",
    "ShardSplit",
    "open_shards",
]
