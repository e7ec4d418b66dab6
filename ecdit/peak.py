"""What a device can do at most, the yardstick of MFU."""

import time

import torch

# Dense bf16 tensor-core rates of NVIDIA's datasheets, FLOP/s, by a word of the device's name.
BF16_RATES = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device for matrix products in `dtype`: the datasheet's in bf16 on a known GPU, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for word, rate in BF16_RATES.items():
            if word in name:
                return rate
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices, the best of a few."""
    side, tries = (8192, 5) if device.type == "cuda" else (1536, 3)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        _synchronize(device)
        began = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
