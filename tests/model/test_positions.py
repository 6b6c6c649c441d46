"""M-RoPE positions over grids and frame rates that no test would think of: the rule ``paper`` against the paper's
sentence, ``transformers`` against its get_rope_index."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import installed_seconds, make_lm, make_media, make_model, make_prompt, make_tokenizer
from torch import Tensor

from videor1.model import VideoLM
from videor1.model.positions import MediaRun, mrope_positions, prompt_positions
from videor1.rollout import Branch, LocalEngine, Request, SamplingOptions
from videor1.training.passes import completion_logp, pack
from videor1.types import Media, Prompt, Sample
from videor1.video.patches import normalize_patches
from videor1_kernels.integrations import transformers as attention

RULES = ("paper", "transformers")


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return make_lm()


@pytest.fixture(scope="module")
def as_transformers() -> VideoLM:
    return make_lm(position_rule="transformers")


def bare_prompt(
    model: VideoLM, kind: str, grid: tuple[int, int, int], seconds: float, before: int, after: int
) -> Prompt:
    """A prompt of plain tokens around a run of media tokens, with empty patches."""
    pad = model.special.video_pad if kind == "video" else model.special.image_pad
    count = grid[0] * grid[1] * grid[2] // 4
    text = torch.arange(100)
    ids = torch.cat(
        [
            text[:before],
            torch.tensor([model.special.vision_start]),
            torch.full((count,), pad),
            torch.tensor([model.special.vision_end]),
            text[:after],
        ]
    )
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


def paper_positions(segments: list[str], grids: list[tuple[int, int, int]], intervals: list[float]) -> Tensor:
    """[3, P], token by token from the paper's sentence: "position numbering for each modality is initialized by
    incrementing the maximum position ID of the preceding modality by one".

    ``segments``: the kind of each token, "text" or "media"; a run of media tokens is the next of the merged ``grids``,
    whose temporal patches are ``intervals`` positions apart.
    """
    given: list[tuple[int, int, int]] = []
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
def test_any_grid_and_rate(model: VideoLM, as_transformers: VideoLM, kind, grid, seconds, text) -> None:
    before, after, answer = text
    if kind == "image":
        grid, seconds = (1, *grid[1:]), 0.0
    seconds = installed_seconds(seconds)
    prompt = bare_prompt(model, kind, (grid[0], 2 * grid[1], 2 * grid[2]), seconds, before, after)
    length, tokens = len(prompt.input_ids), grid[0] * grid[1] * grid[2]
    segments = ["text"] * (before + 1) + ["media"] * tokens + ["text"] * (1 + after + answer)
    by_paper = paper_positions(segments, [grid], [float(2 * torch.tensor(seconds))])
    by_transformers = transformers_positions(model, prompt, answer)
    for lm, expected in ((model, by_paper), (as_transformers, by_transformers)):
        positions, first = lm.positions(prompt)
        assert positions.dtype == torch.long
        assert torch.equal(positions, expected[:, :length])
        assert torch.equal(torch.arange(first, first + answer).expand(3, -1), expected[:, length:])
    short = int((grid[0] - 1) * torch.tensor(2 * seconds)) < max(grid[1:])
    assert torch.equal(by_paper, by_transformers) == short  # images and short clips: bit-equal, others never


def test_a_video_by_hand(model: VideoLM, as_transformers: VideoLM) -> None:
    # Two temporal patches, 1.5 s apart, at 2 positions a second, of 1 x 2 tokens each.
    prompt = bare_prompt(model, "video", (2, 2, 4), 1.5, before=2, after=1)
    positions, first = model.positions(prompt)
    assert positions.tolist() == [[0, 1, 2, 3, 3, 6, 6, 7, 8], [0, 1, 2, 3, 3, 3, 3, 7, 8], [0, 1, 2, 3, 4, 3, 4, 7, 8]]
    assert first == 9
    positions, first = as_transformers.positions(prompt)
    assert positions[:, 7:].tolist() == [[5, 6]] * 3
    assert first == 7  # goes on from the last text token, although time has come to 6 before it


@pytest.mark.parametrize(("minutes", "largest"), [(1, 105), (10, 1050), (120, 12600)])
def test_sixteen_frames_of_a_long_clip(model: VideoLM, minutes: int, largest: int) -> None:
    prompt = bare_prompt(model, "video", (8, 4, 4), 60 * minutes / 8, before=0, after=3)
    positions, first = model.positions(prompt)
    start = 1  # after <|vision_start|>
    assert int(positions[0, :-4].max()) == start + largest
    assert positions[:, -4:].tolist() == [[start + largest + n for n in (1, 2, 3, 4)]] * 3
    assert first == start + largest + 5 > len(prompt.input_ids)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.integers(1, 5) | st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40)),
        max_size=8,
    )
)
def test_several_runs_of_media(parts) -> None:
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
    media, pixels = prompt.media, prompt.media.patches  # type: ignore[union-attr]
    ids = torch.cat([prompt.input_ids, answer])
    model.hf.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            logits = model.hf(
                input_ids=ids[None],
                position_ids=positions[:, None],
                video_grid_thw=torch.tensor([media.grid_thw]),
                pixel_values_videos=normalize_patches(pixels, torch.float64),
                attention_mask=torch.ones_like(ids)[None],
            ).logits[0]
    finally:
        model.hf.model.language_model.set_attn_implementation(attention.register())
    return logits[len(prompt.input_ids) - 1 : -1]


@pytest.mark.parametrize("minutes", [10, 120])
def test_rollout_and_training_at_positions_past_the_length(minutes: int) -> None:
    """Both against transformers' forward at the paper's positions; a rotary table cut at the length would show."""
    model = VideoLM(make_model().double(), make_tokenizer(), source="tiny")
    prompt = make_prompt(make_media("video", (8, 4, 4), seconds=60 * minutes / 8))
    with model.inference():
        features = model.vision_features([prompt.media])
        engine = LocalEngine(model, SamplingOptions(12, 1.0))
        request = Request(prompt, 0, Branch(3, ("ordered", 0), features[0]))
        beside = Request(make_prompt(), 0, Branch(2, ("ordered", 1)))  # its answers are at low positions
        group = engine.generate([request, beside]).groups[0]
        assert group is not None
        packed = pack(model, [prompt], [[answer.token_ids for answer in group.ordered]])
        trained = completion_logp(model, packed, features=features)
    at = 0
    for answer in group.ordered:
        ids = answer.token_ids
        kinds = ["media" if int(i) == model.special.video_pad else "text" for i in torch.cat([prompt.input_ids, ids])]
        expected = paper_positions(kinds, [(8, 2, 2)], [2 * 60 * minutes / 8])
        assert int(expected.max()) > len(kinds)
        logp = hf_logits(model, prompt, ids, expected).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        # Log-probs leave in fp32, and rotary angles are made in it; all else is fp64.
        torch.testing.assert_close(answer.logp.double(), logp, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(trained[at : at + len(ids)].double(), logp, rtol=1e-6, atol=1e-6)
        at += len(ids)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"position_rule.*paper.*'papre'"):
        make_lm(position_rule="papre")  # type: ignore[arg-type]


def test_text_counts_up(model: VideoLM) -> None:
    prompt = make_prompt(None, "What is two and two?")
    positions, first = model.positions(prompt)
    length = len(prompt.input_ids)
    assert torch.equal(positions, torch.arange(length).expand(3, -1))
    assert first == length


def test_time_is_cut_in_fp32_as_transformers_does(as_transformers: VideoLM) -> None:
    """A product that is whole in real numbers may fall just short of it, by the precision it is taken in."""
    for tenths in range(1, 200):
        prompt = bare_prompt(as_transformers, "video", (16, 2, 2), installed_seconds(tenths / 10), 1, 1)
        positions, _ = as_transformers.positions(prompt)
        assert torch.equal(positions, transformers_positions(as_transformers, prompt, 0)), tenths


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
