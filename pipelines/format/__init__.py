"""How shards are written and read. The specification is `shards/README.md`; writer, reader and index live side by side here."""

from pipelines.format.index import FORMAT_NAME, FORMAT_VERSION, INDEX_DTYPE
from pipelines.format.reader import ShardSet, ShardSplit, open_shards
from pipelines.format.writer import WriteOptions, WriteReport, write_shards

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "INDEX_DTYPE",
    "ShardSet",
    "ShardSplit",
    "WriteOptions",
    "WriteReport",
    "open_shards",
    "write_shards",
]
