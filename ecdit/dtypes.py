"""The types that a recipe's `train.precision` stands for."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
