"""M-RoPE positions of a prompt: the one place where they are built, for rollout and training alike.

Text counts 1, 1, 1. A video token at (t, h, w) of the merged grid sits at start + (int(t * tokens_per_second *
second_per_grid), h, w); the text after it goes on at start + max(h, w of the grid). This is transformers' rule since
5.3 (earlier versions, and engines built on them, go on from the largest position + 1). The positions of an answer
count on from the last text position, not from ``rope_deltas``, which still uses the maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from videor1.types import Prompt


def prompt_positions(
    prompt: Prompt, media_token_id: int | None, *, tokens_per_second: float, merge: int = 2
) -> tuple[Tensor, int]:
    """(int64 [3, P] time, height, width; the position of the first token after the prompt).

    Args:
        prompt: input_ids [P] whose media tokens are one run of ``media_token_id``.
        media_token_id: id of the video or image pad token; None for a prompt without media.
        tokens_per_second: of the vision config.
        merge: patches per media token along height and width.
    """
    ids, media = prompt.input_ids, prompt.media
    length = len(ids)
    if media is None or media_token_id is None:
        return torch.arange(length).expand(3, length), length
    T, h, w = media.grid_thw[0], media.grid_thw[1] // merge, media.grid_thw[2] // merge
    runs = torch.eq(ids, media_token_id).nonzero().flatten()
    start, count = int(runs[0]) if len(runs) else -1, T * h * w
    if len(runs) != count or int(runs[-1]) != start + count - 1:
        raise ValueError(f"expected one run of {count} media tokens for grid {media.grid_thw}, got {len(runs)}")
    # In fp32, as transformers computes it: the truncation to int must agree.
    interval = tokens_per_second * torch.tensor(media.second_per_grid) if media.kind == "video" else torch.tensor(1.0)
    time = (torch.arange(T) * interval).long()
    grid = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1) + start
    after = start + max(h, w)
    tail = length - start - count
    positions = torch.cat(
        [torch.arange(start).expand(3, start), grid, torch.arange(after, after + tail).expand(3, tail)], dim=1
    )
    return positions, after + tail
