"""sample_tokens: one token per row from logits, and its log-probability, as a decode step of a rollout ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from benchmarks.shapes import LOGIT_STD
from videor1_kernels import sample_tokens
from videor1_kernels.sampling.reference import SampleTokensOptions
from videor1_kernels.sampling.reference import sample_tokens as reference

DRAWN = "tokens as drawn by fp64"  # only ours takes ``uniform``
BANNED = (1, 2, 5, 7)  # ids, as the rollout bans those that stand for vision features
SAMPLERS = {  # as Video-R1 samples, as most of GRPO does, and for an evaluation
    "top_p 0.95, top_k 50": SampleTokensOptions(1.0, 0.95, 50),
    "top_p 0.95": SampleTokensOptions(1.0, 0.95, 0),
    "no truncation": SampleTokensOptions(1.0, 1.0, 0),
    "greedy": SampleTokensOptions(0.0, 1.0, 0),
}


@dataclass(frozen=True)
class Size:
    head: str
    rows: int
    vocab: int


@dataclass(frozen=True)
class SampleInputs:
    """logits fp32 [R, V], as the rollout computes them; uniform [R]; banned [K]."""

    options: SampleTokensOptions
    logits: Tensor
    uniform: Tensor
    banned: Tensor


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return [_case(Size("small", 48, 8192), name) for name in SAMPLERS]
    # The completions of one prompt, and of 16.
    return [_case(Size("7B", rows, 152064), name) for name in SAMPLERS for rows in (12, 192)]


def _case(size: Size, name: str) -> Case:
    return Case(
        op="sample_tokens",
        title=name,
        size={"head": size.head, "R": size.rows, "V": size.vocab, "dtype": "float32"},
        dtype=torch.float32,
        inputs=functools.partial(sample_inputs, size, SAMPLERS[name]),
        expected=_expected,
        work=lambda x: Work(0.0, x.logits.nbytes + x.uniform.nbytes + 12 * len(x.logits), ""),
        contenders=(
            Contender(OURS, _ours, graph=True),
            Contender("torch (our reference)", lambda x: _step(reference, x)),
            Contender("transformers' logits processors, multinomial", lambda x: _processors(x, lambda f: f)),
            *(_on_gpu if size.head != "small" else ()),
        ),
    )


def sample_inputs(size: Size, options: SampleTokensOptions, device: torch.device) -> SampleInputs:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(size.rows, size.vocab, generator=generator, device=device).mul_(LOGIT_STD)
    uniform = torch.rand(size.rows, generator=generator, device=device, dtype=torch.float64)
    return SampleInputs(options, logits, uniform, torch.tensor(BANNED, device=device))


def _ours(inputs: SampleInputs) -> Step:
    options = inputs.options

    def step() -> Mapping[str, Tensor]:
        tokens, logp = sample_tokens(
            inputs.logits,
            inputs.uniform,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            banned=inputs.banned,
        )
        return {"tokens": tokens, "logp": logp, DRAWN: tokens}

    return step


def _step(call: Callable[..., tuple[Tensor, Tensor]], inputs: SampleInputs) -> Step:
    arguments = (inputs.logits, inputs.uniform, inputs.banned, inputs.options)
    return lambda: dict(zip(("tokens", "logp"), call(*arguments), strict=True))


def _processors(inputs: SampleInputs, wrap: Callable[[Any], Any]) -> Step:
    """What ``generate`` does with logits, and the log-prob of its token."""
    from transformers.generation import logits_process

    options = inputs.options
    chain: list[Any] = [logits_process.SuppressTokensLogitsProcessor(list(BANNED), device=inputs.logits.device)]
    if options.top_k and options.temperature:
        chain.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1 and options.temperature:
        chain.append(logits_process.TopPLogitsWarper(options.top_p))
    greedy = options.temperature == 0

    def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits
        for process in chain:
            scores = process(None, scores)
        tokens = scores.argmax(1, keepdim=True) if greedy else torch.multinomial(scores.softmax(1), 1)
        return tokens[:, 0], logits.log_softmax(1).gather(1, tokens)[:, 0]

    drawing = wrap(draw)
    return lambda: dict(zip(("tokens", "logp"), drawing(inputs.logits), strict=True))


_on_gpu = (Contender("torch.compile of these", lambda x: _processors(x, torch.compile)),)


def _expected(inputs: SampleInputs) -> list[Expected]:
    """A token that may be drawn, by fp64, and the log-probability of that token; of ours, fp64's token itself, but for
    where rounding moves the edge between two."""
    logits, options = inputs.logits.double(), inputs.options
    exact = reference(logits, inputs.uniform, inputs.banned, options)[0]
    least = _least_kept(logits, inputs)
    allowed = logits.index_fill(1, inputs.banned, -torch.inf)
    logp = logits.log_softmax(1)

    def of(outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["tokens"][:, None]

    def one_that_may_be(outputs: Mapping[str, Tensor]) -> Tensor:
        score = allowed.gather(1, of(outputs))[:, 0]
        return torch.where((score >= least) & score.isfinite(), outputs["tokens"], -1).double()

    def nearly_as_exact(outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["tokens"].double() + (outputs["tokens"] != exact)

    return [
        Expected("tokens", "tokens", one_that_may_be, bound=0.0),
        Expected(DRAWN, DRAWN, nearly_as_exact, bound=0.15, ours_only=True),  # root of the share that differs
        Expected("logp", "logp", lambda outputs: logp.gather(1, of(outputs))[:, 0]),
    ]


def _least_kept(logits: Tensor, inputs: SampleInputs) -> Tensor:
    """[R]: the logit of the least likely token that may be drawn, a little below it where the sum that ends the list
    was rounded."""
    options, ranked = inputs.options, logits.index_fill(1, inputs.banned, -torch.inf).sort(1, descending=True).values
    if options.temperature == 0:
        return ranked[:, 0]
    kept = ranked[:, : options.top_k] if options.top_k else ranked
    before = kept.softmax(1).cumsum(1).roll(1, 1)
    before[:, 0] = 0
    count = (before < options.top_p + 1e-5).sum(1, keepdim=True)
    return kept.gather(1, count - 1)[:, 0]


def test_sample_tokens(run_case):
    run_case()
