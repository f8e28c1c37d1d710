"""What several algorithms are made of: thresholds, alignment, mixing, tables, banks."""
