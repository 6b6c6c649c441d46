"""Linear layers of a decode step that share their input, with their LoRA adapters: few kernels a token, and no casts.

peft computes each adapted layer as base(x) + B(A(x)) * scale, with casts to the adapters' fp32 and back around it:
about ten kernels a layer, each of which takes longer to launch than to run. Here the A of all layers that share an
input are one matrix, and each B holds the scale, so that a layer costs one more product, which adds to its base's.
Merging into weights of 16 bits instead would round small deltas away: the sampled policy would not be the trained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videor1.model.cpu_linear import linear


class _Adapter(NamedTuple):
    """An adapter of one layer: its change of the output is (x A^T) B^T."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank], times the scale


class Projections:
    """Linear layers of one input, as a callable: x [R, in] -> their outputs [R, out], in order.

    Args:
        layers: the layers, adapted or not. One that is neither plain nor a plain LoRA layer is called as it is.
        dtype: what the step computes in. Adapters are cast to it once, here: their weights must not change meanwhile.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        adapters = [_adapter(layer, dtype) for layer in layers]
        self._layers: list[Any] = [
            layer if found is None else layer.base_layer for layer, found in zip(layers, adapters, strict=True)
        ]
        self._b = [None if found is None else found.b for found in adapters]
        used = [found.a for found in adapters if found is not None]
        self._a = torch.cat(used) if used else None
        self._ranks = [len(a) for a in used]

    def __call__(self, x: Tensor) -> list[Tensor]:
        outs = [linear(x, m.weight, m.bias) if type(m) is nn.Linear else m(x) for m in self._layers]
        if self._a is None:
            return outs
        inner = iter(F.linear(x, self._a).split(self._ranks, 1))
        return [out if b is None else torch.addmm(out, next(inner), b.T) for out, b in zip(outs, self._b, strict=True)]


def _adapter(layer: Any, dtype: torch.dtype) -> _Adapter | None:
    """Return the adapter that a LoRA layer adds now; None for other layers, and where it does anything beyond."""
    if type(getattr(layer, "base_layer", None)) is not nn.Linear or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in getattr(layer, "lora_variant", ()) or layer.lora_B[active[0]].bias is not None:
        return None
    a, b = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    return _Adapter(a.detach().to(dtype), (b.detach() * layer.scaling[active[0]]).to(dtype))
