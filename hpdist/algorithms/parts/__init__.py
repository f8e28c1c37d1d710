"""Building blocks of algorithms: thresholds, alignment, mixing, tables, banks."""
