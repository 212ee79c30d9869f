"""Other libraries' names over these kernels: an import swap each."""
