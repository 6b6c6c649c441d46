"""A layer of linear attention (Gated DeltaNet) in a rollout: a new token of each sequence, from states in the cache.

What such a layer knows of a sequence does not grow: the state of the gated delta rule and the last inputs of its
convolution. A prompt's are computed once, copied for each of its completions (``Prefill``), and stepped in place here.

R sequences, Hk heads of k with Dk entries, Hv heads of v with Dv entries, C = 2 Hk Dk + Hv Dv channels, K taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videor1.rollout.local.kv_cache import States
from videor1_kernels.prefix_gated_delta.reference_step import ConvStep, DeltaStep

OPERATIONS = ("causal_conv_step", "gated_delta_step", "gated_rms_norm")


class LinearOperations(NamedTuple):
    """Implementations of what such a layer computes between its products."""

    convolve: Callable[..., Tensor]  # of causal_conv_step
    recur: Callable[..., Tensor]  # of gated_delta_step
    norm: Callable[..., Tensor]  # of gated_rms_norm


class LinearWeights(NamedTuple):
    """What such a layer computes with, beside its linear layers: at addresses that stay."""

    filter: Tensor  # [C, K]
    decay: Tensor  # [Hv], -exp(A_log), fp32
    step_bias: Tensor  # [Hv]
    norm: Tensor  # [Dv]
    eps: float
    key_heads: int
    activation: str

    @staticmethod
    def of(layer: Any, *, copy: bool) -> LinearWeights:
        """Those of transformers' layer; ``copy``: its parameters do not stay where they are."""
        filter_, step_bias, norm = (p.detach().to(p.dtype, copy=copy) for p in _parameters(layer))
        decay = torch.empty_like(layer.A_log, dtype=torch.promote_types(layer.A_log.dtype, torch.float32))
        made = LinearWeights(
            filter_.squeeze(1), decay, step_bias, norm, layer.norm.variance_epsilon, layer.num_k_heads, layer.activation
        )
        made.renew(layer, copied=copy)
        return made

    def renew(self, layer: Any, *, copied: bool) -> bool:
        """Take the layer's values of now; return False where a parameter that is used where it lies has moved."""
        for own, parameter in zip((self.filter, self.step_bias, self.norm), _parameters(layer), strict=True):
            if own.data_ptr() != parameter.data_ptr():
                if not copied:
                    return False
                own.copy_(parameter.detach().view_as(own))
        self.decay.copy_(layer.A_log.detach().to(self.decay.dtype).exp().neg())
        return True

    def tensors(self) -> tuple[Tensor, ...]:
        return self.filter, self.decay, self.step_bias, self.norm

    def step(self, products: Tensor, states: States, slots: Tensor, run: LinearOperations) -> Tensor:
        """Return what the layer's last product takes, [R, Hv Dv]; the states of the sequences go one token on.

        Args:
            products: [R, C + Hv Dv + 2 Hv], of ``in_proj_qkv``, ``in_proj_z``, ``in_proj_a`` and ``in_proj_b``.
            states: of all slots.
            slots: int64 [R], of the sequences; no two of which may be the same.
        """
        _, heads, key_dim, dim = states.recurrent.shape
        keys = self.key_heads * key_dim
        mixed, z, a, b = products.split([len(self.filter), heads * dim, heads, heads], 1)
        mixed = run.convolve(ConvStep(mixed, states.tail, self.filter, None, slots), self.activation)
        q, k, v = mixed.split([keys, keys, heads * dim], 1)
        q, k = (x.unflatten(1, (self.key_heads, key_dim)) for x in (q, k))
        # In fp32, as transformers does.
        g = self.decay * F.softplus(a.to(self.decay.dtype) + self.step_bias)
        v, z = (x.unflatten(1, (heads, dim)) for x in (v, z))
        out = run.recur(DeltaStep(q, k, v, g, b.sigmoid(), states.recurrent, slots), key_dim**-0.5, True)
        return run.norm(out, z, self.norm, self.eps).flatten(1)


def products_of(layer: Any) -> tuple[nn.Module, ...]:
    """Return the linear layers of its input, in the order that :meth:`LinearWeights.step` takes their outputs."""
    return layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_a, layer.in_proj_b


def _parameters(layer: Any) -> Iterator[nn.Parameter]:
    yield from (layer.conv1d.weight, layer.dt_bias, layer.norm.weight)
