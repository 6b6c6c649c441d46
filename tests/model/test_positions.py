"""M-RoPE positions over grids and frame rates that no test would think of: the rule ``paper`` against the paper's
sentence, ``transformers`` against its get_rope_index."""

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rollouts import answer, ask
from tiny import hf_inputs, installed_seconds, make_lm, make_media, make_model, make_prompt, make_tokenizer
from torch import Tensor

from videor1.model import VideoLM
from videor1.model.positions import MediaRun, mrope_positions
from videor1.rollout import SamplingOptions
from videor1.training.passes import completion_logp, pack
from videor1.types import Media, Prompt, Sample
from videor1.video.patches import normalize_patches
from videor1_kernels.integrations import transformers as attention

PAPER, TRANSFORMERS = (make_lm(position_rule=rule) for rule in ("paper", "transformers"))
SPECIAL = PAPER.special
Grid = tuple[int, int, int]


def bare_prompt(kind: Any, grid: Grid, seconds: float, before: int, after: int) -> Prompt:
    """A prompt of plain tokens around a run of media tokens, with empty patches."""
    media = Media(kind, torch.empty(0, 1176, dtype=torch.uint8), grid, seconds, 0.0)
    pads = [SPECIAL.media_pad(media)] * (grid[0] * grid[1] * grid[2] // 4)
    ids = torch.tensor([*range(before), SPECIAL.vision_start, *pads, SPECIAL.vision_end, *range(after)])
    return Prompt(Sample(0, "0", "?", kind, "numerical", "<answer>1</answer>"), ids, media, 0)


def transformers_positions(prompt: Prompt, answer: int) -> Tensor:
    """[3, P + answer], the answer's text included."""
    inputs = hf_inputs(TRANSFORMERS, prompt, torch.zeros(answer, dtype=torch.long))
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    return TRANSFORMERS.hf.model.get_rope_index(**{name: inputs.get(name) for name in names})[0][:, 0]


def paper_positions(segments: list[str], grids: list[Grid], intervals: list[float]) -> Tensor:
    """[3, P], token by token from the paper's sentence: "position numbering for each modality is initialized by
    incrementing the maximum position ID of the preceding modality by one".

    ``segments``: the kind of each token, "text" or "media"; a run of media tokens is the next of the merged ``grids``,
    whose temporal patches are ``intervals`` positions apart.
    """
    given: list[Grid] = []
    run = -1
    for at, kind in enumerate(segments):
        after = 1 + max((max(position) for position in given), default=-1)
        if kind == "text":
            given.append((after, after, after))
            continue
        if at == 0 or segments[at - 1] == "text":
            run, begin, start = run + 1, at, after
        _, h, w = grids[run]
        t, place = divmod(at - begin, h * w)
        given.append((start + int(t * torch.tensor(intervals[run])), start + place // w, start + place % w))
    return torch.tensor(given, dtype=torch.long).reshape(-1, 3).T


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
def test_any_grid_and_rate(kind: str, grid: Grid, seconds: float, text: Grid) -> None:
    before, after, answer = text
    if kind == "image":
        grid, seconds = (1, *grid[1:]), 0.0
    seconds = installed_seconds(seconds)
    prompt = bare_prompt(kind, (grid[0], 2 * grid[1], 2 * grid[2]), seconds, before, after)
    length, tokens = len(prompt.input_ids), grid[0] * grid[1] * grid[2]
    segments = ["text"] * (before + 1) + ["media"] * tokens + ["text"] * (1 + after + answer)
    by_paper = paper_positions(segments, [grid], [float(2 * torch.tensor(seconds))])
    by_transformers = transformers_positions(prompt, answer)
    for lm, expected in ((PAPER, by_paper), (TRANSFORMERS, by_transformers)):
        positions, first = lm.positions(prompt)
        assert positions.dtype == torch.long
        assert torch.equal(positions, expected[:, :length])
        assert torch.equal(torch.arange(first, first + answer).expand(3, -1), expected[:, length:])
    short = int((grid[0] - 1) * torch.tensor(2 * seconds)) < max(grid[1:])
    assert torch.equal(by_paper, by_transformers) == short  # images and short clips: bit-equal, others never


def test_by_hand() -> None:
    # Two temporal patches, 1.5 s apart, at 2 positions a second, of 1 x 2 tokens each.
    prompt = bare_prompt("video", (2, 2, 4), 1.5, before=2, after=1)
    positions, first = PAPER.positions(prompt)
    assert positions.tolist() == [[0, 1, 2, 3, 3, 6, 6, 7, 8], [0, 1, 2, 3, 3, 3, 3, 7, 8], [0, 1, 2, 3, 4, 3, 4, 7, 8]]
    assert first == 9
    positions, first = TRANSFORMERS.positions(prompt)
    assert positions[:, 7:].tolist() == [[5, 6]] * 3
    assert first == 7  # goes on from the last text token, although time has come to 6 before it
    # A product that is whole in real numbers may fall just short of it, by the precision it is taken in.
    for tenths in range(1, 200):
        prompt = bare_prompt("video", (16, 2, 2), installed_seconds(tenths / 10), 1, 1)
        positions, _ = TRANSFORMERS.positions(prompt)
        assert torch.equal(positions, transformers_positions(prompt, 0)), tenths
    # Text counts up.
    prompt = make_prompt(None, "What is two and two?")
    length = len(prompt.input_ids)
    for model in (PAPER, TRANSFORMERS):
        positions, first = model.positions(prompt)
        assert torch.equal(positions, torch.arange(length).expand(3, -1))
        assert first == length
    with pytest.raises(ValueError, match=r"position_rule.*paper.*'papre'"):
        make_lm(position_rule="papre")  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.integers(1, 5) | st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40)),
        max_size=8,
    )
)
def test_several_runs_of_media(parts: list[Any]) -> None:
    """Text between any two: what encloses media is text."""
    segments: list[int | MediaRun] = []
    kinds: list[str] = []
    grids, intervals = [], []
    for part in parts:
        if isinstance(part, int):
            segments.append(part)
            kinds += ["text"] * part
        else:
            T, h, w, interval = part
            segments += [MediaRun(torch.arange(T) * interval, h, w), 1]
            kinds += ["media"] * (T * h * w) + ["text"]
            grids.append((T, h, w))
            intervals.append(float(interval))
    positions, first = mrope_positions(segments)
    assert torch.equal(positions, paper_positions(kinds, grids, intervals))
    assert first == (int(positions.max()) + 1 if kinds else 0)


