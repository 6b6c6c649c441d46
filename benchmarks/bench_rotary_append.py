"""rotary_append: rotary positions of one token a row, and the write of its keys and values into the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import dispatch, rotary_append
from videor1_kernels.rotary_append.reference import Places
from videor1_kernels.rotary_append.reference import rotary_append as reference

POSITIONS, CAPACITY = 4096, 768


@dataclass(frozen=True)
class Size:
    """R rows, Hq query and Hkv key heads of D."""

    model: str
    rows: int
    heads: tuple[int, int]
    dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Inputs:
    """qkv [R, (Hq + 2 Hkv) D], tables fp32 [P, D], caches [R, C, Hkv, D]: on a CPU with the heads outermost."""

    qkv: Tensor
    tables: tuple[Tensor, Tensor]
    caches: tuple[Tensor, Tensor]
    places: Places


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":  # the demonstration's model
        return [_case(Size("demo", 12, (4, 2), 32, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    return [_case(Size("Qwen2.5-VL-7B", rows, (28, 4), 128, torch.bfloat16)) for rows in (12, 192)]


def _case(size: Size) -> Case:
    described = {"model": size.model, "R": size.rows, "Hq": size.heads[0], "Hkv": size.heads[1], "D": size.dim}
    return Case(
        op="rotary_append",
        title="in a layer of a decode step",
        size=described | {"dtype": str(size.dtype).removeprefix("torch.")},
        dtype=size.dtype,
        inputs=functools.partial(_inputs, size),
        expected=_expected,
        work=lambda x: Work(0.0, 2 * (x.qkv.nbytes + 4 * size.rows * size.dim), ""),
        contenders=(
            Contender(OURS, lambda x: _step(_ours, x), graph=True),
            Contender(f"{OURS}, without its checks", _unchecked, graph=True),
            Contender("torch (our reference)", lambda x: _step(_reference, x)),
            Contender("torch (rotate_half, index_put)", lambda x: _step(_plain, x), graph=True),
            Contender("torch.compile of these", lambda x: _step(torch.compile(_plain), x), graph=True),
        ),
    )


def _inputs(size: Size, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    q_heads, kv_heads = size.heads

    def cache() -> Tensor:
        if device.type == "cpu":
            return torch.zeros(kv_heads, size.rows, CAPACITY, size.dim, dtype=size.dtype).movedim(0, -2)
        return torch.zeros(size.rows, CAPACITY, kv_heads, size.dim, dtype=size.dtype, device=device)

    width = (q_heads + 2 * kv_heads) * size.dim
    angles = torch.randn(POSITIONS, size.dim, generator=generator, device=device)
    rows = torch.arange(size.rows, device=device)
    return Inputs(
        torch.randn(size.rows, width, generator=generator, device=device).to(size.dtype),
        (angles.cos(), angles.sin()),
        (cache(), cache()),
        Places(37 * rows % POSITIONS, 1 + 53 * rows % CAPACITY, rows.flip(0)),
    )


def _ours(inputs: Inputs, k: Tensor, v: Tensor) -> Tensor:
    return rotary_append(inputs.qkv, *inputs.tables, k, v, **inputs.places._asdict())


def _unchecked(inputs: Inputs) -> Step:
    """As a decoder calls it, whose shapes are the same in every layer and step."""
    call = dispatch.resolve("rotary_append", "auto", inputs.qkv.device, inputs.qkv.dtype).rotary_append
    return _step(lambda x, k, v: call(x.qkv, *x.tables, k, v, x.places), inputs)


def _reference(inputs: Inputs, k: Tensor, v: Tensor) -> Tensor:
    return reference(inputs.qkv, *inputs.tables, k, v, inputs.places)


def _plain(inputs: Inputs, k: Tensor, v: Tensor) -> Tensor:
    """Without the checks of the reference, which wait for the device."""
    positions, lengths, slots = inputs.places
    kv_heads, dim = k.shape[2:]
    heads = inputs.qkv.unflatten(1, (-1, dim))
    cos, sin = (table[positions][:, None] for table in inputs.tables)
    rotated = (heads * cos + torch.cat([-heads[..., dim // 2 :], heads[..., : dim // 2]], -1) * sin).to(heads.dtype)
    k[slots, lengths - 1], v[slots, lengths - 1] = rotated[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
    return rotated[:, : -2 * kv_heads]


def _step(call: Callable[[Inputs, Tensor, Tensor], Tensor], inputs: Inputs) -> Step:
    k, v = inputs.caches
    _, lengths, slots = inputs.places

    def step() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"q": call(inputs, k, v), "suffix_k": k, "suffix_v": v}

    k[slots, lengths - 1], v[slots, lengths - 1] = 0, 0  # each writes them itself
    return step


def _expected(inputs: Inputs) -> list[Expected]:
    """The reference in fp64; errors are relative to the norm."""
    k, v = (torch.zeros_like(x, dtype=torch.float64) for x in inputs.caches)
    tables = (x.double() for x in inputs.tables)
    q = reference(inputs.qkv.double(), *tables, k, v, inputs.places)
    return [Expected(n, n, x.flatten(0, -2), gradient=True) for n, x in (("q", q), ("suffix_k", k), ("suffix_v", v))]


def test_rotary_append(run_case):
    run_case()
