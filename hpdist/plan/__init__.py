"""What a run needs of a GPU's memory, rehearsed before anything is bought."""
