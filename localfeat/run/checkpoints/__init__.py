"""Checkpoint files, and when they are written."""
