"""What a person sees while a run trains: a dashboard on a terminal, plain lines elsewhere; drawn from the lines of the run's log."""

from __future__ import annotations

from bce3s.progress.standing import Standing
from bce3s.progress.table import accuracy_table
from bce3s.progress.training import TrainingProgress, is_live

__all__ = ["Standing", "TrainingProgress", "accuracy_table", "is_live"]
