"""Messages to people: redaction, progress, numbers in human units."""
