"""`dattri.params`: parameters of projections."""
