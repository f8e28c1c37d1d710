"""A run: its config, its parts, the step, the loop around it and its recovery."""
