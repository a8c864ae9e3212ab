"""Measure what each block of a trained network has learned."""
