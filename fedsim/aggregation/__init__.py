"""How updates become one sum: the seam for secure aggregation."""
