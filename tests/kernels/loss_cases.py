"""What the tests of the losses and of the linear head share: oracles in plain torch, inputs, and the comparison.

``dense`` is the head with all logits at once, ``naive`` the loss as a loop over completions. Both are written apart
from the library, run in fp64 and are differentiated by autograd; the reference and Triton are compared with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton_cases import DEVICE, DTYPES, Head, leaf, make_head, upstream

from videor1_kernels import GrpoLoss, grpo_loss, last_backend, linear_grpo_loss, linear_logprob
from videor1_kernels.linear_logprob import products, triton_rows
from videor1_kernels.testing import assert_matches, poisoned_memory, rounding

# Results in fp64 beside those by hand: at most some hundred operations on numbers up to 10. 4.4e-14.
BY_HAND = rounding(100, 10.0, torch.float64)

Clips = tuple[float | None, float | None]
Kind = tuple[str, torch.dtype]  # a backend, and the dtype of its inputs
BACKENDS = ("reference", "triton")
KINDS: list[Kind] = [("reference", torch.float64), *(("triton", dtype) for dtype in DTYPES)]
FP32: list[Kind] = [(backend, torch.float32) for backend in BACKENDS]
LOW: list[Kind] = [
    *(("reference", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(("triton", dtype) for dtype in DTYPES),
]

LOSSES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "dapo", "num_tokens": 41},
]
LEVELS = ("token", "sequence")
CLIPS = [(None, None), (0.2, None), (None, 0.28), (0.2, 0.28)]
BOTH = {"clip_low": 0.2, "clip_high": 0.28}
# What may weigh tokens: which of the tensors of ``weighted_case`` are given, and the options for them.
WEIGHTS: list[dict[str, Any]] = [
    {"importance_correction": "token", "correction_min": 0.7, "correction_max": 1.4},
    {"importance_correction": "token", "correction_mode": "mask", "correction_min": 0.7, "correction_max": 1.4},
    {"importance_correction": "sequence", "correction_max": 1.05},
    {"importance_correction": "sequence", "correction_mode": "mask", "correction_min": 0.95, "correction_max": None},
    {"token_weight": True},
    {"importance_weight": True},
    {"completion_mask": True},
    {"importance_correction": "token", "correction_mode": "mask", "token_weight": True, "completion_mask": True},
]
# Loss types with a policy term of their own; with what they take.
OWN: list[dict[str, Any]] = [
    {"loss_type": "luspo"},
    {"loss_type": "luspo", "clip_low": 0.2, "clip_high": 0.28, "delta": 1.5},
    {"loss_type": "cispo", "num_tokens": 23, "clip_low": 0.3, "clip_high": 0.2},
    {"loss_type": "cispo", "num_tokens": 23, "clip_high": -0.1},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    {"loss_type": "vespo", "num_tokens": 23},
    {"loss_type": "vespo", "num_tokens": 23, "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5},
]
BOUNDS: list[dict[str, Any]] = [
    {},
    {"delta": 1.5},
    {"delta": 1.1},
    {"clip_dual": 1.3},
    {"delta": 2.0, "clip_dual": 1.6},
]
LENGTHS = (5, 1, 0, 5)
LEAVES = ("hidden", "weight", "bias")


def strided(values: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor whose others are others."""
    other = ~values if values.dtype == torch.bool else torch.full_like(values, 77)
    return torch.stack([values, other], -1)[..., 0]


def shifted(values: Tensor) -> Tensor:
    """The same values and strides, one element past an aligned address."""
    memory = torch.empty(values.numel() + 8, dtype=values.dtype, device=values.device)
    view = memory[1 : 1 + values.numel()].view(values.shape)
    return view.copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": shifted,
    "strided": strided,
    "column-major": lambda x: x.T.contiguous().T,
    "rows of a wider matrix": lambda x: torch.cat([torch.full_like(x, 77), x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, 77)], 1)[:, 0],
}


