"""The Triton kernels and what launches them; importing a module of this package imports triton."""
