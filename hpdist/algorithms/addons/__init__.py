"""Add-ons: what changes an algorithm's targets or adds to its loss, whichever it is."""
