"""Ways to compute a step that change time and memory, never results."""
