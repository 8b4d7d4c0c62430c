"""How fast devices can be: dense bfloat16, from the makers' data sheets, as of 2025-11.

NVIDIA gives most figures with 2:4 sparsity; they are halved here. What a device sustains is less:
an H100 was seen to multiply 8,192-square matrices at 81 % of this.
"""

from __future__ import annotations

import re

_PEAK_TFLOPS = (
    # The first whose pattern is found in the device's name counts.
    (r"\bH200 NVL\b", 835.5),  # H200 data sheet: 1,671 sparse
    (r"\bH200\b", 989.5),  # H200 data sheet: 1,979 sparse
    (r"\bH100 NVL\b", 835.5),  # H100 data sheet: 1,671 sparse
    (r"\bH100 PCIe\b", 756.5),  # H100 PCIe product brief: 1,513 sparse
    (r"\bH100\b", 989.5),  # H100 data sheet, SXM: 1,979 sparse
    (r"\bA100\b", 312.0),  # A100 data sheet
    (r"\bA10G\b", 70.0),  # A10G data sheet; the A10 is another part
    (r"\bL4\b", 121.0),  # L4 data sheet: 242 sparse
)


def peak_flops(device_name: str) -> float | None:
    """Operations a second of a device, dense bfloat16; None if it is not in the table.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it, such as `NVIDIA H100 80GB HBM3`.
    """
    spaced = device_name.replace("-", " ")
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS if re.search(name, spaced)), None)
