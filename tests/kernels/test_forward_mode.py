"""Forward-mode derivatives: no operation has one, and each says so instead of returning a result without a tangent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import videor1_kernels as vk


def attention(x: Tensor) -> Tensor:
    return vk.prefix_attention(x, x, x, vk.PrefixLayout([2], [[2]]))


def decode(x: Tensor) -> Tensor:
    suffix, lengths = torch.zeros(4, 3, 2, 16), torch.ones(4, dtype=torch.int64)
    cu, group = torch.tensor([0, 2]), torch.zeros(4, dtype=torch.int64)
    return vk.prefix_decode_attention(
        x, x[:2], x[:2], suffix, suffix, suffix_lengths=lengths, cu_prefix=cu, row_group=group
    )


LABELS, CU = torch.tensor([1, 0, 3, 2]), torch.tensor([0, 4], dtype=torch.int32)
WEIGHT, HIDDEN = torch.randn(5, 8), torch.randn(4, 8)
CASES: dict[str, tuple[Callable[[Tensor], object], Tensor]] = {
    "linear_logprob, hidden": (lambda x: vk.linear_logprob(x, WEIGHT, LABELS), HIDDEN),
    "linear_logprob, weight": (lambda x: vk.linear_logprob(HIDDEN, x, LABELS), WEIGHT),
    "linear_logprob, bias": (lambda x: vk.linear_logprob(HIDDEN, WEIGHT, LABELS, bias=x), torch.randn(5)),
    "selective_log_softmax": (lambda x: vk.selective_log_softmax(x, LABELS), torch.randn(4, 5)),
    "grpo_loss": (lambda x: vk.grpo_loss(x, torch.ones(1), CU, beta=0.0).loss, torch.randn(4)),
    "linear_grpo_loss": (lambda x: vk.linear_grpo_loss(x, WEIGHT, LABELS, torch.ones(1), CU, beta=0.0).loss, HIDDEN),
    "linear_grpo_loss, weight": (
        lambda x: vk.linear_grpo_loss(HIDDEN, x, LABELS, torch.ones(1), CU, beta=0.0).loss,
        WEIGHT,
    ),
    "prefix_attention": (attention, torch.randn(4, 2, 16)),
    "prefix_decode_attention": (decode, torch.randn(4, 2, 16)),
    "tgrpo_advantages": (
        lambda x: vk.tgrpo_advantages(x, torch.ones(1, 4), torch.full((1, 4), 400)).advantages,
        torch.rand(1, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tangent_is_refused(name: str) -> None:
    call, x = CASES[name]
    message = rf"^{name.partition(',')[0]}: \w+: expected a tensor without a tangent"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=message):
            call(dual)
        call(x)  # without a tangent it is computed
    if name != "tgrpo_advantages":
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jacfwd(call)(x)
