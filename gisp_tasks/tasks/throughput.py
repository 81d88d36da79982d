"""How fast this machine multiplies matrices: the yardstick of time estimates."""

import time


def matmul_flops(dtype: str) -> float:
    """Floating-point operations a second of a square matrix product, best of a few within about a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 1024
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best, deadline = float("inf"), time.perf_counter() + 1
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
