"""Vision features of prompts in either order: bounded passes of the tower give what one pass gives, gradients too."""

import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from tiny import make_media, make_model, make_prompt, make_tokenizer
from torch import Tensor

from videor1 import side_by_side
from videor1.model import VideoLM, features
from videor1.model.features import prompt_features, shuffled_features
from videor1.model.packing import even_batches, greedy_batches
from videor1.side_by_side import as_on_a_card
from videor1.types import Prompt
from videor1.video.shuffle import draw_permutation

# 32, 16, none, 64, 32 and 16 patches.
GRIDS = [("video", (2, 4, 4)), ("image", (1, 4, 4)), None, ("video", (4, 4, 4)), ("video", (2, 4, 4))]
GRIDS += [("image", (1, 4, 4))]
PROMPTS = [make_prompt(make_media(*grid, seed=i) if grid else None, draw=i) for i, grid in enumerate(GRIDS)]
BOUNDS = {1: [32, 16, 64, 32, 16], 48: [48, 64, 48], 64: [48, 64, 48], 96: [48, 96, 16], 10**6: [160]}
Features = list[Tensor | None]


def orders_of(prompts: list[Prompt], unit: str) -> list[tuple[int, ...] | None]:
    return [draw_permutation(prompt, unit, 3) for prompt in prompts]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def model(request: pytest.FixtureRequest) -> VideoLM:
    return VideoLM(make_model().to(request.param), make_tokenizer(), source="tiny")


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """Patches in each pass of the tower."""
    seen: list[int] = []
    original = VideoLM.vision_features

    def noted(self: VideoLM, media: Any, patches: Any = None) -> list[Tensor]:
        seen.append(sum(len(m.patches) for m in media))
        return original(self, media, patches)

    with patch.object(VideoLM, "vision_features", noted):
        yield seen


def bounded(patches: int) -> Any:
    return patch.object(features, "PASS_PATCHES", patches)


def agree(got: Features, expected: Features) -> None:
    """To rounding: a pass of another size may sum in another order."""
    assert [f is None for f in got] == [f is None for f in expected]
    for one, other in zip(got, expected, strict=True):
        if one is not None and other is not None:
            error = 1e-12 if one.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(one, other, rtol=error, atol=error)


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounded_passes_give_what_one_pass_gives(model: VideoLM, passes: list[int], bound: int) -> None:
    orders = orders_of(PROMPTS, "frame")
    assert [order is None for order in orders] == [False, True, True, False, False, True]
    with model.inference():
        whole = prompt_features(model, PROMPTS), prompt_features(model, PROMPTS, orders)
        assert passes == [160, 160]
        passes.clear()
        with bounded(bound):
            agree(prompt_features(model, PROMPTS), whole[0])
            assert passes == BOUNDS[bound]
            assert all(size <= bound for size in passes if size not in (16, 32, 64))  # of one video alone
            agree(prompt_features(model, PROMPTS, orders), whole[1])
        assert prompt_features(model, []) == []
        assert prompt_features(model, [PROMPTS[2]]) == [None]
        assert passes == 2 * BOUNDS[bound]


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_each_prompt_gets_its_own(model: VideoLM, passes: list[int], unit: str) -> None:
    """Alone, each has the features that it has among others; temporal patches may be shuffled after the tower."""
    orders = orders_of(PROMPTS, unit)

    def alone(*given: Any) -> Features:
        parts = ([[part] for part in one] for one in zip(*given, strict=True))
        return [f for one in parts for f in prompt_features(model, *one, unit=unit)]

    with model.inference():
        ordered, mixed = prompt_features(model, PROMPTS), prompt_features(model, PROMPTS, orders, unit=unit)
        agree(ordered, alone(PROMPTS))
        agree(mixed, alone(PROMPTS, orders))
        shuffled = shuffled_features(model, PROMPTS, orders, unit=unit)
        agree(shuffled, [None if order is None else f for f, order in zip(mixed, orders, strict=True)])
        passes.clear()
        agree(shuffled_features(model, PROMPTS, orders, unit=unit, ordered=ordered), shuffled)
        assert passes == ([128] if unit == "frame" else [])
    moved = [order is not None and order != tuple(sorted(order)) for order in orders]
    assert any(moved)
    for one, other, differs in zip(ordered, mixed, moved, strict=True):
        assert one is None or other is None or differs != torch.equal(one, other)


