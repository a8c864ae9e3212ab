"""What each block of a trained network knows."""
