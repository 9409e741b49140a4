"""Command lines around the library: `python -m tools.<folder>.<tool>` in the project's folder."""
