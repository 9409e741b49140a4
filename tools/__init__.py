"""Command lines around the library. Run them from the project's folder: `python -m tools.<folder>.<tool>`."""
