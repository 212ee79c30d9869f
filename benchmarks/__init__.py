"""Benchmarks: our call and the peer's on the same data in the same run. One file per family; see README.md."""
