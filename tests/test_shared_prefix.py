"""One packed row against repeated rows: the same log-probs, the same gradients, the same training."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import installed_seconds, make_lm, make_media, make_prompt
from torch import Tensor

from benchmarks.repeated_rows import RepeatedRows, make_batch
from videor1.config import LoraConfig, TrainConfig
from videor1.loss import Packed, completion_logp, pack, tgrpo_loss
from videor1.model import VideoLM, set_checkpointing

PROMPTS = {
    "video": lambda: make_prompt(make_media("video", (3, 4, 8), seconds=1.0, seed=1), draw=1),
    "slow video": lambda: make_prompt(
        make_media("video", (4, 4, 4), seconds=installed_seconds(3.7), seed=2), "And last?", draw=2
    ),
    "image": lambda: make_prompt(make_media("image", (1, 8, 4), seed=4), "What is this? Say it in full.", draw=4),
    "text": lambda: make_prompt(None, "What is two and two?", draw=5),
}
LAYOUTS = {
    "mixed groups": (("video", "image", "text"), ([5, 1, 9], [4, 6], [2, 7, 3])),
    "two videos": (("video", "slow video"), ([8, 3], [1, 6, 2])),
    "one completion": (("video",), ([7],)),
    "a completion of one token": (("slow video",), ([1],)),
    "text only": (("text", "text"), ([4, 2], [3])),
    "a group of eight": (("video",), ([11, 3, 5, 9, 1, 8, 7, 2],)),
}
VARIANTS = [("all", "row"), ("completions", "row"), ("all", "prompt"), ("completions", "prompt")]
OFF_POLICY = {"old": True, "beta": 0.1, "clip_low": 0.02, "clip_high": 0.03}


def packed_row(model: VideoLM, layout: str) -> Packed:
    kinds, lengths = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    answers = [[torch.randint(0, 300, (n,), generator=generator) for n in group] for group in lengths]
    return pack(model, [PROMPTS[kind]() for kind in kinds], answers)


def gradients(model: VideoLM, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter, None as zeros; what was there before is cleared."""
    model.hf.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.hf.named_parameters()
    }


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """||a - b|| / ||b|| of every parameter. Some gradients are 0 but for rounding (a key's bias shifts all scores of a
    softmax alike): a difference of a millionth of the norm over all parameters counts as none."""
    assert got.keys() == want.keys()
    size = torch.stack([g.norm() for g in want.values()]).norm()
    assert size > 0
    for name, gradient in want.items():
        error = (got[name] - gradient).norm()
        assert error <= tolerance * gradient.norm() + 1e-6 * tolerance / 1e-5 * size, (name, float(error))


def coefficients(packed: Packed) -> Tensor:
    return torch.randn(len(packed.labels), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_gradients_equal_repeated_rows(layout: str, checkpointing: bool) -> None:
    model = make_lm()
    if checkpointing:
        set_checkpointing(model.hf, True)
        model.hf.train()
    packed, rows = packed_row(model, layout), RepeatedRows(model)
    want, got = rows.logp(packed), completion_logp(model, packed)
    assert got.shape == want.shape == packed.labels.shape
    assert (got - want).abs().max() <= 2e-6
    factors = coefficients(packed)
    ours, theirs = gradients(model, (got * factors).sum()), gradients(model, (want * factors).sum())
    families = {"text only": ()}.get(layout, ("visual",))
    for family in ("embed_tokens", "layers", *families):
        assert any(family in name and float(g.norm()) > 1e-3 for name, g in theirs.items()), family
    assert_same_gradients(ours, theirs, 1e-5)
