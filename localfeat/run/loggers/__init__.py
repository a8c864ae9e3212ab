"""Where logged figures go: metrics.csv and W&B."""
