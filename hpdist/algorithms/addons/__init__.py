"""Add-ons: changes of an algorithm's targets, or terms for its loss, for any algorithm."""
