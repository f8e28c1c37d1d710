"""Batch normalisation over several ranks: its arithmetic, and the running statistics."""
