"""How training is spread out: the only package that knows of ranks. It knows tensors and groups, not diffusion."""
