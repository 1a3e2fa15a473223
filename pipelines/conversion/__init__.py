"""Turns an opened data set into a shard folder: planned units, many hands, resumable, all or nothing.

plan: what is written, settled before the first image is read. unit: one tar and its record. executors: processes of this machine, or a Ray
cluster. spool: sources that can only be read front to back. site: where it is made and how it takes its final name. finish: index,
resampled streams, betons, manifest. convert: all of it in order.
"""

from pipelines.conversion.convert import WriteOptions, estimate_work, merge_parts, write_shards
from pipelines.conversion.executors import EXECUTORS, ExecutorOptions
from pipelines.conversion.finish import FORMATS, WriteReport
from pipelines.conversion.plan import Estimate
from pipelines.conversion.resampling import RESAMPLINGS, Resampling

__all__ = [
    "EXECUTORS",
    "FORMATS",
    "RESAMPLINGS",
    "Estimate",
    "ExecutorOptions",
    "Resampling",
    "WriteOptions",
    "WriteReport",
    "estimate_work",
    "merge_parts",
    "write_shards",
]
