"""Tests; makes helper modules importable as ``tests.<folder>.<module>``, whatever else is installed."""
