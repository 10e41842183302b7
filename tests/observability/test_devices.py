"""Drivers' names lead to the right published rates."""

from __future__ import annotations

import pytest

from xmcdist.observability.devices import DEVICES, find_device, measured_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("driver", "short"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A10", "a10"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_drivers_name_finds_its_device(driver: str, short: str) -> None:
    device = find_device(driver)
    assert device is not None
    assert device.name == short


def test_every_short_name_finds_itself() -> None:
    assert [find_device(d.name) for d in DEVICES] == list(DEVICES)


def test_rates() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("a100", "fp32") == 19.5e12
    assert peak_flops("Tesla V100-SXM2-16GB", "auto") == 15.7e12  # no units for bf16
    assert peak_flops("Radeon 9000", "bf16") is None


def test_a_cpu_is_measured() -> None:
    rate = measured_peak_flops("fp32", seconds=0.01, size=256)
    assert 1e8 < rate < 1e14
