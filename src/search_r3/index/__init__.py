"""Nearest-neighbour search over vectors, and the folder that keeps vectors and documents. No model is imported here."""
