"""prefix_attention against one dense masked softmax over the whole row, written apart from it, in fp64."""

import pytest
import torch

from videor1_kernels import PrefixLayout, prefix_attention
from videor1_kernels.prefix_attention import reference, softmax
from videor1_kernels.testing import LargestTensor, assert_matches, assert_no_worse, poisoned_memory

LAYOUTS = {
    "one completion": ([3], [[2]]),
    "ragged": ([4, 1, 6], [[3, 1, 5], [2, 2], [1]]),
    "no completion": ([3], [[]]),
    "some groups without": ([2, 5, 1], [[], [4, 1, 1, 2], []]),
    "single tokens": ([1, 1], [[1], [1, 1, 1]]),
    "equal lengths": ([5, 5], [[3, 3], [3, 3]]),
}


def naive(q, k, v, prompts, completions, scale=None):
    """T x T mask from the definition: token by token, who belongs to what."""
    owner = []  # (group, completion or -1 for the prompt, position inside it)
    for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        owner += [(group, -1, i) for i in range(prompt)]
        for c, length in enumerate(lengths):
            owner += [(group, c, i) for i in range(length)]

    def sees(a, b):
        if a[0] != b[0]:
            return False
        if a[1] == b[1]:
            return b[2] <= a[2]
        return b[1] == -1

    mask = torch.tensor([[sees(a, b) for b in owner] for a in owner])
    repeat = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    heads = []
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[:, head // repeat].T * scale).masked_fill(~mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, head // repeat])
    return torch.stack(heads, dim=1)


def make(layout, heads=(4, 2), dim=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return [
        torch.randn(layout.total_tokens, h, dim, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    ]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("heads", "scale"), [((4, 2), None), ((3, 3), None), ((4, 1), 0.3)])
def test_equals_dense_fp64(name, heads, scale):
    prompts, completions = LAYOUTS[name]
    layout = PrefixLayout(prompts, completions)
    inputs = make(layout, heads)
    ours, theirs = prefix_attention(*inputs, layout, scale=scale), naive(*inputs, prompts, completions, scale)
    assert_matches(ours, theirs)
    weight = torch.randn_like(ours)
    for which, a, b in zip(
        "qkv",
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        assert_matches(a, b, name=f"gradient of {which}")


def test_gradcheck():
    layout = PrefixLayout([2, 1], [[2, 1], [1]])
    inputs = make(layout, (2, 1), dim=2)
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, layout), inputs)


def test_equals_each_completion_by_itself():
    """What sharing must not change: a completion's outputs are those of causal attention over prompt + completion."""
    layout = PrefixLayout([5], [[3, 4]])
    q, k, v = make(layout)
    shared = prefix_attention(q, k, v, layout)
    repeated = (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    for start, length in zip(layout.completion_starts[0], layout.completion_lengths[0], strict=True):
        rows = torch.cat([torch.arange(5), torch.arange(start, start + length)])
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1) for x in repeated), is_causal=True
        ).transpose(0, 1)
        assert_matches(shared[rows], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_the_oracle(dtype):
    prompts, completions = LAYOUTS["ragged"]
    layout = PrefixLayout(prompts, completions)
    inputs = make(layout, dim=32, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = prefix_attention(*inputs, layout)
    plain, oracle = (naive(*x, prompts, completions) for x in (inputs, exact))
    assert ours.dtype == dtype
    assert_matches(ours, oracle)
    terms = 2 * (32 + layout.total_tokens)  # of a score and of a softmax; again in the gradients
    assert_no_worse(ours, plain, oracle, terms=terms)
    grads = (torch.autograd.grad(out.sum(), x) for out, x in ((ours, inputs), (plain, inputs), (oracle, exact)))
    for a, b, o in zip(*grads, strict=True):
        assert a.dtype == dtype
        assert_matches(a, o)
        assert_no_worse(a, b, o, terms=terms)


@pytest.mark.parametrize("block", [1, 2**28])
def test_devices_without_the_blocked_kernel(block, monkeypatch):
    """The path of other devices, with scores of one query at a time and of all at once."""
    layout = PrefixLayout(*LAYOUTS["ragged"])
    inputs = make(layout)
    ours = prefix_attention(*inputs, layout)
    gradients = torch.autograd.grad(ours.square().sum(), inputs)
    monkeypatch.setattr(softmax, "SCORE_BYTES", block)
    monkeypatch.setattr(softmax, "_blocked", lambda q: False)
    monkeypatch.setattr(softmax, "_flash", None)
    monkeypatch.setattr(softmax, "_flash_backward", None)
    plain = prefix_attention(*inputs, layout)
    assert_matches(plain, ours)
    for a, b in zip(torch.autograd.grad(plain.square().sum(), inputs), gradients, strict=True):
        assert_matches(a, b)


def test_large_scores():
    layout = PrefixLayout(*LAYOUTS["ragged"])
    q, k, v = make(layout, dtype=torch.float32)
    inputs = [(100 * q).detach().requires_grad_(), (100 * k).detach().requires_grad_(), v]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert (q[:, 0] @ k[:, 0].T).max() * 1e4 > 1e4
    assert_matches(prefix_attention(*inputs, layout), naive(*exact, *LAYOUTS["ragged"]))


def test_scores_are_computed_once(monkeypatch):
    """Every prompt once by itself and once by its completions together, not once per completion."""
    prompts, completions = [40, 7], [[10, 3, 10, 1], [5]]
    seen = []

    def counted(original):
        def call(*args, **kwargs):
            q, k = args[:2] if original is flash else args[1:3]
            seen.append(q.shape[-2] * k.shape[-2])
            return original(*args, **kwargs)

        return call

    flash, backward = softmax._flash, softmax._flash_backward
    monkeypatch.setattr(softmax, "_flash", counted(flash))
    monkeypatch.setattr(softmax, "_flash_backward", counted(backward))
    layout = PrefixLayout(prompts, completions)
    out = prefix_attention(*make(layout), layout)
    expected = sum(
        p * p + p * sum(group) + sum(c * c for c in group) for p, group in zip(prompts, completions, strict=True)
    )
    assert sum(seen) == expected
    out.sum().backward()
    assert sum(seen) == 2 * expected


def test_group_and_completion_order_does_not_matter():
    prompts, completions = LAYOUTS["ragged"]
    layout = PrefixLayout(prompts, completions)
    q, k, v = make(layout)
    out = prefix_attention(q, k, v, layout)
    order = [2, 0, 1]
    inner = [list(reversed(range(len(completions[g])))) for g in order]
    other = PrefixLayout(
        [prompts[g] for g in order], [[completions[g][c] for c in cs] for g, cs in zip(order, inner, strict=True)]
    )
    moved = []  # row position in the first layout of each token of the other
    for g, cs in zip(order, inner, strict=True):
        moved += range(layout.prompt_starts[g], layout.prompt_starts[g] + prompts[g])
        for c in cs:
            moved += range(layout.completion_starts[g][c], layout.completion_starts[g][c] + completions[g][c])
    assert sorted(moved) == list(range(layout.total_tokens))
    assert_matches(prefix_attention(q[moved], k[moved], v[moved], other), out[moved])


def test_no_mask_over_the_whole_row():
    layout = PrefixLayout([40] * 6, [[10] * 4] * 6)  # T = 480
    inputs = [x.detach() for x in make(layout, (2, 1), dim=4, dtype=torch.float32)]
    with LargestTensor() as seen:  # below the operator, inside of which the mode does not look
        out, lse = reference.forward(*inputs, layout, 0.5)
        reference.backward(torch.ones_like(out), *inputs, out, lse, layout, 0.5)
    assert layout.total_tokens < seen.numel < layout.total_tokens**2 // 8, seen.operation


def test_autocast_and_poisoned_memory_change_no_bit():
    prompts, completions = LAYOUTS["ragged"]
    layout = PrefixLayout(prompts, completions)
    inputs = make(layout, dtype=torch.float32)

    def once():
        out = prefix_attention(*inputs, layout)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    first = once()
    with poisoned_memory():
        second = once()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix_attention(*inputs, layout), first[0])


def test_layout_indices():
    layout = PrefixLayout(prompt_lengths=[3, 2], completion_lengths=[[2, 1], [3]])
    # Row: p p p a a b | p p c c c
    assert layout.total_tokens == 11
    assert layout.prompt_starts == (0, 6)
    assert layout.completion_starts == ((3, 5), (8,))
    assert layout.prompt_index.tolist() == [0, 1, 2, 6, 7]
    assert layout.completion_index.tolist() == [3, 4, 5, 8, 9, 10]
    assert layout.predict_index.tolist() == [2, 3, 2, 7, 8, 9]
    assert layout.cu_completions.tolist() == [0, 2, 3, 6]
    assert layout.cu_completions.dtype == torch.int32


def test_layout_without_completions():
    layout = PrefixLayout([2, 3], [[], []])
    assert layout.total_tokens == 5
    assert layout.completion_index.shape == layout.predict_index.shape == (0,)
    assert layout.completion_index.dtype == torch.int64
    assert layout.cu_completions.tolist() == [0]


def test_text_positions():
    layout = PrefixLayout([3, 2], [[2, 1], [3]])
    first = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 2]])
    second = torch.tensor([[0, 1], [0, 1], [0, 1]])
    positions = layout.text_positions([first, second], [3, 2])
    assert positions.shape == (3, 1, 11)
    assert positions.dtype == torch.int64
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 3, 4, 3, 0, 1, 2, 3, 4],
        [0, 1, 1, 3, 4, 3, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4],
    ]
    with pytest.raises(ValueError, match=r"prompt_positions\[1\]: expected shape \[3, 2\], got \[3, 3\]"):
        layout.text_positions([first, first], [3, 2])
    with pytest.raises(ValueError, match="expected 2 entries each, got 1 and 2"):
        layout.text_positions([first], [3, 2])


