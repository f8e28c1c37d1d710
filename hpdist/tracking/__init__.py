"""The output of a run: records, trackers, the progress bar."""
