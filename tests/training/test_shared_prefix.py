"""One packed row against repeated rows: the same log-probs, the same gradients, the same training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, trainer, weights
from tiny import installed_seconds, make_lm, make_media, make_model, make_prompt, make_tokenizer
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

import videor1.training
import videor1.training.tgrpo
from benchmarks.repeated_rows import RepeatedRows, make_batch
from videor1.config import LoraConfig, TrainConfig
from videor1.demo.assets import Assets
from videor1.model import VideoLM
from videor1.model.lm import set_checkpointing
from videor1.rollout import LocalEngine
from videor1.training.passes import Packed, completion_logp, pack, tgrpo_loss
from videor1_kernels import GrpoLoss

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
TEMPERATURE = 2.0  # log-probs of a few nats: fp32 has digits left for the bar of 2e-6
# The naive pass reports no entropy; differences of equal numbers are rounding.
NOT_COMPARED = {"entropy", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}


def packed_row(model: VideoLM, layout: str) -> Packed:
    kinds, lengths = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    answers = [[torch.randint(0, 300, (n,), generator=generator) for n in group] for group in lengths]
    return pack(model, [PROMPTS[kind]() for kind in kinds], answers)


def gradients(model: VideoLM, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that the loss reaches; what was there before is cleared."""
    model.hf.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """||a - b|| <= tolerance ||b|| for each parameter by itself."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert float(gradient.norm()) > 0, name
        assert float((got[name] - gradient).norm() / gradient.norm()) <= tolerance, name


def factors(packed: Packed) -> Tensor:
    return torch.randn(len(packed.labels), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_gradients_equal_repeated_rows(layout: str, checkpointing: bool) -> None:
    model = make_lm()
    if checkpointing:
        set_checkpointing(model.hf, True)
        model.hf.train()
    packed = packed_row(model, layout)
    want = RepeatedRows(model).logp(packed, temperature=TEMPERATURE)
    got = completion_logp(model, packed, temperature=TEMPERATURE)
    assert got.shape == want.shape == packed.labels.shape
    assert float((got - want).detach().abs().max()) <= 2e-6
    theirs, ours = (gradients(model, (logp * factors(packed)).sum()) for logp in (want, got))
    everything = {name for name, _ in model.hf.named_parameters() if layout != "text only" or "visual" not in name}
    assert theirs.keys() == everything
    assert_same_gradients(ours, theirs, 1e-5)


@pytest.mark.usefixtures("norms_in_fp64")
def test_in_fp64_nothing_is_left_of_the_differences() -> None:
    hf = make_model().double()
    model = VideoLM(hf, make_tokenizer())
    packed = packed_row(model, "mixed groups")
    want, got = RepeatedRows(model).logp(packed), completion_logp(model, packed)
    assert got.dtype == want.dtype == torch.float64
    assert float((got - want).detach().abs().max()) <= 1e-12
    theirs, ours = (gradients(model, (logp * factors(packed)).sum()) for logp in (want, got))
    assert_same_gradients(ours, theirs, 1e-7)  # transformers' tower turns its rotary positions in fp32


@pytest.fixture
def norms_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes them in fp32 whatever the weights are."""

    def forward(self: Qwen2_5_VLRMSNorm, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", forward)


@pytest.mark.parametrize(("head", "tower"), VARIANTS)
def test_losses_equal_those_of_every_variant_of_repeated_rows(head: Any, tower: Any) -> None:
    """Off policy, clipped and with a KL term: value, gradients, and what is reported beside them."""
    model = make_lm()
    packed = packed_row(model, "mixed groups")
    config = TrainConfig(beta=0.1, clip_low=0.02, clip_high=0.03, temperature=TEMPERATURE, loss_type="dapo")
    with torch.no_grad():
        logp = completion_logp(model, packed, temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(2)
    noise = [0.05 * torch.randn(len(logp), generator=generator) for _ in range(2)]
    given = {"old_logp": logp + noise[0], "ref_logp": logp + noise[1], "num_tokens": 3 * len(logp)}
    advantages = torch.randn(len(packed.layout.cu_completions) - 1, generator=generator)

    want = RepeatedRows(model, head=head, tower=tower).loss(packed, advantages, config, **given)
    got = tgrpo_loss(model, packed, advantages, config, **given)
    theirs, ours = gradients(model, want.loss), gradients(model, got.loss)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert float((got.logp - want.logp).abs().max()) <= 2e-6
    assert got.kl.item() == pytest.approx(want.kl.item(), rel=1e-4)
    assert 0 < got.clip_fraction.item() == want.clip_fraction.item()
    assert_same_gradients(ours, theirs, 2e-5)  # of a loss whose positive and negative advantages cancel


@pytest.mark.parametrize(("head", "tower"), VARIANTS)
def test_repeated_rows_compute_what_their_variant_says(head: Any, tower: Any) -> None:
    model = make_lm()
    packed = packed_row(model, "mixed groups")  # 3 videos' rows, 2 images', 3 of text
    rows = RepeatedRows(model, head=head, tower=tower)
    patches, at_head = [], []
    for visual in (rows.hf.model.visual, model.visual):
        visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    rows.hf.lm_head.register_forward_pre_hook(lambda _, args: at_head.append(args[0].shape[:-1].numel()))
    rows.logp(packed)
    video, image = (3 * 4 * 8, 1 * 8 * 4)
    assert sum(patches) == (3 * video + 2 * image if tower == "row" else video + image)
    batch = make_batch(model, packed)
    longest = max(p + c for p, c in zip(batch.prompt_lengths, batch.completion_lengths, strict=True))
    assert batch.ids.shape == (8, longest)
    assert at_head == [8 * longest if head == "all" else len(packed.labels)]


def test_repeated_rows_leave_the_model_as_it_is() -> None:
    model = make_lm()
    packed = packed_row(model, "two videos")
    parameters, before = list(model.hf.parameters()), completion_logp(model, packed)
    rows = RepeatedRows(model)
    for hf in (rows.hf, model.hf):
        assert [id(p) for p in hf.parameters()] == [id(p) for p in parameters]
    assert torch.equal(completion_logp(model, packed), before)
    rows.logp(packed)
    assert torch.equal(completion_logp(model, packed), before)
    with torch.no_grad():
        parameters[-1].mul_(1.5)  # one weight for both
    assert torch.allclose(rows.logp(packed), completion_logp(model, packed), rtol=0, atol=1e-5)
    assert not torch.allclose(rows.logp(packed), before, rtol=0, atol=1e-2)


def test_repeated_rows_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="got 'some', 'row'"):
        RepeatedRows(make_lm(), head="some")  # type: ignore[arg-type]


def test_repeated_rows_have_the_adapters() -> None:
    model = make_lm()
    model.add_lora(LoraConfig(rank=2), seed=0)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    packed, rows = packed_row(model, "two videos"), RepeatedRows(model)
    with torch.no_grad():
        adapted = rows.logp(packed)
        assert torch.allclose(adapted, completion_logp(model, packed), rtol=0, atol=1e-5)
        with rows.peft.disable_adapter():
            plain = rows.logp(packed)
        with model.as_reference(None) as reference:
            assert torch.allclose(plain, completion_logp(reference, packed), rtol=0, atol=1e-5)
    assert not torch.allclose(plain, adapted, rtol=0, atol=1e-3)


class Unshared:
    """Puts repeated rows in the place of the packed row's passes, and counts them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.losses = self.references = 0
        patch.setattr(videor1.training.tgrpo, "tgrpo_loss", self.loss)
        patch.setattr(videor1.training.tgrpo, "completion_logp", self.logp)

    def loss(self, model: VideoLM, packed: Packed, advantages: Tensor, config: TrainConfig, **given: Any) -> GrpoLoss:
        self.losses += 1
        given.pop("features")  # the tower runs on every row
        return RepeatedRows(model).loss(packed, advantages, config, **given)

    def logp(self, model: VideoLM, packed: Packed, *, temperature: float, **_: Any) -> Tensor:
        self.references += 1
        return RepeatedRows(model).logp(packed, temperature=temperature)


class Tape:
    """The answers of one run, to be given in another: a difference in the last bit may choose another token, and from
    there on two runs tell nothing of each other. The log-probs at sampling come along, so that a policy that has left
    the first run's is seen in every step's metrics."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.answers: list[Any] = []
        self.played = 0
        self.patch, self.sample = patch, LocalEngine.generate
        patch.setattr(LocalEngine, "generate", lambda *args: self.record(*args))

    def record(self, *args: Any) -> Any:
        self.answers.append(self.sample(*args))
        return self.answers[-1]

    def replay(self) -> None:
        def play(engine: LocalEngine, requests: Sequence[Any]) -> Any:
            self.played += 1
            rollout = self.answers[self.played - 1]
            assert [len(group.ordered) for group in rollout.groups] == [r.ordered.count for r in requests]
            return rollout

        self.patch.setattr(LocalEngine, "generate", play)


def test_twenty_steps_of_the_demo_do_not_depend_on_sharing(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rollouts of two updates each, videos and images, clipping and a KL term; off = repeated rows, whole logits, a
    tower pass per row, for the policy and for the reference."""
    options: dict[str, Any] = {
        "max_steps": 20, "num_iterations": 2, "clip_low": 0.2, "clip_high": 0.2, "beta": 0.1, "learning_rate": 3e-4,
        "num_generations": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.0,
        "max_completion_length": 12, "top_p": 1.0,
    }  # fmt: skip
    tape = Tape(monkeypatch)
    ends = [weights(trainer(assets, tmp_path / "on", **options).train())]
    unshared = Unshared(monkeypatch)
    tape.replay()
    ends.append(weights(trainer(assets, tmp_path / "off", **options).train()))
    assert tape.played == len(tape.answers) == 10
    assert unshared.losses >= 20
    assert unshared.references >= 10

    on, off = metrics(tmp_path / "on"), metrics(tmp_path / "off")
    assert len(on) == len(off) == 20
    for one, other in zip(on, off, strict=True):
        assert one.keys() == other.keys()
        assert {key for key in one if one[key] is None} == {key for key in other if other[key] is None}
        for key in {key for key in one if one[key] is not None} - NOT_COMPARED:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6, nan_ok=True), (one["step"], key)
        # What was sampled by the policy of the shared run is what the unshared run's policy says of it.
        if one["step"] % 2:
            assert other["sampling/sampling_logp_difference/max"] < 1e-4
    assert all(abs(row["kl"]) > 1e-4 for row in on[1:])
    start = weights(assets.model)
    # Adam divides by the gradient's own size, so where that is next to 0 rounding decides the step: all entries
    # together are compared.
    apart, moved = (
        math.sqrt(sum(float((ends[0][name] - other[name]).square().sum()) for name in start))
        for other in (ends[1], start)
    )
    assert moved > 0.1
    assert apart < 5e-3 * moved
