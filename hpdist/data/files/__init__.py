"""Files wherever they are: opening, reading on after a failure, names and paths."""
