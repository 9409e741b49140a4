"""Unstructured sparsity of weights."""
