"""Nets: a ModelHelper each, for one network on one data set."""
