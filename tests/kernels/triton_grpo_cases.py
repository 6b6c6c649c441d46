"""Completions for the GRPO losses on Triton, good and bad, and the fused loss compared with the reference in fp64."""

import itertools
import math

import torch
from triton_cases import DEVICE, leaf, make_head

from videor1_kernels import last_backend, linear_grpo_loss, linear_logprob
from videor1_kernels.testing import assert_matches

LENGTHS = (5, 1, 0, 9, 2)
BOTH = {"clip_low": 0.2, "clip_high": 0.28}
FIELDS = ("loss", "kl", "clip_fraction", "logp")


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=DEVICE)


def make_case(lengths=LENGTHS, seed=0):
    """Log-probs [N] that require a gradient, and what goes with them; ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -3 * torch.rand(n, generator=generator)
    case = {
        "advantages": torch.randn(len(lengths), generator=generator).abs() * torch.tensor([1, -1] * 9)[: len(lengths)],
        "cu_seqlens": cumulative(lengths),
        "old_logp": logp + 0.8 * torch.randn(n, generator=generator),
        "ref_logp": logp + 2 * torch.randn(n, generator=generator),
    }
    return leaf(logp.to(DEVICE)), {name: x.to(DEVICE) for name, x in case.items()}


def double(case):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in case.items()
    }


def make_linear(dtype, lengths=LENGTHS, *, vocab=70, size=16, ignored=False, seed=0, bias=False):
    """A head [N, size] and a case whose old and reference log-probs lie around its own."""
    head = make_head(sum(lengths), vocab, size, dtype, seed=seed, ignored=ignored, bias=bias)
    _, case = make_case(lengths, seed)
    with torch.no_grad():
        exact = head.oracle()
        logp = linear_logprob(exact.hidden, exact.weight, exact.labels, bias=exact.bias, backend="reference")[0].float()
    noise = make_case(lengths, seed)[0].detach() + 1.5  # from -1.5 to 1.5
    case["old_logp"], case["ref_logp"] = logp + 0.4 * noise, logp - noise
    return head, case


def run(head, case, backend="triton", factor=1.0, **options):
    """GrpoLoss, and the gradients of factor times its loss."""
    out = linear_grpo_loss(head.hidden, head.weight, head.labels, **case, bias=head.bias, **options, backend=backend)
    assert last_backend("linear_grpo_loss") == backend
    grads = torch.autograd.grad(factor * out.loss, head.leaves) if out.loss.requires_grad else ()
    return out, grads


def check_linear(head, case, *, factor=1.0, **options):
    """linear_grpo_loss against fp64. Statistics to fp32's rounding, gradients to their dtype's."""
    ours, grads = run(head, case, factor=factor, **options)
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].double()
    exact, exact_grads = run(head.oracle(), double(case), "reference", factor, **options)
    for name in (*FIELDS, "entropy"):
        assert getattr(ours, name).dtype == torch.float32
        assert_matches(getattr(ours, name), getattr(exact, name), name=name)
    assert [x.dtype for x in grads] == [x.dtype for x in head.leaves]
    for i, (a, o) in enumerate(zip(grads, exact_grads, strict=True)):
        scale = o.abs().max().clamp(min=1) if o.numel() else 1.0
        assert_matches(a.double() / scale, o / scale, a.dtype, f"gradient {i}")
    assert ours.skipped_rows == exact.skipped_rows
    return ours, grads


BAD = [
    {"beta": 0.1}, {"beta": -1}, {"beta": math.nan}, {"advantages": torch.zeros(1)}, {"advantages": torch.zeros(2, 1)},
    {"advantages": torch.zeros(2).long()}, {"loss_type": "dapo"}, {"loss_type": "dr_grpo"}, {"loss_type": "gpo"},
    {"importance_level": "tokens"}, {"clip_low": 0.0}, {"clip_high": -1.0}, {"kl_clamp": 0.0},
    {"old_logp": torch.zeros(4)}, {"old_logp": torch.zeros(3).long()}, {"ref_logp": torch.zeros(2)},
    {"old_logp": torch.zeros(3, device="meta")}, {"loss_type": "dapo", "num_tokens": 0},
    {"loss_type": "dr_grpo", "max_completion_length": 0}, {"cu_seqlens": torch.tensor([0, 2, 4])},
    {"cu_seqlens": torch.tensor([0, 1, 2])}, {"cu_seqlens": torch.tensor([1, 2, 3])},
    {"cu_seqlens": torch.tensor([0, 4, 3])}, {"cu_seqlens": torch.tensor([0, -1, 3])},
    {"cu_seqlens": torch.tensor([0.0, 2.0, 3.0])}, {"cu_seqlens": torch.tensor([0, 3])},
    {"cu_seqlens": torch.empty(0).int()}, {"cu_seqlens": torch.tensor([[0, 2, 3]])},
]  # fmt: skip
