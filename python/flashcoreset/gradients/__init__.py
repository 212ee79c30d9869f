"""Per-sample gradients: sketches, norms, zeroth-order estimates, and the history of Adam that they are divided by."""
