"""Checkpoint files, and the callbacks that write them."""
