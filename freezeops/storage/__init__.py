"""Masks as bytes under a checksum, and the search for the variables of saved names. Needs NumPy only."""