def hf_logits(model: VideoLM, prompt: Prompt, answer: Tensor, positions: Tensor) -> Tensor:
    """[A, V] by transformers' own forward of one plain row."""
    inputs = hf_inputs(model, prompt, answer) | {"position_ids": positions[:, None]}
    inputs["pixel_values_videos"] = normalize_patches(prompt.media.patches, torch.float64)
    model.hf.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            return model.hf(**inputs).logits[0, len(prompt.input_ids) - 1 : -1]
    finally:
        model.hf.model.language_model.set_attn_implementation(attention.register())


@pytest.mark.parametrize("minutes", [10, 120])
def test_rollout_and_training_at_positions_past_the_length(minutes: int) -> None:
    """Both against transformers' forward at the paper's positions; a rotary table cut at the length would show."""
    model = VideoLM(make_model().double(), make_tokenizer(), source="tiny")
    prompt = make_prompt(make_media("video", (8, 4, 4), seconds=60 * minutes / 8))
    beside = ask(model, make_prompt(), 2, names=("ordered", 1))  # its answers are at low positions
    with model.inference():
        group = answer(model, [ask(model, prompt, 3), beside], SamplingOptions(12, 1.0))[0]
        trained = completion_logp(model, pack(model, [prompt], [[drawn.token_ids for drawn in group]]))
    for drawn, by_training in zip(group, trained.split([len(drawn.token_ids) for drawn in group]), strict=True):
        ids = drawn.token_ids
        kinds = ["media" if int(i) == SPECIAL.video_pad else "text" for i in torch.cat([prompt.input_ids, ids])]
        expected = paper_positions(kinds, [(8, 2, 2)], [2 * 60 * minutes / 8])
        assert int(expected.max()) > len(kinds)
        logp = hf_logits(model, prompt, ids, expected).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        # Log-probs leave in fp32, and rotary angles are made in it; all else is fp64.
        torch.testing.assert_close(drawn.logp.double(), logp, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_training.double(), logp, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["missing", "extra", "split", "none"])
def test_media_tokens_that_do_not_fit_the_grid_are_refused(change: str) -> None:
    prompt = make_prompt(make_media("video", (2, 4, 4)))
    pad, ids = SPECIAL.video_pad, prompt.input_ids.clone()
    at = int((ids == pad).nonzero()[0])
    if change == "extra":
        ids = torch.cat([ids[:at], torch.tensor([pad]), ids[at:]])
    elif change == "none":
        ids[ids == pad] = 5
    else:
        ids[at] = 5
        ids[0] = pad if change == "split" else ids[0]
    with pytest.raises(ValueError, match=r"one run of 8 media tokens for grid \(2, 4, 4\)"):
        PAPER.positions(dataclasses.replace(prompt, input_ids=ids))
