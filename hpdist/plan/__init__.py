"""A run's need of GPU memory, rehearsed before the hardware exists."""
