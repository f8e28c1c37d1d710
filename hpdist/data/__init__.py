"""Data: sources, streams, batches and views."""
