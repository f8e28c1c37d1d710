"""Tasks: what a label is, its loss, its pseudo-labels and its scores."""
