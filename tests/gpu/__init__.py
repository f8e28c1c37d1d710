"""Tests that need a GPU, and their rehearsal on a CPU: see docs/gpu.md."""
