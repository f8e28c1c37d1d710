"""Data: files, decoding, sets of rows, streams, batches and views."""
