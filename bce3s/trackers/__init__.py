"""Experiment trackers that the lines of a run's log also go to, each through its own library, which is an optional extra."""

from __future__ import annotations

from bce3s.trackers.seam import TRACKERS, Following, Tracker, follow_finished, followed, require_tracker

__all__ = ["TRACKERS", "Following", "Tracker", "follow_finished", "followed", "require_tracker"]
