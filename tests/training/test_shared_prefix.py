"""One packed row against repeated rows: the same log-probs, the same gradients, the same training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, trainer
from tiny import GRADIENT_ROUNDING, LOG_PROB_TERMS, PROMPTS, log_prob_rounding, make_lm
from torch import Tensor

import videor1.training.tgrpo
from benchmarks.repeated_rows import RepeatedRows, make_batch
from benchmarks.step_inputs import COMPARED_RULE
from videor1.config import LoraConfig, TrainConfig
from videor1.demo.assets import Assets
from videor1.model import VideoLM
from videor1.model.lm import set_checkpointing
from videor1.training.passes import Packed, completion_logp, pack, tgrpo_loss
from videor1_kernels import GrpoLoss
from videor1_kernels.testing import rounding

LAYOUTS = {
    "mixed groups": (("video", "image", "text"), ([5, 1, 9], [4, 6], [2, 7, 3])),
    "two videos": (("video", "slow video"), ([8, 3], [1, 6, 2])),
    "one completion": (("video",), ([7],)),
    "a completion of one token": (("slow video",), ([1],)),
    "text only": (("text", "text"), ([4, 2], [3])),
    "a group of eight": (("video",), ([11, 3, 5, 9, 1, 8, 7, 2],)),
}
TEMPERATURE = 2.0


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


def assert_same_gradients(
    got: dict[str, Tensor], want: dict[str, Tensor], scale: dict[str, Tensor] | None = None
) -> None:
    """For each parameter by itself; relative to ``scale`` where that is what its terms cancel from."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        size = max(float(gradient.norm()), 0.0 if scale is None else float(scale[name].norm()))
        assert float(gradient.norm()) > 0, name
        assert float((got[name] - gradient).norm()) <= GRADIENT_ROUNDING * size, name


def assert_same_logp(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= log_prob_rounding(want)


def assert_same_loss(got: GrpoLoss, want: GrpoLoss, advantage: float) -> None:
    """A ratio errs by its log-prob's error relative to itself, and is weighed by its advantage."""
    assert_same_logp(got.logp, want.logp)
    bound = log_prob_rounding(want.logp)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=0, abs=bound * advantage)
    assert got.kl.item() == pytest.approx(want.kl.item(), rel=0, abs=bound)
    assert got.clip_fraction.item() == want.clip_fraction.item()


