"""One file a kernel family: check arguments, allocate, call the chosen kernel, wrap the result."""
