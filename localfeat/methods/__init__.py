"""The objectives of local modules, their parts, and the methods that choose them."""
