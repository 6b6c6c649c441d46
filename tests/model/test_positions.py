"""M-RoPE positions against transformers' get_rope_index, over grids and frame rates that no test would think of."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import installed_seconds, make_lm, make_media, make_prompt
from torch import Tensor

from videor1.model import VideoLM
from videor1.model.positions import prompt_positions
from videor1.types import Media, Prompt, Sample


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return make_lm()


def bare_prompt(
    model: VideoLM, kind: str, grid: tuple[int, int, int], seconds: float, before: int, after: int
) -> Prompt:
    """A prompt of plain tokens around a run of media tokens, with empty patches."""
    pad = model.special.video_pad if kind == "video" else model.special.image_pad
    count = grid[0] * grid[1] * grid[2] // 4
    text = torch.arange(100)
    ids = torch.cat([text[:before], torch.tensor([model.special.vision_start]), torch.full((count,), pad),
                     torch.tensor([model.special.vision_end]), text[:after]])  # fmt: skip
    media = Media(kind, torch.empty(0, 1176, dtype=torch.uint8), grid, seconds, 0.0)  # type: ignore[arg-type]
    return Prompt(Sample(0, "0", "?", kind, "numerical", "<answer>1</answer>"), ids, media, 0)  # type: ignore[arg-type]


def transformers_positions(model: VideoLM, prompt: Prompt, answer: int) -> Tensor:
    """[3, P + answer], the answer's text included."""
    media = prompt.media
    assert media is not None
    ids = torch.cat([prompt.input_ids, torch.zeros(answer, dtype=torch.long)])
    kinds = torch.where(ids == model.special.video_pad, 2, torch.where(ids == model.special.image_pad, 1, 0))
    grids = {f"{media.kind}_grid_thw": torch.tensor([media.grid_thw])}
    if media.kind == "video":
        grids["second_per_grid_ts"] = torch.tensor([media.second_per_grid])
    return model.hf.model.get_rope_index(input_ids=ids[None], mm_token_type_ids=kinds[None], **grids)[0][:, 0]


# Seconds per temporal patch of real frame rates: 2 / fps, fps a ratio of frames and duration.
SECONDS = st.builds(lambda frames, length: 2 * length / frames, st.integers(2, 32), st.floats(0.05, 900))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["video", "image"]),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 12), st.integers(1, 12)),
    seconds=SECONDS | st.floats(1e-3, 1e3),
    text=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 5)),
)
@example(kind="video", grid=(16, 1, 12), seconds=1.0, text=(5, 5, 1))
@example(kind="video", grid=(16, 12, 1), seconds=float(Fraction(1001, 15000)), text=(5, 5, 1))
@example(kind="video", grid=(1, 1, 1), seconds=0.5, text=(0, 0, 1))
@example(kind="video", grid=(16, 2, 2), seconds=0.3, text=(1, 0, 3))  # 2 * 0.3 * 5: at the border of a whole number
@example(kind="video", grid=(16, 2, 2), seconds=0.1, text=(1, 0, 3))
@example(kind="video", grid=(8, 2, 2), seconds=1e3, text=(1, 4, 3))  # time runs far past height and width
def test_any_grid_and_rate_as_in_transformers(model: VideoLM, kind, grid, seconds, text) -> None:
    before, after, answer = text
    if kind == "image":
        grid, seconds = (1, *grid[1:]), 0.0
    seconds = installed_seconds(seconds)
    prompt = bare_prompt(model, kind, (grid[0], 2 * grid[1], 2 * grid[2]), seconds, before, after)
    positions, first = model.positions(prompt)
    expected = transformers_positions(model, prompt, answer)
    length = len(prompt.input_ids)
    assert positions.dtype == torch.long
    assert torch.equal(positions, expected[:, :length])
    assert torch.equal(torch.arange(first, first + answer).expand(3, -1), expected[:, length:])


def test_a_video_by_hand(model: VideoLM) -> None:
    # Two temporal patches, 1.5 s apart, at 2 positions a second, of 1 x 2 tokens each.
    prompt = bare_prompt(model, "video", (2, 2, 4), 1.5, before=2, after=1)
    positions, first = model.positions(prompt)
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 6, 6, 5, 6],
        [0, 1, 2, 3, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 3, 4, 5, 6],
    ]
    assert first == 7  # goes on from the last text token, although time has come to 6 before it


def test_text_counts_up(model: VideoLM) -> None:
    prompt = make_prompt(None, "What is two and two?")
    positions, first = model.positions(prompt)
    length = len(prompt.input_ids)
    assert torch.equal(positions, torch.arange(length).expand(3, -1))
    assert first == length


def test_time_is_cut_in_fp32_as_transformers_does(model: VideoLM) -> None:
    """A product that is whole in real numbers may fall just short of it, by the precision it is taken in."""
    for tenths in range(1, 200):
        prompt = bare_prompt(model, "video", (16, 2, 2), installed_seconds(tenths / 10), 1, 1)
        positions, _ = model.positions(prompt)
        assert torch.equal(positions, transformers_positions(model, prompt, 0)), tenths


@pytest.mark.parametrize("change", ["missing", "extra", "split", "none"])
def test_media_tokens_that_do_not_fit_the_grid_are_refused(change: str) -> None:
    model = make_lm()
    prompt = make_prompt(make_media("video", (2, 4, 4)))
    pad, ids = model.special.video_pad, prompt.input_ids.clone()
    at = int((ids == pad).nonzero()[0])
    if change == "missing":
        ids[at] = 5
    elif change == "extra":
        ids = torch.cat([ids[:at], torch.tensor([pad]), ids[at:]])
    elif change == "split":
        ids[at], ids[0] = 5, pad
    else:
        ids[ids == pad] = 5
    with pytest.raises(ValueError, match=r"one run of 8 media tokens for grid \(2, 4, 4\)"):
        prompt_positions(dataclasses.replace(prompt, input_ids=ids), pad, tokens_per_second=2)
