"""prefix_attention: one group of a shared prompt and its completions, on the same packed row for all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from benchmarks.peers import missing
from benchmarks.step_flops import shared_pairs
from videor1_kernels import PrefixLayout, prefix_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """P prompt tokens, G completions of C tokens, Hq query heads, Hkv key heads, D head dim."""

    model: str
    prompt: int
    generations: int
    completion: int
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionInputs:
    """q [T, Hq, D], k, v [T, Hkv, D] of a packed row, which require gradients, and the gradient of the output."""

    size: Size
    layout: PrefixLayout
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        heads = {"Qwen2.5-VL-7B": (28, 4, 128), "Qwen2.5-VL-3B": (16, 2, 128), "Qwen3.5-9B": (16, 4, 256)}
        sizes = [
            Size(model, prompt, 8, 768, heads[model][:2], heads[model][2], torch.bfloat16)
            for model, prompt in (
                *(("Qwen2.5-VL-7B", 1224), ("Qwen2.5-VL-7B", 2248), ("Qwen2.5-VL-3B", 1224)),
                ("Qwen3.5-9B", 1224),
            )
        ]
    else:
        sizes = [
            Size("the demonstration's", 74, 8, 9, (4, 2), 32, torch.float32),
            Size("small", 96, 4, 48, (4, 2), 32, torch.float32),
            Size("medium", 306, 8, 192, (4, 2), 128, torch.float32),
            Size("medium in bf16", 306, 8, 192, (4, 2), 128, torch.bfloat16),
        ]
    return [_case(size, backward=backward) for size in sizes for backward in (False, True)]


def _case(size: Size, *, backward: bool) -> Case:
    described = {"model": size.model, "P": size.prompt, "G": size.generations, "C": size.completion}
    build = functools.partial(_step, backward=backward)
    return Case(
        op="prefix_attention",
        title="forward + backward" if backward else "forward",
        size=described,
        dtype=size.dtype,
        inputs=functools.partial(attention_inputs, size),
        expected=functools.partial(_expected, backward=backward),
        work=functools.partial(_work, backward=backward),
        contenders=(
            Contender(OURS, lambda x: build(x, functools.partial(prefix_attention, layout=x.layout))),
            Contender("torch SDPA in parts, merged", lambda x: build(x, _reference(x)), _reference_is_ours),
            Contender("torch SDPA, repeated rows", lambda x: build(x, _repeated(x)), does="every prompt G times"),
            Contender("torch SDPA, mask of the row", lambda x: build(x, _masked(x)), does="all T x T scores"),
            Contender("torch.compile FlexAttention, block mask", lambda x: build(x, _flex(x)), _flex_missing),
            Contender(
                "flash-attn varlen, repeated rows",
                lambda x: build(x, _flash_rows(x)),
                missing("flash-attn", "flash_attn", gpu=True),
                does="every prompt G times",
            ),
        ),
    )


def attention_inputs(size: Size, device: torch.device) -> AttentionInputs:
    layout = PrefixLayout([size.prompt], [[size.completion] * size.generations], device)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(layout.total_tokens, heads, size.head_dim, generator=generator, device=device).to(size.dtype)
        for heads in (size.heads[0], *[size.heads[1]] * 2, size.heads[0])
    )
    return AttentionInputs(size, layout, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)


def _step(inputs: AttentionInputs, attention: Attention, *, backward: bool) -> Step:
    leaves = (inputs.q, inputs.k, inputs.v)

    def forward() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"out": attention(*leaves)}

    def forward_backward() -> Mapping[str, Tensor]:
        out = attention(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, inputs.grad)
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

    return forward_backward if backward else forward


def _expected(inputs: AttentionInputs, *, backward: bool) -> Sequence[Expected]:
    """All of the outputs by the reference in fp64; errors relative to their norms."""
    exact = [x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = prefix_attention(*exact, inputs.layout, backend="reference")
    values = {"out": out.detach()}
    if backward:
        values |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, exact, inputs.grad.double()), strict=True))
    return [Expected(name, name, value.flatten(0, 1), gradient=True) for name, value in values.items()]


def _work(inputs: AttentionInputs, *, backward: bool) -> Work:
    """Two products of each pair of positions that see each other; five more in the backward pass."""
    size = inputs.size
    pairs = shared_pairs(size.prompt, [size.completion] * size.generations)
    flops = 4 * pairs * size.heads[0] * size.head_dim * (3.5 if backward else 1)
    moved = 2 * inputs.q.nbytes + inputs.k.nbytes + inputs.v.nbytes
    return Work(float(flops), float(moved * (3 if backward else 1)), "14 pairs Hq D" if backward else "4 pairs Hq D")


def _rows_of(inputs: AttentionInputs) -> Tensor:
    """int64 [G, P + C]: positions of the prompt and a completion."""
    size, layout = inputs.size, inputs.layout
    prompt = layout.prompt_index.expand(size.generations, -1)
    return torch.cat([prompt, layout.completion_index.view(size.generations, -1)], 1)


def _packed(rows: Tensor, prompt: int) -> Tensor:
    """[G, P + C, Hq, D] -> the packed row: the prompt of the first, and every completion."""
    return torch.cat([rows[0, :prompt], rows[:, prompt:].flatten(0, 1)])


def _reference(inputs: AttentionInputs) -> Attention:
    """The plain path, beside which the C++ is measured: ATen's kernel for each prompt and completion."""
    return functools.partial(prefix_attention, layout=inputs.layout, backend="reference")


def _reference_is_ours(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "on a GPU its scores are whole blocks"


def _repeated(inputs: AttentionInputs) -> Attention:
    index, prompt = _rows_of(inputs), inputs.size.prompt

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x[index].transpose(1, 2) for x in (q, k, v))
        return _packed(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2), prompt)

    return attention


def _sees(layout: PrefixLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """mask_mod of FlexAttention for a row of one group."""
    prompt = layout.prompt_lengths[0]
    owner = torch.zeros(layout.total_tokens, dtype=torch.int64, device=layout.device)
    owner[prompt:] = (
        torch.arange(len(layout.completion_lengths[0]), device=layout.device).repeat_interleave(
            torch.tensor(layout.completion_lengths[0], device=layout.device)
        )
        + 1
    )

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((key < prompt) | (owner[query] == owner[key]))

    return mask_mod


def _masked(inputs: AttentionInputs) -> Attention:
    position = torch.arange(inputs.layout.total_tokens, device=inputs.layout.device)
    nowhere = position.new_zeros(())
    mask = _sees(inputs.layout)(nowhere, nowhere, position[:, None], position[None, :])

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attention


def _flex(inputs: AttentionInputs) -> Attention:
    tokens = inputs.layout.total_tokens
    blocks = create_block_mask(_sees(inputs.layout), None, None, tokens, tokens, device=str(inputs.layout.device))
    compiled = torch.compile(flex_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return attention


def _flex_missing(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "FlexAttention has no backward pass on a CPU"


def _flash_rows(inputs: AttentionInputs) -> Attention:
    from flash_attn import flash_attn_varlen_func

    index, size = _rows_of(inputs), inputs.size
    length = index.shape[1]
    bounds = torch.arange(size.generations + 1, dtype=torch.int32, device=index.device) * length

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x[index.flatten()] for x in (q, k, v))
        out = flash_attn_varlen_func(*rows, bounds, bounds, length, length, causal=True)
        return _packed(out.unflatten(0, (size.generations, length)), size.prompt)

    return attention


def test_prefix_attention(run_case):
    run_case()
