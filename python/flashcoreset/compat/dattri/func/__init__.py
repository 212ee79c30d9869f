"""`dattri.func`: projections."""
