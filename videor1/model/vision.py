"""The vision tower on a GPU: one attention call a layer for all windows of a pass, lengths that are known on the host,
and patches embedded by one product.

transformers computes window after window with its attention ``sdpa``, thousands of calls for one video, and reads
lengths from the device before each layer. It passes all windows at once only to an attention whose name contains
"flash".
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from videor1.model.cpu_linear import linear

NAME = "videor1_flash_windows"
_FLASH_DTYPES = (torch.bfloat16, torch.float16)


def prepare(tower: Any) -> None:
    """Have a tower whose attention is ``sdpa`` attend to all windows at once, and embed patches by a product."""
    AttentionInterface.register(NAME, _attend)
    if tower.config._attn_implementation == "sdpa":
        # set_attn_implementation takes no name with "flash" that it does not know.
        tower.config._attn_implementation = NAME
    layer = tower.patch_embed.proj
    if type(layer) is nn.Conv3d and layer.kernel_size == layer.stride and layer.groups == 1:
        layer.__class__ = PatchProduct


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute softmax(q k^T scaling) v within each window, not causal.

    Args:
        module: the attention layer.
        query, key, value: [1, heads, T, head size].
        attention_mask: unused, the windows say all.
        scaling: scale of the products; None: 1 / sqrt(head size).
        cu_seq_lens_q: int32 [windows + 1], where windows begin and end in T.
        max_length_q: length of the longest window.
        options: unused: of keys, which lie as the queries, and of other attentions.

    Returns:
        ([1, T, heads, head size], no weights).
    """
    if query.device.type != "cpu" and query.dtype in _FLASH_DTYPES:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends = cu_seq_lens_q.to(query.device)
        out: Any = varlen_attn(q, k, v, ends, ends, max_length_q, max_length_q, scale=scaling)
        return out[None], None
    runs = [(length, sum(1 for _ in run)) for length, run in itertools.groupby(cu_seq_lens_q.diff().tolist())]
    parts = zip(*(x.split([length * count for length, count in runs], dim=2) for x in (query, key, value)), strict=True)
    outs = []
    for (length, count), qkv in zip(runs, parts, strict=True):  # neighbours of one length are one batch
        windows = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        out, _ = sdpa_attention_forward(module, *windows, None, scaling=scaling, is_causal=False)
        outs.append(out.flatten(0, 1))
    return torch.cat(outs)[None], None


def tower_inputs(
    moved: dict[str, Tensor], bounds: dict[str, Tensor], config: Any, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what a tower derives from the grids, where its ``forward`` wants it, and the lengths of the windows.

    Args:
        moved: arguments that the tower wants on its device.
        bounds: int32 [windows + 1] each, named cu_..., where windows begin and end among the patches.
        config: the tower's configuration.
        device: where the tower runs.
        dtype: what the tower computes in.
    """
    flash = is_flash_attention_requested(config)
    if flash and device.type != "cpu" and dtype in _FLASH_DTYPES:  # else each window is computed by itself
        moved = moved | bounds
    longest = {name.replace("cu_", "max_").removesuffix("s"): int(ends.diff().max()) for name, ends in bounds.items()}
    placed = {name: value.to(device, non_blocking=True) for name, value in moved.items()}
    return bounds | placed | (longest if flash else {})


class PatchProduct(nn.Conv3d):
    """A convolution whose kernel is its stride and its whole input: the product of flat patches and the flat kernel.

    It is the patch embedding's own layer, with its parameters and their names. cuDNN has no fast convolution of that
    shape in bf16, and on a CPU a product takes a quarter of the time.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Return [n, out, 1, 1, 1] of patches [n, channels, *kernel_size]."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]
