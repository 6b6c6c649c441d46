"""prefix_attention on Triton against the fp64 reference: forward and gradients."""

import pytest
import torch
from triton_cases import CUDA, DEVICE, HALF, error_of

from videor1_kernels import PrefixLayout, chosen_backend, last_backend, prefix_attention
from videor1_kernels.prefix_attention import reference, triton, work
from videor1_kernels.prefix_attention.triton import Block, Blocks
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

DTYPES = HALF if CUDA else [torch.float32, *HALF]  # in fp32 these kernels run in the interpreter only
SMALL_BLOCKS = Blocks(*[Block(16, 16, 4, 1)] * 3)  # in the interpreter
LAYOUTS = {
    "ragged": ([20, 1, 17], [[18, 1], [16, 3], []]),
    "whole blocks": ([32], [[16, 32]]),
    "single tokens": ([1, 1], [[1], [1, 1]]),
    "one key more than a block": ([33, 5], [[17], [40]]),
    "a short prompt": ([3], [[50]]),
    "blocks of a card": ([300, 128, 1], [[257, 1, 129], [128], [64, 300]]),
}
SMALL = [name for name in LAYOUTS if name != "blocks of a card" or CUDA]


def make(name, heads=(2, 1), dim=16, dtype=torch.float32, seed=0):
    layout = PrefixLayout(*LAYOUTS[name], DEVICE)
    torch.manual_seed(seed)
    q, k, v, grad = (torch.randn(layout.total_tokens, h, dim).to(DEVICE, dtype) for h in (*heads, heads[1], heads[0]))
    return layout, [x.requires_grad_() for x in (q, k, v)], grad


def run(inputs, layout, grad, backend="triton", **options):
    out = prefix_attention(*inputs, layout, backend=backend, **options)
    assert last_backend("prefix_attention") == backend
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def oracle(inputs, layout, grad, **options):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return run(exact, layout, grad.double(), "reference", **options)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


@pytest.fixture(autouse=True)
def _small_blocks_and_parts(monkeypatch):
    """Rows of several blocks, queries split as they are on long rows, so that partial results are summed here too."""
    monkeypatch.setattr(work, "LEAST_PART", 20)
    monkeypatch.setattr(triton, "INTERPRETED", SMALL_BLOCKS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_forward_and_gradients(name, dtype):
    layout, inputs, grad = make(name, dtype=dtype)
    for actual, exact in zip(run(inputs, layout, grad), oracle(inputs, layout, grad), strict=True):
        assert actual.dtype == dtype
        assert_matches(actual, exact)


@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 16), ((2, 2), 20), ((3, 1), 64), ((1, 1), 80), ((2, 1), 128)])
def test_heads_and_head_dims(heads, dim):
    dtype = DTYPES[0]
    layout, inputs, grad = make("ragged", heads, dim, dtype)
    for actual, exact in zip(run(inputs, layout, grad), oracle(inputs, layout, grad), strict=True):
        assert_matches(actual, exact)


def test_scale_and_large_scores():
    layout, (q, k, v), grad = make("ragged", (2, 1), dtype=DTYPES[0])
    inputs = [(x.detach() * factor).requires_grad_() for x, factor in ((q, 80), (k, 80), (v, 1))]
    assert (inputs[0][:, 0].float() @ inputs[1][:, 0].float().T).max() > 1e4
    assert_matches(run(inputs, layout, grad)[0], oracle(inputs, layout, grad)[0])
    for actual, exact in zip(
        run((q, k, v), layout, grad, scale=1.3), oracle((q, k, v), layout, grad, scale=1.3), strict=True
    ):
        assert_matches(actual, exact)


