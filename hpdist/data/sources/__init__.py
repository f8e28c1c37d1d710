"""Sets of rows, labelled and not: found, opened, chosen, counted and compared."""
