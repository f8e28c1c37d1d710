"""Small datasets made on the spot, for a first run and for tests."""
