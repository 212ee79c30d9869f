"""dattri's random projections without projection matrices: `dattri.func.projection` and the parameters of `dattri.params.projection`.

Attributors stay dattri's own.
"""
