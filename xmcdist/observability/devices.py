"""What processors can do at most: published rates of GPUs, measured ones of this CPU.

Rates are dense (without structured sparsity) and at boost clock, with accumulation in float32,
as the vendors' data sheets and architecture papers give them.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

__all__ = ["DEVICES", "Device", "find_device", "measured_peak_flops", "peak_flops"]

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Attributes:
        name: short name, as ``gpu=`` takes it.
        match: words that must all be in the name a driver gives, in small letters.
        memory: bytes.
        bandwidth: bytes a second to that memory.
        bf16, tf32, fp32: FLOP a second of matrix products; 0: the device has no such units.
        link: bytes a second that one GPU sends to others of its node (NVLink or PCIe, one direction).
    """

    name: str
    match: tuple[str, ...]
    memory: float
    bandwidth: float
    bf16: float
    tf32: float
    fp32: float
    link: float

    def flops(self, precision: str) -> float:
        """FLOP a second in ``fp32``, ``tf32``, ``bf16`` or ``auto`` (bf16 where there is any)."""
        if precision in ("bf16", "auto"):
            return self.bf16 or self.fp32
        return (self.tf32 or self.fp32) if precision == "tf32" else self.fp32


def _gpu(name: str, match: str, gb: float, gb_s: float, tflops: tuple[float, float, float], link_gb_s: float) -> Device:
    bf16, tf32, fp32 = (x * _TERA for x in tflops)
    return Device(name, tuple(match.split()), gb * _GIGA, gb_s * _GIGA, bf16, tf32, fp32, link_gb_s * _GIGA)


# First match wins: variants before the plain name.  (bf16, tf32, fp32) TFLOP/s.
DEVICES: tuple[Device, ...] = (
    # NVIDIA Blackwell data sheet (HGX B200, GB200 NVL72); half of the rates with sparsity.
    _gpu("gb200", "gb200", 186, 8000, (2500, 1250, 80), 900),
    _gpu("b200", "b200", 180, 7700, (2250, 1100, 75), 900),
    # NVIDIA H200, H100, GH200 and H20 data sheets; H100 architecture paper.
    _gpu("gh200", "gh200", 96, 4000, (989.4, 494.7, 67), 450),
    _gpu("h200-nvl", "h200 nvl", 141, 4800, (835.5, 417.5, 60), 450),
    _gpu("h200", "h200", 141, 4800, (989.4, 494.7, 67), 450),
    _gpu("h100-pcie", "h100 pcie", 80, 2000, (756, 378, 51), 64),
    _gpu("h100-nvl", "h100 nvl", 94, 3900, (835.5, 417.5, 60), 300),
    _gpu("h100", "h100", 80, 3350, (989.4, 494.7, 67), 450),
    _gpu("h20", "h20", 96, 4000, (148, 74, 44), 450),
    # NVIDIA L40S, L40 and L4 data sheets; Ada architecture paper.
    _gpu("l40s", "l40s", 48, 864, (362, 183, 91.6), 32),
    _gpu("l40", "l40", 48, 864, (181, 90.5, 90.5), 32),
    _gpu("l4", "l4", 24, 300, (121, 60, 30.3), 32),
    _gpu("rtx6000ada", "rtx 6000 ada", 48, 960, (364.2, 182.1, 91.1), 32),
    _gpu("rtx4090", "rtx 4090", 24, 1008, (165.2, 82.6, 82.6), 32),
    # NVIDIA RTX Blackwell architecture paper.
    _gpu("rtx5090", "rtx 5090", 32, 1792, (209.5, 104.8, 104.8), 64),
    # NVIDIA A100, A30, A10, A40 data sheets, GA102 architecture paper; A10G: of its maker for AWS.
    _gpu("a100-40gb", "a100 40gb", 40, 1555, (312, 156, 19.5), 300),
    _gpu("a100-pcie", "a100 pcie", 80, 1935, (312, 156, 19.5), 32),
    _gpu("a100", "a100", 80, 2039, (312, 156, 19.5), 300),
    _gpu("a30", "a30", 24, 933, (165, 82, 10.3), 32),
    _gpu("a10g", "a10g", 24, 600, (70, 35, 35), 32),
    _gpu("a10", "a10", 24, 600, (125, 62.5, 31.2), 32),
    _gpu("a40", "a40", 48, 696, (149.7, 74.8, 37.4), 32),
    _gpu("a6000", "rtx a6000", 48, 768, (154.8, 77.4, 38.7), 32),
    _gpu("rtx3090", "rtx 3090", 24, 936, (71, 35.6, 35.6), 32),
    # NVIDIA V100 and T4 data sheets: neither has units for bf16 or tf32.
    _gpu("v100-32gb", "v100 32gb", 32, 900, (0, 0, 15.7), 150),
    _gpu("v100-pcie", "v100 pcie", 16, 900, (0, 0, 14), 16),
    _gpu("v100", "v100", 16, 900, (0, 0, 15.7), 150),
    _gpu("t4", "t4", 16, 300, (0, 0, 8.1), 16),
    # AMD Instinct data sheets; MI250X: one of its two dies, which is one device.
    _gpu("mi300x", "mi300x", 192, 5300, (1307.4, 653.7, 163.4), 448),
    _gpu("mi250x", "mi250x", 64, 1638, (191.5, 47.9, 47.9), 250),
)


def find_device(name: str) -> Device | None:
    """The device of a short name (``h100``) or of a driver's (``NVIDIA H100 80GB HBM3``); None if unknown."""
    plain = name.lower().strip()
    for device in DEVICES:
        if plain == device.name:
            return device
    words = plain.replace("-", " ").replace("_", " ").split()
    joined = " ".join(words)
    for device in DEVICES:
        # A word that stands alone: "l4" is neither in "l40s" nor in "a10g".
        if all(any(w == m for w in words) for m in device.match) or " ".join(device.match) in (joined, plain):
            return device
    return None


def peak_flops(device_name: str, precision: str) -> float | None:
    """Published dense FLOP a second of a GPU, or None of one that is not tabled.

    Args:
        device_name: of ``torch.cuda.get_device_name()``, or short (``a100``).
        precision: ``fp32 | tf32 | bf16 | auto``.
    """
    device = find_device(device_name)
    return None if device is None else device.flops(precision)


def measured_peak_flops(precision: str = "fp32", seconds: float = 0.3, size: int = 1024) -> float:
    """FLOP a second of this process's CPU threads: the best of matrix products for a short while.

    Args:
        precision: ``fp32``; ``bf16`` and ``auto`` where the processor has instructions for it.
        seconds: how long to measure, after a first product that is not counted.
        size: of the square matrices; 1024 keeps three of them within a server's caches.

    Cost: ``seconds``, and torch's import.
    """
    import torch

    dtype = torch.bfloat16 if precision in ("bf16", "auto") and _cpu_has_bf16() else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        a @ b
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            return any(flag in f.read() for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    except OSError:
        return os.uname().machine == "arm64"  # Apple's processors have no /proc
