"""Measuring a model on a labelled set."""
