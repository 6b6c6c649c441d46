"""prefix_gated_delta and prefix_causal_conv on a GPU, by flash-linear-attention (looked at: 0.6.0): one varlen call for
all prompts and one for all completions.

Its kernels take bf16 and fp16 inputs here: on fp32 ones they multiply in tf32, and the reference is what computes in
fp32.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can."""
    if device.type != "cuda":
        return "it needs CUDA tensors"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16 inputs here, and an input is {dtype}"
    if importlib.util.find_spec("fla") is None:
        return 'flash-linear-attention is not installed: pip install -e ".[fla]" (in the clone of videor1)'
    return None


def reference_is_slow(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether ``auto`` leaves the reference out, so that a GPU without flash-linear-attention is an error."""
    return device.type == "cuda" and dtype in (None, torch.bfloat16, torch.float16)


def gated_delta_rule(
    inputs: Sequence[Tensor],
    lengths: tuple[int, ...],
    initial: Tensor | None,
    *,
    final: bool,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return out [N, Hv, Dv] in q's dtype and, with ``final``, the states after the sequences fp32 [S, Hv, Dk, Dv]."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta = (x.unsqueeze(0) for x in inputs)
    bounds, on_host = _bounds(lengths, q.device)
    out, states = chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial,
        output_final_state=final,
        use_qk_l2norm_in_kernel=use_qk_l2norm,
        cu_seqlens=bounds,
        cu_seqlens_cpu=on_host,
    )
    return out.squeeze(0), states


def causal_conv(
    inputs: Sequence[Tensor],
    lengths: tuple[int, ...],
    initial: Tensor | None,
    *,
    final: bool,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor | None]:
    """Return out [N, C] in x's dtype and, with ``final``, the last inputs of each sequence [S, C, K - 1].

    Its states have a column more, the oldest, which a convolution of K inputs does not read.
    """
    from fla.modules.causal_conv1d import causal_conv1d

    [x] = inputs
    bounds, on_host = _bounds(lengths, x.device)
    if initial is not None:
        initial = torch.nn.functional.pad(initial, (1, 0))
    out, states = causal_conv1d(
        x.unsqueeze(0),
        weight,
        bias,
        initial_state=initial,
        output_final_state=final,
        activation="silu" if activation == "silu" else None,
        cu_seqlens=bounds,
        cu_seqlens_cpu=on_host,
    )
    return out.squeeze(0), None if states is None else states[..., 1:]


@functools.lru_cache(maxsize=64)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cumulative lengths, int64 [S + 1], on the device and on the host. The same tensors for all layers: what it makes
    of them is cached by their identity."""
    on_host = torch.tensor([0, *accumulate(lengths)])
    return on_host.to(device), on_host
