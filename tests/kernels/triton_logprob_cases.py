"""linear_logprob on Triton, compared with the reference in fp64; memory layouts that its operands may have."""

import torch
from triton_cases import Head, assert_all_match, upstream

from videor1_kernels import last_backend, linear_logprob

NAMES = ("logp", "entropy", "d_hidden", "d_weight", "d_bias")


def evaluate(head: Head, backend="triton", temperature=1.0, g=None, e=None):
    """[logp, entropy, gradients of the leaves] for incoming gradients g of logp and e of entropy."""
    out = linear_logprob(
        head.hidden, head.weight, head.labels, bias=head.bias, temperature=temperature, backend=backend
    )
    assert last_backend("linear_logprob") == backend
    used = [(x, grad.to(x.dtype)) for x, grad in zip(out, (g, e), strict=True) if grad is not None]
    grads = torch.autograd.grad([x for x, _ in used], head.leaves, [grad for _, grad in used]) if used else ()
    return [*out, *grads]


def check(head: Head, temperature=1.0, g="random", e="random"):
    """Against fp64: log-probs and entropies to fp32's rounding whatever the inputs' dtype, gradients to their own."""
    g, e = (upstream(*head.labels.shape, seed=i) if x == "random" else x for i, x in enumerate((g, e)))
    exact_temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    ours = evaluate(head, temperature=temperature, g=g, e=e)
    exact = evaluate(head.oracle(), "reference", exact_temperature, g, e)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert [x.dtype for x in ours[2:]] == [x.dtype for x in head.leaves]
    assert_all_match(ours, exact, NAMES[: len(ours)], [None] * len(ours))
    return ours


def strided(values):
    """The same values, every second element of a wider tensor whose others are large."""
    return torch.stack([values, torch.full_like(values, 77)], -1)[..., 0]


def shifted(values):
    """The same values and strides, one element past an aligned address."""
    memory = torch.empty(values.numel() + 8, dtype=values.dtype, device=values.device)
    view = memory[1 : 1 + values.numel()].view(values.shape)
    return view.copy_(values)


LAYOUTS = {
    "shifted": shifted,
    "strided": strided,
    "column-major": lambda x: x.T.contiguous().T,
    "rows of a wider matrix": lambda x: torch.cat([torch.full_like(x, 77), x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, 77)], 1)[:, 0],
}
