"""Linear layers of a decode step that share their input, with their LoRA adapters: one or two products, and no casts.

Layers with one input have one matrix here, [W; A] of all their weights and the A of their adapters, in the compute
dtype; where adapters are, a second product adds B times what the A gave, in place. peft computes each adapted layer as
base(x) + B(A(x)) * scale, with casts to the adapters' fp32 and back around it: about ten kernels a layer, each of which
takes longer to launch than to run. Merging adapters into weights of 16 bits would round small deltas away: the sampled
policy would not be the trained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from videor1.model.cpu_linear import linear
from videor1.model.lora import plain_adapter

# A second copy of weights that are in the compute dtype already is made only while it is small.
MOST_COPIED = 2**26  # bytes of the weights of one input


class _Adapter(NamedTuple):
    """An adapter of one layer: its change of the output is (x A^T) B^T."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank], times the scale


class Projections:
    """Linear layers of one input, as a callable: x [R, in] -> their outputs side by side, [R, sum of out].

    Args:
        layers: the layers, adapted or not. If one is neither plain nor a plain LoRA layer, all are called as they are.
        dtype: what the step computes in. Weights are copied or cast to it once, here: they must not change meanwhile.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._modules: Sequence[nn.Module] | None = None
        adapters = [_adapter(layer, dtype) for layer in layers]
        plain: list[Any] = [
            layer if found is None else layer.base_layer for layer, found in zip(layers, adapters, strict=True)
        ]
        if any(type(m) is not nn.Linear for m in plain):
            self._modules = layers
            return
        self._outs = [m.out_features for m in plain]
        self._width = sum(self._outs)
        used = [found for found in adapters if found is not None]
        self._b = _block_diagonal(adapters, self._outs) if used else None
        size = sum(m.weight.numel() * dtype.itemsize for m in plain)
        as_it_is = len(plain) == 1 and not used and plain[0].weight.dtype == dtype
        self._packed = as_it_is or any(m.weight.dtype != dtype for m in plain) or size <= MOST_COPIED
        self._bias = None
        if any(m.bias is not None for m in plain):
            biases = [m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in plain]
            self._bias = torch.cat([bias.to(dtype) for bias in biases])
        a = [found.a for found in used]
        if self._packed:
            weights = [m.weight.detach().to(dtype) for m in plain] + a
            self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            if self._bias is not None and used:
                self._bias = torch.cat([self._bias, self._bias.new_zeros(len(self._weight) - self._width)])
            return
        self._weights = [m.weight.detach() for m in plain]
        self._a = torch.cat(a) if a else None

    def joined(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Return (weight [out + ranks, in], bias, B [out, ranks] or None), or None where there is no such matrix."""
        return (self._weight, self._bias, self._b) if self._modules is None and self._packed else None

    def tensors(self) -> list[Tensor] | None:
        """Return all that a call reads; None where layers are called as they are."""
        if self._modules is not None:
            return None
        weights = [self._weight] if self._packed else [*self._weights, self._a]
        return [x for x in (*weights, self._bias, self._b) if x is not None]

    def __call__(self, x: Tensor) -> Tensor:
        if self._modules is not None:
            return torch.cat([m(x) for m in self._modules], 1)
        if self._packed:
            out = linear(x, self._weight, self._bias)
            return out if self._b is None else out[:, : self._width].addmm_(out[:, self._width :], self._b.T)
        out = x.new_empty((len(x), self._width))
        for part, weight in zip(out.split(self._outs, 1), self._weights, strict=True):
            torch.mm(x, weight.T, out=part)
        if self._bias is not None:
            out += self._bias
        return out if self._a is None or self._b is None else out.addmm_(x @ self._a.T, self._b.T)


def _block_diagonal(adapters: Sequence[_Adapter | None], outs: Sequence[int]) -> Tensor:
    """[sum of out, sum of ranks]: each adapter's B at its layer's rows, 0 elsewhere."""
    used = [found for found in adapters if found is not None]
    b = used[0].b.new_zeros((sum(outs), sum(found.b.shape[1] for found in used)))
    row = column = 0
    for found, out in zip(adapters, outs, strict=True):
        if found is not None:
            b[row : row + out, column : column + found.b.shape[1]] = found.b
            column += found.b.shape[1]
        row += out
    return b


def _adapter(layer: Any, dtype: torch.dtype) -> _Adapter | None:
    """Return the adapter that a LoRA layer adds now; None for other layers, and where it does anything beyond."""
    name = plain_adapter(layer) if type(getattr(layer, "base_layer", None)) is nn.Linear else None
    if name is None:
        return None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Adapter(a.detach().to(dtype), (b.detach() * layer.scaling[name]).to(dtype))
