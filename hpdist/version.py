"""The version of hpdist."""

__version__ = "0.1.0"
