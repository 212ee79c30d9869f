"""Numbers and names that several families share."""

DEFAULT_MEMORY_BUDGET = 256 * 2**20
DISTANCES = ("euclidean", "sqeuclidean", "l1")