def test_layout_is_frozen_and_moves():
    layout = PrefixLayout([3], [[2]])
    with pytest.raises(AttributeError):
        layout.total_tokens = 7  # type: ignore[misc]
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.completion_index.device.type == moved.cu_completions.device.type == "meta"
    assert moved.total_tokens == 5


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "prompt_lengths: expected at least one group, got none"),
        ([3], [[2], [1]], "completion_lengths: expected 1 lists, one per prompt, got 2"),
        ([3, 0], [[2], [1]], r"prompt_lengths\[1\]: expected 1 or more, got 0"),
        ([3], [[2, 0]], r"completion_lengths\[0\]: expected lengths of 1 or more"),
    ],
)
def test_layout_errors(prompts, completions, message):
    with pytest.raises(ValueError, match=f"PrefixLayout: {message}"):
        PrefixLayout(prompts, completions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 4, 8)}, r"q: expected shape \[5, Hq, D\], got \[6, 4, 8\]"),
        ({"k": torch.zeros(4, 2, 8)}, r"k: expected shape \[5, 2, 8\], got \[4, 2, 8\]"),
        ({"k": torch.zeros(5, 3, 8)}, "k: expected a number of heads that divides the 4 of q, got 3"),
        ({"v": torch.zeros(5, 4, 8)}, r"v: expected shape \[5, 2, 8\], got \[5, 4, 8\]"),
        ({"k": torch.zeros(5, 2, 4)}, r"k: expected shape \[T, Hkv, 8\], got \[5, 2, 4\]"),
        ({"scale": 0.0}, "scale: expected a finite number above 0, got 0.0"),
        ({"layout": PrefixLayout([3], [[2]], "meta")}, r"layout: expected index tensors on cpu \(use layout.to\)"),
        ({"backend": "native"}, "backend 'native' cannot run on cpu"),
    ],
)
def test_errors(change, message):
    arguments = {"q": torch.zeros(5, 4, 8), "k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)}
    arguments |= {"layout": PrefixLayout([3], [[2]])} | change
    with pytest.raises(ValueError, match=f"prefix_attention: {message}"):
        prefix_attention(**arguments)
