"""Loggers: metrics.csv and W&B."""
