"""Calls that read values of a tensor: on a GPU, each stops the host until the device has caught up."""

from __future__ import annotations

import torch

READS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "unique")
} | {torch.nonzero, torch.unique, torch.masked_select}
