"""Helpers that every package uses: errors, whole-file writing, locks, text in messages."""
