"""Objectives of single methods."""
