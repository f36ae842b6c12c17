"""What the C++ kernels take: fp32 and bf16 in the CPU's memory."""

from __future__ import annotations

import torch

from pearl_kernels.checks import Checks

CHECKS = Checks("cpu", (torch.float32, torch.bfloat16))
