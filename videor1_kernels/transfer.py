"""Values that the host knows, on a device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on ``device``. From ordinary memory, a copy to a GPU would wait for all that is queued there."""
    device = torch.device(device)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
