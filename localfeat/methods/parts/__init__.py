"""Parts of objectives: heads, decoders, losses, targets."""
