"""What survives a kill: files that are whole or absent, the folder of a run's newest, and a thread that writes beside the training."""

from bce3s.checkpoint.file import CheckpointError, NotFinite, load_checkpoint, require_same_data, save_checkpoint
from bce3s.checkpoint.folder import CheckpointFolder, Loaded
from bce3s.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "CheckpointWriter",
    "Loaded",
    "NotFinite",
    "load_checkpoint",
    "require_same_data",
    "save_checkpoint",
]