@pytest.mark.parametrize(
    ("layout", "checkpointing"), [*((layout, False) for layout in LAYOUTS), ("mixed groups", True), ("text only", True)]
)
def test_log_probs_and_gradients_equal_repeated_rows(layout: str, checkpointing: bool) -> None:
    model = make_lm(position_rule="transformers")
    if checkpointing:
        set_checkpointing(model.hf, True)
        model.hf.train()
    packed = packed_row(model, layout)
    want = RepeatedRows(model).logp(packed, temperature=TEMPERATURE)
    got = completion_logp(model, packed, temperature=TEMPERATURE)
    assert_same_logp(got, want)
    factors = torch.randn(len(packed.labels), generator=torch.Generator().manual_seed(1))
    theirs, ours = (gradients(model, (logp * factors).sum()) for logp in (want, got))
    assert theirs.keys() == {n for n, _ in model.hf.named_parameters() if layout != "text only" or "visual" not in n}
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("tower", ["row", "prompt"])
@pytest.mark.parametrize("head", ["all", "completions"])
def test_losses_equal_those_of_every_variant_of_repeated_rows(head: Any, tower: Any) -> None:
    """Off policy, clipped and with a KL term: value, gradients, and what is reported beside them. And each variant
    computes what it says."""
    model = make_lm(position_rule="transformers")
    packed = packed_row(model, "mixed groups")  # 3 videos' rows, 2 images', 3 of text
    config = TrainConfig(beta=0.1, clip_low=0.02, clip_high=0.03, temperature=TEMPERATURE, loss_type="dapo")
    with torch.no_grad():
        logp = completion_logp(model, packed, temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(2)
    noise = [0.05 * torch.randn(len(logp), generator=generator) for _ in range(2)]
    given = {"old_logp": logp + noise[0], "ref_logp": logp + noise[1], "num_tokens": 3 * len(logp)}
    advantages = torch.randn(len(packed.layout.cu_completions) - 1, generator=generator)

    rows = RepeatedRows(model, head=head, tower=tower)
    patches, at_head = [], []
    for visual in (rows.hf.model.visual, model.visual):
        visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    rows.hf.lm_head.register_forward_pre_hook(lambda _, args: at_head.append(args[0].shape[:-1].numel()))
    want = rows.loss(packed, advantages, config, **given)
    video, image = (3 * 4 * 8, 1 * 8 * 4)
    assert sum(patches) == (3 * video + 2 * image if tower == "row" else video + image)
    batch = make_batch(model, packed)
    longest = max(p + c for p, c in zip(batch.prompt_lengths, batch.completion_lengths, strict=True))
    assert batch.ids.shape == (8, longest)
    assert at_head == [8 * longest if head == "all" else len(packed.labels)]

    got = tgrpo_loss(model, packed, advantages, config, **given)
    theirs, ours = gradients(model, want.loss), gradients(model, got.loss)
    assert_same_loss(got, want, float(advantages.abs().max()))
    assert got.clip_fraction.item() > 0
    alike = rows.loss(packed, advantages.abs(), config, **given)
    assert_same_gradients(ours, theirs, gradients(model, alike.loss))


def test_repeated_rows_share_the_weights_and_have_the_adapters() -> None:
    model = make_lm(position_rule="transformers")
    packed = packed_row(model, "two videos")
    parameters, before = list(model.hf.parameters()), completion_logp(model, packed)
    rows = RepeatedRows(model)
    for hf in (rows.hf, model.hf):
        assert [id(p) for p in hf.parameters()] == [id(p) for p in parameters]
    rows.logp(packed)
    assert torch.equal(completion_logp(model, packed), before)
    with torch.no_grad():
        parameters[-1].mul_(1.5)  # one weight for both
    assert_same_logp(rows.logp(packed), completion_logp(model, packed))
    assert not torch.allclose(rows.logp(packed), before, rtol=0, atol=1e-2)

    model.add_lora(LoraConfig(rank=2), seed=0)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    rows = RepeatedRows(model)
    with torch.no_grad():
        adapted = rows.logp(packed)
        assert_same_logp(completion_logp(model, packed), adapted)
        with rows.peft.disable_adapter():
            plain = rows.logp(packed)
        with model.as_reference(None) as reference:
            assert_same_logp(completion_logp(reference, packed), plain)
    assert not torch.allclose(plain, adapted, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="got 'some', 'row'"):
        RepeatedRows(model, head="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected position_rule 'transformers', got 'paper'"):
        RepeatedRows(make_lm())


def test_a_run_does_not_depend_on_sharing(assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts of two updates each, videos and images, clipping and a KL term; beside each pass repeated rows with
    whole logits and a tower pass per row, from the weights of that moment: two runs side by side would tell little,
    since each step multiplies the rounding of the ones before it."""
    clipped, kl = [], []
    apart, norms = [], []  # over all parameters, of a step's difference and of its gradient

    def loss(model: VideoLM, packed: Packed, advantages: Tensor, config: TrainConfig, **given: Any) -> GrpoLoss:
        got = tgrpo_loss(model, packed, advantages, config, **given)
        given.pop("features")  # the tower runs on every row
        want = RepeatedRows(model).loss(packed, advantages, config, **given)
        assert_same_loss(got, want, 2.0)  # advantages are about 1, and ratios
        clipped.append(got.clip_fraction.item())
        kl.append(got.kl.item())
        parameters = list(model.trainable().values())
        ours, theirs = (torch.autograd.grad(x.loss, parameters, retain_graph=x is got) for x in (got, want))
        apart.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))))
        norms.append(math.sqrt(sum(float(b.square().sum()) for b in theirs)))
        return got

    def logp(model: VideoLM, packed: Packed, *, temperature: float, **given: Any) -> Tensor:
        got = completion_logp(model, packed, temperature=temperature, **given)
        assert_same_logp(got, RepeatedRows(model).logp(packed, temperature=temperature))
        return got

    monkeypatch.setattr(videor1.training.tgrpo, "tgrpo_loss", loss)
    monkeypatch.setattr(videor1.training.tgrpo, "completion_logp", logp)
    options: dict[str, Any] = {"max_steps": 4, "num_iterations": 2, "clip_low": 0.2, "clip_high": 0.2, "beta": 0.1}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 3}
    options |= {"max_completion_length": 12, "weight_decay": 0.0, "top_p": 1.0, "model.positions": COMPARED_RULE}
    trainer(assets, tmp_path, **options).train()
    assert len(clipped) == 8
    assert max(clipped) > 0
    assert all(abs(value) > 1e-4 for value in kl[2:])
    # Against the largest gradient: in a step whose advantages cancel, what rounding leaves is that of steps like it.
    assert max(apart) <= GRADIENT_ROUNDING * max(norms)
    # What was sampled by the policy is what the policy says of it.
    largest = max(row["sampling/sampling_logp_difference/max"] for row in metrics(tmp_path)[::2])
    assert largest <= rounding(LOG_PROB_TERMS, 10.0)
