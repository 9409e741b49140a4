"""Command lines around the library: `python -m tools.<folder>.<tool>` in the project's folder."""

import learners as _quiet  # noqa: F401 (importing it keeps TensorFlow's start quiet)
