"""Answers to video prompts, from ordered and from shuffled frames: our engine, and transformers' ``generate`` called as
the reference code of T-GRPO calls it. Every completion has the same number of tokens."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.cases import OURS, Contender, Step, Work
from benchmarks.measure import synchronize
from benchmarks.options import check_choice
from benchmarks.oracle import Expected, GateFailure
from benchmarks.rollout_inputs import (
    MODELS,
    ORDERED,
    SHUFFLED,
    RolloutInputs,
    Rollouts,
    branches,
    generate_inputs,
    requests,
    rollout_inputs,
    weight_bytes,
)
from benchmarks.rollout_turns import DECODE_SECONDS, DECODE_STEPS, RolloutCase, measure_rollout
from videor1.rollout import LocalEngine, Rollout, SamplingOptions
from videor1.training.passes import completion_logp, pack
from videor1.types import Prompt

ENGINE = f"{OURS}: rollout engine"
GENERATE = "transformers generate"
TOP_P, TOP_K = 0.95, 50
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # rms of the log-probs against the training pass's, nats


def cases(
    device: torch.device, *, shape: Sequence[str] = (), prompts: Sequence[int] = (), completion: int | None = None
) -> list[RolloutCase]:
    """Each number of prompts to each model."""
    on_card = device.type == "cuda"
    for name in shape:
        check_choice("shape", name, MODELS, "rollout")
    return [
        rollout(Rollouts(name, number, completion or (256 if on_card else 64), _dtype(name, device)))
        for number in prompts or ((1, 16) if on_card else (1, 4))
        for name in shape or (("7b", "3b") if on_card else ("tiny",))
    ]


def _dtype(model: str, device: torch.device) -> torch.dtype:
    return torch.float32 if model == "tiny" and device.type == "cpu" else torch.bfloat16


def rollout(sizes: Rollouts, *, weights: bool | None = None) -> RolloutCase:
    """``weights``: whether reading the weights bounds a decode step; None: on a GPU."""
    does = "rows of all prompts in one decode step, each branch's prompt prefilled once; gate: log-probs"
    return RolloutCase(
        op="rollout",
        uses=("prefix_attention", "prefix_decode_attention", "sample_tokens"),
        title=f"{ORDERED} answers from ordered, {SHUFFLED} from shuffled frames, top_p {TOP_P}, top_k {TOP_K}",
        size={
            "model": sizes.model,
            "prompts": sizes.prompts,
            "P": sizes.group.prompt,
            "C": sizes.new_tokens,
            "dtype": str(sizes.dtype).removeprefix("torch."),
        },
        dtype=sizes.dtype,
        inputs=functools.partial(rollout_inputs, sizes),
        expected=functools.partial(_expected, sizes),
        work=functools.partial(_work, weights),
        contenders=(
            Contender(ENGINE, _engine, does=f"{does} and greedy answers" if _exact(sizes) else does),
            Contender(GENERATE, _generate, does=f"{ORDERED}, then {SHUFFLED} rows of one prompt at a time"),
        ),
        against=GENERATE,
        turns=measure_rollout,
        slow=sizes.model != "tiny" and sizes.prompts > 1,  # minutes, in generate
        rounds=5 if sizes.model == "tiny" else 3 if sizes.prompts == 1 else 1,
    )


def _work(weights: bool | None, inputs: RolloutInputs) -> Work:
    bound = inputs.model.device.type == "cuda" if weights is None else weights
    return Work(0.0, weight_bytes(inputs.model) if bound else 0, "", inputs.sizes.sequences * inputs.sizes.new_tokens)


def _expected(sizes: Rollouts, _: Mapping[str, Tensor]) -> Sequence[Expected]:
    """Every completion has its number of tokens; of ours also what its build has compared."""
    lengths = torch.full((sizes.sequences,), float(sizes.new_tokens), dtype=torch.float64)
    difference = Expected(
        "logp", "logp", torch.zeros((), dtype=torch.float64), ours_only=True, bound=BOUNDS[sizes.dtype]
    )
    return [Expected("tokens", "tokens", lengths, bound=0.0), difference]


def _engine(inputs: RolloutInputs) -> Step:
    """Our engine. Building it is the gate."""
    if _exact(inputs.sizes):
        _check_greedy(inputs)
    difference = _logp_difference(inputs)
    engine, prefilled = (
        _local(inputs, SamplingOptions(inputs.sizes.new_tokens, 1.0, TOP_P, TOP_K)),
        _Prefill(inputs, inputs.sizes.sequences),
    )
    prefilled.watch(inputs.model.hf)

    def step() -> Mapping[str, Tensor]:
        done = engine.generate(requests(inputs))
        return {"logp": difference, **_outputs(_lengths(done), prefilled.seconds_since(), done.stats.decode_steps)}

    return step


def _generate(inputs: RolloutInputs) -> Step:
    """Take one prompt after the other, first with its ordered frames, then with its shuffled ones."""
    new, prefilled = inputs.sizes.new_tokens, _Prefill(inputs, 1)
    prefilled.watch(inputs.plain)
    drawn = {"do_sample": True, "temperature": 1.0, "top_p": TOP_P, "top_k": TOP_K}

    def generated(found: Iterable[tuple[Prompt, Tensor, int]], tokens: int) -> Mapping[str, Tensor]:
        lengths: list[int] = []
        seconds, steps = 0.0, 0
        for prompt, patches, number in found:
            options = _options(inputs, tokens, num_return_sequences=number, **drawn)
            out = inputs.plain.generate(**generate_inputs(inputs, prompt, patches), generation_config=options)
            seconds += prefilled.seconds_since()
            lengths += [out.shape[1] - len(prompt.input_ids)] * len(out)
            steps += lengths[-1] - 1  # the prefill gives the first token
        return _outputs(lengths, seconds, steps)

    generated(itertools.islice(branches(inputs), 2), 2)  # libraries load and choose their kernels
    return lambda: generated(branches(inputs), new)


def _options(inputs: RolloutInputs, tokens: int, **more: Any) -> GenerationConfig:
    """The options of ``generate`` for completions of exactly ``tokens`` tokens."""
    pad = inputs.plain.generation_config.pad_token_id
    return GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=pad, **more)


class _Prefill:
    """When a language model was last done with a prompt: what follows is decoding.

    Its last norm tells: the engine, which gives it a position of every sequence, calls no module around the layers.
    """

    def __init__(self, inputs: RolloutInputs, most: int) -> None:
        """``most``: positions that decoding gives to the last norm."""
        self._device, self._most, self._at = inputs.model.device, most, 0.0

    def watch(self, hf: Any) -> None:
        hf.model.language_model.norm.register_forward_hook(self._note)

    def seconds_since(self) -> float:
        synchronize(self._device)
        return time.perf_counter() - self._at

    def _note(self, _module: Any, _arguments: Any, output: Any) -> None:
        if output.shape[-2] > self._most:
            synchronize(self._device)
            self._at = time.perf_counter()


def _outputs(lengths: Sequence[int], seconds: float, steps: int) -> dict[str, Tensor]:
    return {
        "tokens": torch.tensor(lengths),
        DECODE_SECONDS: torch.tensor(seconds, dtype=torch.float64),
        DECODE_STEPS: torch.tensor(steps),
    }


def _local(inputs: RolloutInputs, options: SamplingOptions) -> LocalEngine:
    return LocalEngine(inputs.model, options, max_rows=inputs.sizes.sequences)


def _lengths(done: Rollout) -> list[int]:
    return [len(a.token_ids) for group in done.groups if group for a in (*group.ordered, *group.shuffled)]


def _exact(sizes: Rollouts) -> bool:
    """Whether greedy completions must be those of generate. In bf16 two likely tokens often tie."""
    return sizes.dtype == torch.float32


def _check_greedy(inputs: RolloutInputs) -> None:
    """GateFailure where a greedy completion of ours is not generate's, token for token; neither says a vision token."""
    new, found = inputs.sizes.new_tokens, branches(inputs)
    banned = [[token] for token in inputs.model.special.vision]
    greedy = _options(inputs, new, do_sample=False, bad_words_ids=banned)
    for group in _local(inputs, SamplingOptions(new, temperature=0.0)).generate(requests(inputs)).groups:
        assert group is not None
        for kind, completions in (("ordered", group.ordered), ("shuffled", group.shuffled)):
            prompt, patches, _ = next(found)
            out = inputs.plain.generate(**generate_inputs(inputs, prompt, patches), generation_config=greedy)
            expected = out[0, len(prompt.input_ids) :].tolist()
            for number, completion in enumerate(completions):
                ids = completion.token_ids.tolist()
                if ids != expected:
                    same = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
                    raise GateFailure(
                        f"greedy completions: expected those of {GENERATE} token for token, got others from token "
                        f"{same} of sequence {number} on, in the {kind} branch of prompt {prompt.draw}"
                    )


def _logp_difference(inputs: RolloutInputs) -> Tensor:
    """The rms difference between our engine's log-probs of its tokens and the training pass's, over all completions."""
    options = SamplingOptions(inputs.sizes.new_tokens, 1.0, TOP_P, TOP_K)
    asked, model = requests(inputs), inputs.model
    differences = []
    for request, group in zip(asked, _local(inputs, options).generate(asked).groups, strict=True):
        assert group is not None
        assert request.shuffled is not None
        for branch, completions in ((request.ordered, group.ordered), (request.shuffled, group.shuffled)):
            assert branch.features is not None
            packed = pack(model, [request.prompt], [[completion.token_ids for completion in completions]])
            with model.inference():
                logp = completion_logp(model, packed, features=[branch.features])
            differences.append(logp.cpu() - torch.cat([completion.logp for completion in completions]))
    return torch.cat(differences).double().square().mean().sqrt()


def test_rollout(run_case):
    run_case()
