"""Experiment trackers that a run's log lines also go to."""
