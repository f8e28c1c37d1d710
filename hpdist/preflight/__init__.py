"""Checks whether machines can train together, before they try."""