def double(value: Any) -> Any:
    """Floats of a tensor, of a dict's values, or anything else as it is, in fp64."""
    if isinstance(value, dict):
        return {name: double(item) for name, item in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def cumulative(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def assert_same_bits(call: Callable[[], Iterable[Tensor]], *, autocast: bool = True) -> None:
    """Whatever its memory held before, under autocast unless it counts, and whatever torch's default dtype is."""
    first = call()
    defaults = [default_dtype(dtype) for dtype in (torch.bfloat16, torch.float64)]
    for surroundings in (poisoned_memory(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast), *defaults):
        with surroundings:
            again = call()
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_differentiable_once(value: Tensor, leaves: list[Tensor]) -> None:
    """Again and scaled, the gradients are the same; a second derivative is an error, and not a missing term."""
    once, again, scaled = (torch.autograd.grad(f * value, leaves, retain_graph=True) for f in (1, 1, -8))
    for a, b, c in zip(once, again, scaled, strict=True):
        assert torch.equal(a, b)
        assert_matches(c / -8, a)
    (grad, *_) = torch.autograd.grad(value, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def multiplications(call: Callable[[], object]) -> int:
    """Of the matrix products in ``call``, inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    total = 0
    for event in profiler.events():
        if event.name in ("aten::addmm", "aten::addmm_", "aten::mm", "mkldnn::_linear_pointwise"):
            shapes = [shape for shape in event.input_shapes if len(shape) == 2]
            (n, _), b = shapes[1:3] if "addmm" in event.name else shapes[:2]  # what a product is added to comes first
            total += n * math.prod(b)
    return total


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes chunks of 4 rows at most, and a row in several steps."""
    monkeypatch.setattr(products, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_rows, "BLOCK", 128)


# The head.


def dense(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from all logits at once; autograd does the rest."""
    logits = torch.einsum("...h,vh->...v", hidden, weight)
    if bias is not None:
        logits = logits + bias
    logits = logits / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    top = logits.amax(-1, keepdim=True)
    scores = logits - (top + (logits - top).exp().sum(-1, keepdim=True).log())
    logp = torch.gather(scores, -1, labels.clamp(min=0)[..., None])[..., 0]
    probs = scores.exp()
    entropy = -torch.where(probs > 0, probs * torch.where(probs > 0, scores, 0.0), 0.0).sum(-1)
    return torch.where(labels != -100, logp, 0.0), torch.where(labels != -100, entropy, 0.0)


def plain(head: Head) -> tuple[Tensor, Tensor]:
    """What one writes in torch, in the inputs' dtype."""
    logits = head.hidden @ head.weight.T
    scores = (logits if head.bias is None else logits + head.bias).float().log_softmax(-1)
    return scores.gather(-1, head.labels[:, None])[:, 0], -(scores.exp() * scores).sum(-1)


def evaluate(
    backend: str, head: Head, temperature: float | Tensor = 1.0, g: Tensor | None = None, e: Tensor | None = None
) -> list[Tensor]:
    """[logp, entropy, gradients of the leaves] for incoming gradients g of logp and e of entropy."""
    if backend == "dense":
        out = dense(head.hidden, head.weight, head.labels, head.bias, double(temperature))
    elif backend == "plain":
        out = plain(head)
    else:
        out = linear_logprob(
            head.hidden, head.weight, head.labels, bias=head.bias, temperature=temperature, backend=backend
        )
        assert last_backend("linear_logprob") == backend
    used = [(x, grad.to(x.dtype)) for x, grad in zip(out, (g, e), strict=True) if grad is not None]
    grads = torch.autograd.grad([x for x, _ in used], head.leaves, [grad for _, grad in used]) if used else ()
    return [*out, *grads]


def check_head(
    backend: str, head: Head, temperature: float | Tensor = 1.0, g: str | None = "random", e: str | None = "random"
) -> list[Tensor]:
    """linear_logprob against ``dense``: log-probs to fp32's rounding whatever the inputs' dtype, gradients to theirs.

    Ignored rows may hold anything.
    """
    incoming = [upstream(*head.labels.shape, seed=i) if x else None for i, x in enumerate((g, e))]
    ours = evaluate(backend, head, temperature, *incoming)
    exact = evaluate("dense", head.oracle(), temperature, *incoming)
    statistics = torch.float64 if torch.float64 in [x.dtype for x in head.leaves] else torch.float32
    assert [x.dtype for x in ours] == [statistics] * 2 + [x.dtype for x in head.leaves]
    for i, (a, o) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == o.shape
        assert_matches(a, o, name=f"result {i}")
    return ours


# The loss.


def naive(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    loss_type: str = "grpo",
    beta: float = 0.04,
    clip_low: float | None = None,
    clip_high: float | None = None,
    kl_clamp: float = 10.0,
    importance_level: str = "token",
    max_completion_length: float = 0,
    num_tokens: float = 0,
    rollout_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    importance_weight: Tensor | None = None,
    completion_mask: Tensor | None = None,
    importance_correction: str = "none",
    correction_mode: str = "truncate",
    correction_min: float | None = None,
    correction_max: float | None = 2.0,
    delta: float | None = None,
    clip_dual: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL and clip fraction."""
    nothing = logp[:0].sum() + (0.0 if entropy is None else entropy[:0].sum())
    per_completion, kls, clipped, count = [], [nothing], 0, 0
    completions = [s for s in range(len(advantages)) if completion_mask is None or completion_mask[s]]
    for s in completions:
        kept = [t for t in range(int(cu_seqlens[s]), int(cu_seqlens[s + 1])) if mask is None or mask[t]]
        if not kept:
            continue
        count += len(kept)
        lp, a = logp[kept], advantages[s]
        log_ratio = lp - (lp.detach() if old_logp is None else old_logp[kept])
        if importance_level == "sequence":
            mean = log_ratio.mean().expand(len(kept))
            # Where tokens weigh differently, GSPO-token's: the same number, through a token's own log-prob.
            weighted = any(x is not None for x in (rollout_logp, token_weight, importance_weight))
            log_ratio = mean.detach() + lp - lp.detach() if weighted else mean
        r = log_ratio.exp()
        bounded = r.clamp(0.0 if clip_low is None else 1 - clip_low, math.inf if clip_high is None else 1 + clip_high)
        if delta is not None and clip_high is None:
            bounded = bounded.clamp(max=delta)
        gains = torch.minimum((r if delta is None else r.clamp(max=delta)) * a, bounded * a)
        if clip_dual is not None and a < 0:
            gains = torch.maximum(gains, clip_dual * a)
        inside = torch.ones_like(lp)
        w = inside if importance_weight is None else importance_weight[kept]
        if importance_correction != "none":
            assert rollout_logp is not None
            gap = ((lp if old_logp is None else old_logp[kept]) - rollout_logp[kept]).detach()
            w = (gap if importance_correction == "token" else gap.mean().expand(len(kept))).exp()
            low = 0.0 if correction_min is None else correction_min
            high = math.inf if correction_max is None else correction_max
            if correction_mode == "mask":
                inside = ((w >= low) & (w <= high)).to(lp.dtype)
            w = w * inside if correction_mode == "mask" else w.clamp(low, high)
        if loss_type == "cispo":
            gains = bounded.detach() * a * lp
            clipped += int((bounded * a != r * a).sum())
        elif loss_type == "sapo":
            tau = sapo_temperature_pos if a > 0 else sapo_temperature_neg
            gains = 4 / tau * torch.sigmoid(tau * (r - 1)) * a
        elif loss_type == "vespo":
            k, rate = (vespo_k_pos, vespo_lambda_pos) if a >= 0 else (vespo_k_neg, vespo_lambda_neg)
            total = (log_ratio.clamp(-20, 20).sum() + w.log().clamp(math.log(1e-8), 20).sum()).clamp(math.log(1e-8), 20)
            gains = (rate + k * total - rate * total.exp()).exp().detach() * a * lp
            w = torch.ones_like(lp)
        else:
            clipped += int((gains != r * a).sum())
        terms = -gains * w
        if beta:
            assert ref_logp is not None
            x = (ref_logp[kept] - lp).clamp(-kl_clamp, kl_clamp)
            kl = (x.exp() - x - 1) * (r if use_bias_correction_kl else 1.0)
            terms = terms + beta * kl
            kls.append(kl.sum())
        if entropy is not None:
            terms = terms - entropy_coef * entropy[kept]
        per_completion.append(terms * inside * (1.0 if token_weight is None else token_weight[kept]))
    if loss_type in ("grpo", "sapo"):
        loss = sum((terms.mean() for terms in per_completion), nothing) / max(len(completions), 1)
    else:
        size = {"bnpo": count, "dr_grpo": len(completions) * max_completion_length, "luspo": len(completions)}.get(
            loss_type, num_tokens
        )
        loss = sum((terms.sum() for terms in per_completion), nothing) / (size or 1)
    return loss, sum(kls).detach() / max(count, 1), nothing.detach() + clipped / max(count, 1)


def make_case(
    lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float32, *, masked: bool = False, seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """Log-probs [N] that require a gradient, and what goes with them; ratios on both sides of every clip.

    Where masked, as the only token of the second completion is, all is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -3 * torch.rand(n, generator=generator)
    case = {
        "advantages": torch.randn(len(lengths), generator=generator).abs() * torch.tensor([1, -1] * 9)[: len(lengths)],
        "old_logp": logp + 0.8 * torch.randn(n, generator=generator),
        "ref_logp": logp + 2 * torch.randn(n, generator=generator),
    }
    if masked:
        mask = torch.arange(n) % 4 != 1
        for values in (logp, case["old_logp"], case["ref_logp"]):
            values[~mask] = math.nan
        case["mask"] = mask
    case = {name: x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for name, x in case.items()}
    return leaf(logp.to(DEVICE, dtype)), case | {"cu_seqlens": cumulative(lengths)}


def weighted(case: dict[str, Any], chosen: dict[str, Any], seed: int = 7) -> tuple[dict[str, Any], dict[str, Any]]:
    """The case with the tensors that an entry of WEIGHTS asks for, NaN where masked, and the options of the entry.

    Without old log-probs the sampler's lie around the reference's, as those of the policy do.
    """
    generator = torch.Generator().manual_seed(seed)
    options = dict(chosen)
    base = case["ref_logp"] if case.get("old_logp") is None else case["old_logp"]
    noise = torch.randn(len(base), generator=generator).to(base)
    found = {}
    if "importance_correction" in options:
        found["rollout_logp"] = base + 0.5 * noise
    for name in ("token_weight", "importance_weight"):
        if options.pop(name, False):
            found[name] = (noise - 0.2).clamp(min=0)
    if case.get("mask") is not None:
        for values in found.values():
            values[~case["mask"]] = math.nan
    if options.pop("completion_mask", False):
        found["completion_mask"] = torch.arange(len(case["advantages"]), device=DEVICE) != 0
    return case | found, options


def counted(case: dict[str, Any], mask: Tensor | None) -> Tensor | None:
    """bool [N], the tokens that neither a mask nor the mask of completions leaves out; None: all."""
    if case.get("completion_mask") is None:
        return mask
    whole = case["completion_mask"].repeat_interleave(case["cu_seqlens"].long().diff())
    return whole if mask is None else mask & whole


def check_loss(backend: str, logp: Tensor, case: dict[str, Any], **options: Any) -> tuple[GrpoLoss, Tensor]:
    """grpo_loss against ``naive``; loss and statistics are fp32 or wider, the gradient of the log-probs' dtype."""
    with poisoned_memory():
        ours = grpo_loss(logp, **case, **options, backend=backend)
        (grad,) = torch.autograd.grad(3 * ours.loss, logp)
    assert last_backend("grpo_loss") == backend
    exact = leaf(logp.double())
    oracle = naive(exact, **double(case), **options)
    (exact_grad,) = torch.autograd.grad(3 * oracle[0], exact)
    mask = counted(case, case.get("mask"))
    shown = exact.detach() if mask is None else exact.detach().masked_fill(~mask, 0.0)
    wide = torch.promote_types(logp.dtype, torch.float32)
    for a, o in zip((ours.loss, ours.kl, ours.clip_fraction, ours.logp), (*oracle, shown), strict=True):
        assert a.dtype == wide
        assert_matches(a, o)
    assert grad.dtype == logp.dtype
    assert_matches(grad, exact_grad)
    assert (grad[exact_grad == 0] == 0).all()
    assert ours.skipped_rows == int((exact_grad == 0).sum())
    return ours, grad


def make_linear(
    dtype: torch.dtype,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    vocab: int = 70,
    size: int = 16,
    temperature: float | Tensor = 1.0,
    **options: Any,
) -> tuple[Head, dict[str, Any]]:
    """A head [N, size] and a case whose old and reference log-probs lie around its own."""
    head = make_head(sum(lengths), vocab, size, dtype, **options)
    wide = torch.promote_types(dtype, torch.float32)
    noise, case = make_case(lengths, wide)
    logp = evaluate("dense", head.oracle(), temperature)[0].detach().to(wide)
    noise = noise.detach() + 1.5  # from -1.5 to 1.5
    return head, case | {"old_logp": logp + 0.4 * noise, "ref_logp": logp - noise}


def run_linear(
    backend: str, head: Head, case: dict[str, Any], factor: float = 1.0, **options: Any
) -> tuple[GrpoLoss, tuple[Tensor, ...]]:
    """GrpoLoss, and the gradients of factor times its loss."""
    out = linear_grpo_loss(head.hidden, head.weight, head.labels, **case, bias=head.bias, **options, backend=backend)
    assert last_backend("linear_grpo_loss") == backend
    return out, torch.autograd.grad(factor * out.loss, head.leaves) if out.loss.requires_grad else ()


def check_linear(
    backend: str,
    head: Head,
    case: dict[str, Any],
    *,
    factor: float = 1.0,
    temperature: float | Tensor = 1.0,
    **options: Any,
) -> tuple[GrpoLoss, tuple[Tensor, ...]]:
    """linear_grpo_loss against both oracles. Statistics to fp32's rounding, gradients to their dtype's."""
    ours, grads = run_linear(backend, head, case, factor, temperature=temperature, **options)
    exact = head.oracle()
    if (mask := counted(case, None)) is not None:
        exact = replace(exact, labels=exact.labels.masked_fill(~mask, -100))
    logp, entropy = evaluate("dense", exact, temperature)
    loss, kl, clip_fraction = naive(logp, **double(case), mask=exact.labels != -100, entropy=entropy, **options)
    *exact_grads, coefficient, by_entropy = torch.autograd.grad(factor * loss, [*exact.leaves, logp, entropy])
    wide = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
    theirs = {"loss": loss, "kl": kl, "clip_fraction": clip_fraction, "logp": logp, "entropy": entropy}
    for name, value in theirs.items():
        assert getattr(ours, name).dtype == wide
        assert_matches(getattr(ours, name), value, name=name)
    assert [x.dtype for x in grads] == [x.dtype for x in head.leaves]
    for i, (a, o) in enumerate(zip(grads, exact_grads, strict=True)):
        scale = o.abs().max().clamp(min=1) if o.numel() else 1.0
        assert_matches(a.double() / scale, o / scale, a.dtype, f"gradient {i}")
    assert ours.skipped_rows == int(((coefficient == 0) & (by_entropy == 0)).sum())
    return ours, grads
