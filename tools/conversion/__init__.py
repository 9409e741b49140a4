"""Exporting saved models and checking exported files."""
