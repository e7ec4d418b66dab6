"""Kernels of the model in Triton, each behind one function with a twin in plain torch: `parallel.kernels` says which of
the two computes. The functions are in `router`, `slots`, `adaln`, `attention` and `gelu`; what is named `*_triton` is
imported where a kernel is launched."""
