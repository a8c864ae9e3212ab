"""What fits into a memory budget, without a GPU."""
