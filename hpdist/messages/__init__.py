"""What is said to people: redaction, progress, numbers in human units."""
