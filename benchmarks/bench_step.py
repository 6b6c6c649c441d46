"""Whole T-GRPO steps, from video files to updated weights: the trainer, beside the algorithm as the reference code
computes it and, on images, beside TRL's GRPOTrainer. Every completion has the same number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.cases import OUR_STEP, REFERENCE_STEP, Contender
from benchmarks.measure import ceilings
from benchmarks.options import check_choice
from benchmarks.oracle import GateFailure
from benchmarks.our_step import OurStep
from benchmarks.reference_step import ReferenceStep, as_8_bit
from benchmarks.rollout_inputs import MODELS
from benchmarks.step_floor import floor_seconds
from benchmarks.trl_step import TRLStep, missing
from benchmarks.whole_inputs import Setting
from benchmarks.whole_step import StepCase, measure_steps
from videor1.training.passes import tgrpo_loss
from videor1.training.tgrpo import KERNELS
from videor1_kernels import tgrpo_advantages

TRL = "TRL GRPOTrainer"
BOUNDS = {False: 1e-4, True: 5e-2}  # by bf16: rms of log-probs, and of the loss, between the two ways


def cases(
    device: torch.device,
    *,
    shape: Sequence[str] = (),
    prompts: Sequence[int] = (),
    frames: int | None = None,
    generations: int | None = None,
    completion: int | None = None,
    media: str | None = None,
    lora: int | None = None,
    checkpointing: bool | None = None,
    steps: int = 1,
) -> list[StepCase]:
    """Every named model and number of prompts; without names, the settings that are recorded."""
    for name in shape:
        check_choice("shape", name, MODELS, "step")
    given = {
        "frames": frames,
        "generations": generations,
        "completion": completion,
        "media": media,
        "lora": lora,
        "checkpointing": checkpointing,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = settings(device)
    if shape or prompts or changes:
        last = chosen[-1]
        chosen = [setting_of(name, n, device) for name in shape or [last.model] for n in prompts or [last.prompts]]
    return [step(dataclasses.replace(setting, **changes), steps=steps) for setting in chosen]


def settings(device: torch.device) -> list[Setting]:
    if device.type == "cuda":
        return [setting_of("7b", prompts, device) for prompts in (1, 4)]
    quick = setting_of("tiny", 4, device)
    return [quick, dataclasses.replace(quick, media="image"), setting_of("tiny", 8, device)]


def setting_of(model: str, prompts: int, device: torch.device) -> Setting:
    """Video-R1's sizes for the real models, of which the 7B is trained by adapters: all of it does not fit one card."""
    if model == "tiny":
        return Setting(prompts=prompts, completion=64 if prompts < 8 else 128)
    lora = 64 if model == "7b" else 0
    return Setting(model, prompts=prompts, completion=768, lora=lora, checkpointing=True, bf16=device.type == "cuda")


def step(setting: Setting, *, steps: int = 1) -> StepCase:
    on_images = setting.media == "image"
    title = "GRPO on images" if on_images else "T-GRPO on videos"
    contenders = [
        Contender(OUR_STEP, OurStep, does="a prompt once for all its answers; media decoded ahead by 2 processes"),
        Contender(REFERENCE_STEP, ReferenceStep, does="tower, prompt per row, all logits; media decoded in the step"),
    ]
    if on_images:
        contenders.append(Contender(TRL, TRLStep, missing, does="generate, prompt per row; media decoded in the step"))
    return StepCase(
        op="step",
        uses=KERNELS,
        title=title + (", gradient checkpointing on" if setting.checkpointing else ""),
        size=setting.described(),
        dtype=torch.bfloat16 if setting.bf16 else torch.float32,
        contenders=tuple(contenders),
        against=REFERENCE_STEP,
        turns=measure_steps,
        setting=setting,
        check=_check,
        floor=_floor,
        steps=steps,
        rounds=(5 if setting.prompts <= 4 else 3) if setting.model == "tiny" else 1,
        # Minutes a step where the model is real; the case of one prompt, which comes first, has warmed the process.
        cold=frozenset({REFERENCE_STEP} if setting.model != "tiny" and setting.prompts > 1 else ()),
        slow=setting.prompts > 4,
    )


def _floor(runner: Any) -> dict[str, float]:
    """The least seconds of each phase, by the first prompt of the step that was made."""
    if isinstance(runner, TRLStep):
        return {}
    return floor_seconds(runner.model, runner.first_prompt(), runner.inputs.setting, ceilings(runner.inputs.device))


def _check(runner: Any) -> dict[str, float]:
    """The errors of a runner's first step. GateFailure where it is not the step that was asked for."""
    if isinstance(runner, ReferenceStep):
        return _check_reference(runner)
    setting, lengths = runner.inputs.setting, runner.lengths()
    wanted = [setting.completion] * (setting.prompts * (setting.generations + setting.shuffled))
    if sorted(lengths) != wanted:
        raise GateFailure(
            f"completions: expected {len(wanted)} of {setting.completion} tokens, got {len(lengths)}, of "
            f"{min(lengths, default=0)} to {max(lengths, default=0)}"
        )
    return {}


def _check_reference(runner: ReferenceStep) -> dict[str, float]:
    """Compare its log-probs, loss and advantages with those that our passes give to its completions, with the first
    weights."""
    model, config, setting = runner.inputs.make_model(), runner.config, runner.inputs.setting
    worst = dict.fromkeys(("advantages", "logp", "loss"), 0.0)
    for update in runner.updates:
        accuracy, form, shuffled = update.rewards
        lengths = torch.full((1, setting.generations), setting.completion)
        scored = tgrpo_advantages(
            accuracy[None],
            form[None],
            lengths,
            shuffled[None] if len(shuffled) else None,
            rule=config.temporal.rule,
            alpha=config.temporal.alpha,
            mu=config.temporal.mu,
            apply=config.temporal_apply,
            length_bonus=config.reward.length_bonus,
            length_range=config.reward.length_range,
            eps=config.advantage_eps,
            backend="reference",
        )
        (prompt,) = update.packed.prompts
        assert prompt.media is not None
        prompts = (dataclasses.replace(prompt, media=as_8_bit(prompt.media)),)
        ours = tgrpo_loss(
            model,
            dataclasses.replace(update.packed, prompts=prompts),
            update.advantages,
            config,
            num_tokens=len(update.logp),
            ref_logp=update.ref_logp,
        )
        found = {
            "advantages": (scored.advantages[0] - update.advantages.cpu()).abs().max().item(),
            "logp": (ours.logp - update.logp).square().mean().sqrt().item(),
            "loss": abs(ours.loss.item() - update.loss),
        }
        worst = {name: max(worst[name], error) for name, error in found.items()}
    for name, error in worst.items():
        bound = 1e-5 if name == "advantages" else BOUNDS[setting.bf16]
        if not error <= bound:
            raise GateFailure(f"{REFERENCE_STEP}: {name}: error {error:.2e} against ours, bound {bound:.0e}")
    return worst


def test_step(run_case):
    run_case()
