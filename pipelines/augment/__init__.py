"""Whole-batch augmentation on the device: crop and flip, policies, mixing into the three views."""
