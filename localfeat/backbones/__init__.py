"""Build timm models, decompose them into stem, blocks and tail, and split them."""
