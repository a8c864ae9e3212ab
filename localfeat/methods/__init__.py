"""What local modules are trained for: objectives, their parts, and the methods that choose them."""
