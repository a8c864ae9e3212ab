"""What objectives are made of: heads, decoders, losses, targets."""
