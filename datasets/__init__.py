"""Data sets: one file each, parsing and augmentation only."""