def test_views_of_other_layouts():
    """q, k and v as transformers hands them over, [heads, T, D]; ones that cannot be read as they are; a gradient
    broadcast from a sum."""
    layout, inputs, _ = make("ragged", dtype=DTYPES[0])
    moved = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    assert not moved[0].is_contiguous()
    grad = torch.ones(1, 1, 1, dtype=DTYPES[0], device=DEVICE).expand_as(inputs[0])
    for a, b in zip(run(moved, layout, grad), run(inputs, layout, grad.contiguous()), strict=True):
        assert torch.equal(a, b)
    ours = run([x[..., 3:15].detach().requires_grad_() for x in inputs], layout, grad[..., 3:15])  # unaligned, D 12
    whole = run([x[..., 3:15].contiguous().detach().requires_grad_() for x in inputs], layout, grad[..., 3:15])
    for a, b in zip(ours, whole, strict=True):
        assert torch.equal(a, b)
    spread = [x.detach().repeat_interleave(2, 2)[..., ::2].requires_grad_() for x in inputs]
    assert spread[0].stride(2) == 2
    for a, b in zip(run(spread, layout, grad), run(inputs, layout, grad.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_same_bits_again_and_in_poisoned_memory():
    layout, inputs, grad = make("ragged", dtype=DTYPES[0])
    first, again = run(inputs, layout, grad), run(inputs, layout, grad)
    with poisoned_memory():
        poisoned = run(inputs, layout, grad)
    for a, b, c in zip(first, again, poisoned, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_how_the_queries_are_split_changes_rounding_alone(monkeypatch):
    layout, inputs, grad = make("ragged", dtype=DTYPES[0])
    split = run(inputs, layout, grad)
    assert work.key_items(layout, 128 if CUDA else 16)[2] > 2
    monkeypatch.setattr(work, "LEAST_PART", 10**6)
    layout = PrefixLayout(layout.prompt_lengths, layout.completion_lengths, DEVICE)
    whole = run(inputs, layout, grad)
    assert work.key_items(layout, 128 if CUDA else 16)[2] == 0
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-3, atol=3e-3)


def test_a_completion_does_not_depend_on_its_neighbours():
    layout, inputs, _ = make("ragged", (2, 1), dtype=DTYPES[0])
    with torch.no_grad():
        before = prefix_attention(*inputs, layout, backend="triton")
        first, second = layout.completion_starts[0]
        inputs[1][second:] = torch.nan
        inputs[2][second:] = torch.nan
        after = prefix_attention(*inputs, layout, backend="triton")
    assert torch.equal(before[:second], after[:second])
    assert first < second


@pytest.mark.parametrize("dtype", HALF)
def test_no_worse_than_the_reference_at_its_dtype(dtype):
    """Plain torch in 16 bits: scores, probabilities and products rounded where a dense attention rounds them."""
    layout, inputs, grad = make("ragged", dim=32, dtype=dtype)
    exact = oracle(inputs, layout, grad)
    mask = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.bool, device=DEVICE)
    for prompt, completions in reference._segments(layout):
        for rows in (prompt, *completions):
            if rows is not prompt:
                mask[rows, prompt] = True
            mask[rows, rows] = torch.ones_like(mask[rows, rows]).tril()
    q, k, v = inputs
    scores = torch.einsum("qhd,khd->hqk", q * 32**-0.5, k.repeat_interleave(2, 1)).masked_fill(~mask, -torch.inf)
    dense = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1))
    plain = [dense, *torch.autograd.grad(dense, inputs, grad)]
    for ours, theirs, true in zip(run(inputs, layout, grad), plain, exact, strict=True):
        assert_no_worse(ours, theirs, true, terms=2 * (32 + layout.total_tokens))


def test_inference_needs_no_gradient():
    layout, inputs, _ = make("ragged", dtype=DTYPES[0])
    with torch.inference_mode():
        out = prefix_attention(*(x.detach() for x in inputs), layout, backend="triton")
    assert_matches(out, oracle(inputs, layout, out)[0])


def test_head_dims_that_the_kernels_do_not_have():
    layout = PrefixLayout([2], [[1]], DEVICE)
    q, k = torch.randn(3, 2, 144, device=DEVICE), torch.randn(3, 1, 144, device=DEVICE)
    message = error_of(lambda: prefix_attention(q, k, k, layout, backend="triton"))
    assert "q: expected a head dim of at most 128 for the triton backend, got 144" in message
    prefix_attention(q, k, k, layout)
    assert last_backend("prefix_attention") == "reference"


def test_fp32_on_a_card_takes_the_reference():
    assert chosen_backend("prefix_attention", "cuda", dtype=torch.float32) == "reference"
    assert chosen_backend("prefix_attention", "cuda", dtype=torch.bfloat16) == "triton"
    message = error_of(lambda: chosen_backend("prefix_attention", "cuda", "triton", torch.float32))
    assert "its kernels take bf16 and fp16 inputs, and an input is fp32" in message
