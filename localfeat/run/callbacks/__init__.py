"""Callbacks that watch a run while it trains."""
