"""From disk to device batches: data sets, shard format, sampling order, augmentation and loaders.

This package never imports `bce3s`; `bce3s` builds on it. `__project__` lets `bce3s` notice a foreign package of the same name.
"""

__project__ = "bce3s"
