"""M-RoPE positions of a prompt: the one place where they are built, for rollout and training alike.

A text token is one past the previous token in all three dimensions. A media token at (t, h, w) of its run's merged grid
is at start + (time, h, w); the model's family says what time is, and how many runs a video has. Two rules differ in the
position of the first token after a run of media tokens:

- ``paper``: one past the largest position of the media, "incrementing the maximum position ID of the preceding modality
  by one" (Qwen2-VL, arXiv 2409.12191, section 2.1). Qwen2-VL and Qwen2.5-VL were trained by this rule; vLLM, SGLang,
  Video-R1's code and transformers before 5.3 use it.
- ``transformers``: start + max(h, w) of the merged grid, as in transformers' ``get_rope_index`` since 5.3. For an
  image, for a run of one temporal patch (Qwen3-VL), and for a clip whose times stay below max(h, w), both rules agree;
  after a longer clip the text's positions are below the clip's last times.

The positions of a completion continue from the prompt's last text position. Positions may exceed the number of tokens.
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

POSITIONS_KEY = "videor1_positions"  # key in a checkpoint's config.json of the rule that it was trained under


@dataclass(frozen=True)
class MediaRun:
    """A run of media tokens in a prompt.

    Attributes:
        times: int64 [T], position in time of each temporal patch, relative to the run's start.
        height, width: size of the merged grid; the run has T * height * width tokens.
    """

    times: Tensor
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.times) * self.height * self.width

    def positions(self) -> Tensor:
        """Return the tokens' positions, int64 [3, T * height * width], relative to the run's start."""
        axes = torch.meshgrid(self.times, torch.arange(self.height), torch.arange(self.width), indexing="ij")
        return torch.stack(axes).reshape(3, -1)


def mrope_positions(segments: Sequence[int | MediaRun], rule: PositionRule = "paper") -> tuple[Tensor, int]:
    """Compute the positions of a prompt that consists of text and runs of media tokens.

    Args:
        segments: the prompt's parts in order: a number of text tokens, or a run of media tokens.
        rule: the rule for tokens after a run of media, see the module's description.

    Returns:
        (int64 [3, P] positions in time, height and width; the position of the first token after the segments).
    """
    parts, start = [torch.empty(3, 0, dtype=torch.int64)], 0
    for segment in segments:
        if isinstance(segment, int):
            parts.append(torch.arange(start, start + segment).expand(3, segment))
            start += segment
            continue
        relative = segment.positions()
        parts.append(relative + start)
        start += int(relative.max()) + 1 if rule == "paper" else max(segment.height, segment.width)
    return torch.cat(parts, dim=1), start


def prompt_positions(
    prompt: Prompt,
    media_token_id: int | Sequence[int] | None,
    runs: Sequence[MediaRun] = (),
    rule: PositionRule = "paper",
) -> tuple[Tensor, int]:
    """Compute the positions of a prompt.

    Args:
        prompt: its input_ids [P] hold the media tokens as runs of ``media_token_id``.
        media_token_id: id of the video or image pad token, of all runs or of each; None for a prompt without media.
        runs: the runs of media tokens that the prompt must hold, in order, with text between any two.
        rule: the rule for text after a run, see the module's description.

    Returns:
        (int64 [3, P] positions in time, height and width; the position of the first token after the prompt).

    Raises:
        ValueError: the prompt's media tokens are not these runs.
    """
    ids = prompt.input_ids
    if media_token_id is None:
        return mrope_positions([len(ids)], rule)
    tokens = [media_token_id] * len(runs) if isinstance(media_token_id, int) else list(media_token_id)
    found = torch.isin(ids, torch.tensor(sorted({media_token_id} if isinstance(media_token_id, int) else set(tokens))))
    found = found.nonzero().flatten()
    starts = found[torch.diff(found, prepend=found.new_full((1,), -2)) > 1].tolist()
    ends = [0, *(start + len(run) for start, run in zip(starts, runs, strict=False))]
    overlap = any(map(int.__gt__, ends, [*starts, len(ids)]))
    if len(starts) != len(runs) or len(found) != sum(map(len, runs)) or overlap or ids[starts].tolist() != tokens:
        what = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        grids = [media.grid_thw for media in prompt.all_media]
        grid = grids[0] if len(grids) == 1 else grids or None
        raise ValueError(
            f"expected {what} of {' + '.join(str(len(run)) for run in runs)} media tokens for grid {grid}, "
            f"got {len(found)} in {len(starts)}"
        )
    segments: list[int | MediaRun] = []
    for start, end, run in zip(starts, ends, runs, strict=False):
        segments += [start - end, run]
    return mrope_positions([*segments, len(ids) - ends[-1]], rule)


def trained_rule(source: str | Path, recorded: object) -> PositionRule | None:
    """Return the rule under which this library has trained a model; None for a model that comes from elsewhere.

    Args:
        source: the model's folder or hub id.
        recorded: the value of :data:`POSITIONS_KEY` in its config.json, or None. Early checkpoints of this library lack
            it, since ``transformers`` was the only rule: they are recognised by where the folder lies or what it holds.

    Raises:
        ConfigError: the recorded rule is unknown to this version.
    """
    if recorded is not None:
        if recorded not in get_args(PositionRule):
            known = ", ".join(get_args(PositionRule))
            raise ConfigError(f"{source}: its config.json says {POSITIONS_KEY} {recorded!r}, expected one of {known}")
        return cast(PositionRule, recorded)
    folder = Path(source).absolute()
    in_run_folder = folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").is_file()
    return "transformers" if in_run_folder or (folder / "trainer" / "state.json").is_file() else None
