"""Whether machines can train together, before they try."""
