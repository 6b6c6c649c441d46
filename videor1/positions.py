"""M-RoPE positions of a prompt: the one place where they are built, for rollout and training alike.

Text counts 1, 1, 1. A media token at (t, h, w) of the merged grid sits at start + (time, h, w), where a video's time is
int(t * tokens_per_second * second_per_grid) and an image's is 0. Where the tokens after a run of media go on is what
two rules differ in:

- ``paper``: one past the largest position of the media, "incrementing the maximum position ID of the preceding modality
  by one" (Qwen2-VL, arXiv 2409.12191, section 2.1). Qwen2-VL and Qwen2.5-VL were trained so; vLLM, SGLang, Video-R1's
  code and transformers before 5.3 do so.
- ``transformers``: start + max(h, w) of the merged grid, which transformers' ``get_rope_index`` does since 5.3. For an
  image, and for a clip whose times stay below max(h, w), both are the same; after a longer clip the text sits below the
  clip's own times.

The positions of an answer count on from the last text position. Positions may exceed the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from videor1.errors import ConfigError
from videor1.types import Prompt

PositionRule = Literal["paper", "transformers"]

RECORD = "videor1_positions"  # the key of a checkpoint's config.json that holds the rule it was trained under


@dataclass(frozen=True)
class MediaRun:
    """A run of media tokens in a prompt.

    Attributes:
        times: int64 [T], of each temporal patch, from the run's start on.
        height, width: of the merged grid; the run has T * height * width tokens.
    """

    times: Tensor
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.times) * self.height * self.width

    def positions(self) -> Tensor:
        """int64 [3, T * height * width], from the run's start on."""
        axes = torch.meshgrid(self.times, torch.arange(self.height), torch.arange(self.width), indexing="ij")
        return torch.stack(axes).reshape(3, -1)


def mrope_positions(segments: Sequence[int | MediaRun], rule: PositionRule = "paper") -> tuple[Tensor, int]:
    """(int64 [3, P] time, height, width; the position of the first token after the segments).

    Args:
        segments: of a prompt, in order: the number of text tokens, or a run of media tokens.
        rule: where the tokens after a run of media go on, as this module says.
    """
    parts, start = [torch.empty(3, 0, dtype=torch.int64)], 0
    for segment in segments:
        if isinstance(segment, int):
            parts.append(torch.arange(start, start + segment).expand(3, segment))
            start += segment
            continue
        own = segment.positions()
        parts.append(own + start)
        start += int(own.max()) + 1 if rule == "paper" else max(segment.height, segment.width)
    return torch.cat(parts, dim=1), start


def prompt_positions(
    prompt: Prompt,
    media_token_id: int | None,
    *,
    tokens_per_second: float,
    merge: int = 2,
    rule: PositionRule = "paper",
) -> tuple[Tensor, int]:
    """(int64 [3, P] time, height, width; the position of the first token after the prompt).

    Args:
        prompt: input_ids [P] whose media tokens are one run of ``media_token_id``.
        media_token_id: id of the video or image pad token; None for a prompt without media.
        tokens_per_second: of the vision config.
        merge: patches per media token along height and width.
        rule: where the text after the media goes on, as this module says.
    """
    ids, media = prompt.input_ids, prompt.media
    if media is None or media_token_id is None:
        return mrope_positions([len(ids)], rule)
    # In fp32, as transformers computes it: the truncation to int must agree.
    interval = tokens_per_second * torch.tensor(media.second_per_grid) if media.kind == "video" else torch.tensor(0.0)
    T, h, w = media.grid_thw
    run = MediaRun((torch.arange(T) * interval).long(), h // merge, w // merge)
    found = torch.eq(ids, media_token_id).nonzero().flatten()
    start, count = int(found[0]) if len(found) else -1, len(run)
    if len(found) != count or int(found[-1]) != start + count - 1:
        raise ValueError(f"expected one run of {count} media tokens for grid {media.grid_thw}, got {len(found)}")
    return mrope_positions([start, run, len(ids) - start - count], rule)


def trained_rule(source: str | Path, recorded: object) -> PositionRule | None:
    """The rule that a model was trained under by this library; None for a model that comes from elsewhere.

    Args:
        source: its folder or hub id.
        recorded: its config.json's value of :data:`RECORD`, or None. Checkpoints of this library have lacked it while
            ``transformers`` was the only rule: a folder that a run of that time has left is known by its place.

    Raises:
        ConfigError: a recorded rule that this version does not know.
    """
    if recorded is not None:
        if recorded not in get_args(PositionRule):
            known = ", ".join(get_args(PositionRule))
            raise ConfigError(f"{source}: its config.json says {RECORD} {recorded!r}, expected one of {known}")
        return cast(PositionRule, recorded)
    folder = Path(source).absolute()
    of_a_run = folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").is_file()
    return "transformers" if of_a_run or (folder / "trainer" / "state.json").is_file() else None
