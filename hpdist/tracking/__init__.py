"""What a run leaves behind: records, trackers, the progress bar."""
