"""What every family builds on: tensors in, errors, progress, the compiled modules, memory, the choice of a backend."""