def gradients(model: VideoLM) -> dict[str, Tensor]:
    model.hf.zero_grad()
    found = [f for f in prompt_features(model, PROMPTS) if f is not None]
    weights = torch.linspace(-1, 1, sum(f.numel() for f in found), dtype=model.compute_dtype)
    (torch.cat(found).flatten() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.visual.named_parameters() if p.grad is not None}


def test_bounded_passes_give_the_same_gradients(model: VideoLM, passes: list[int]) -> None:
    whole = gradients(model)
    assert whole.keys() == dict(model.visual.named_parameters()).keys()
    with bounded(48):
        cut = gradients(model)
    assert passes == [160, 48, 64, 48]
    scale = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in whole.items():
        error = 1e-12 if gradient.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(cut[name], gradient, rtol=error, atol=error * scale)
    # ZeRO-3 marks the parameters that it holds in pieces: ranks that wait for each other make one pass each. For
    # answers it has gathered them before.
    passes.clear()
    with bounded(48), patch.object(next(model.visual.parameters()), "ds_id", 0, create=True):
        gradients(model)
        with model.inference():
            prompt_features(model, PROMPTS)
        assert passes == [160, 48, 64, 48]
        assert prompt_features(model, [make_prompt(None)]) == [None]


def test_batches() -> None:
    for sizes, budget, expected in (
        ([], 10, []),
        ([3], 10, [[3]]),
        ([4, 6, 1], 10, [[4, 6], [1]]),  # full to the last token
        ([4, 7], 10, [[4], [7]]),
        ([6, 6, 1, 3], 10, [[6], [6, 1, 3]]),  # in order: the first has room for the 1
        ([2, 11, 2], 10, [[2], [11], [2]]),  # too large for any batch: alone
        ([11, 12], 10, [[11], [12]]),
        ([0, 0, 1], 0, [[0, 0], [1]]),
    ):
        size = Mock(side_effect=lambda item: item)
        assert greedy_batches(iter(sizes), size, budget) == expected
        assert [call.args[0] for call in size.call_args_list] == sizes, "each size is asked once"
    # Nothing is lost or moved, none holds more than it may, none could have held the next item.
    rng = random.Random(0)
    for _ in range(200):
        items = ["x" * rng.randrange(12) for _ in range(rng.randrange(1, 20))]
        budget = rng.randrange(1, 25)
        batches = greedy_batches(items, len, budget)
        assert [item for batch in batches for item in batch] == items
        assert all(sum(map(len, batch)) <= budget for batch in batches if len(batch) > 1)
        for batch, following in itertools.pairwise(batches):
            assert sum(map(len, batch)) + len(following[0]) > budget


def test_even_batches() -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda")
    for sizes, least, budget, expected in (
        ([], 4, 99, []),
        ([7], 4, 99, [[7]]),
        ([3, 4], 4, 99, [[3, 4]]),  # 7 are not twice 4
        ([4, 4], 4, 99, [[4], [4]]),
        ([1, 1, 6], 4, 99, [[1, 1], [6]]),
        ([2] * 10, 4, 99, [[2] * 2, [2] * 3, [2] * 2, [2] * 3]),  # 20: four of 5, not five of 4
        ([2] * 8, 8, 5, [[2, 2], [2, 2]] * 2),  # two of 8, each above the budget
        ([0, 0, 0], 4, 99, [[0, 0, 0]]),
        ([20, 1], 4, 99, [[20], [1]]),  # an empty one is none
    ):
        assert even_batches(sizes, int, budget, cpu, least=least) == expected
        assert even_batches(sizes, int, budget, card, least=least) == greedy_batches(sizes, int, budget)
        with as_on_a_card():
            assert even_batches(sizes, int, budget, cpu, least=least) == greedy_batches(sizes, int, budget)


def test_passes_with_gradients_stay_in_their_thread(model: VideoLM) -> None:
    """Sums of gradients would follow the order in which threads happened to build the graph."""
    threads: set[int] = set()
    handle = model.visual.register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    with patch.object(features, "LEAST_PATCHES", 16), patch.object(side_by_side, "_count", 2):
        prompt_features(model, PROMPTS)
        assert threads == {threading.get_ident()}
        threads.clear()
        with model.inference():
            prompt_features(model, PROMPTS)
        assert threading.get_ident() not in threads
    handle.remove()
