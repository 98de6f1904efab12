"""Memories: one file each, a function that returns a ``Memory``."""
