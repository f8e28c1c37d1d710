"""Models of Hugging Face: text and sound."""
