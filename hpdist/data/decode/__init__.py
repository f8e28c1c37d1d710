"""From what is stored to tensors: images, sound, text, vectors; in threads or processes."""
