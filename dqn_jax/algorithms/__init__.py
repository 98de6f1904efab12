"""Algorithms: one file each, a function that returns an ``Algorithm``."""
