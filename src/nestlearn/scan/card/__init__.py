"""A chunk as GPU kernels, in Triton. Loaded only where it can run."""
