"""timm models: built, decomposed into stem, blocks and tail, and split."""
