"""Models of Hugging Face: text and audio."""
