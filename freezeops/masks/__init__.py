"""Masks of single tensors: their bits, layouts and how users name entries. Needs NumPy only."""
