"""Evaluators: what a model's outputs are worth, in NumPy."""
