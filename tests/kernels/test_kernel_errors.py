"""What every operation refuses, on every backend alike: before a kernel runs, and so with the same words.

Values that the losses, the linear head and tgrpo_advantages refuse are in test_loss_errors.py.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import videor1_kernels as vk

N, CU = torch.zeros(3), torch.tensor([0, 1, 3], dtype=torch.int32)
HEAD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3).long()}
LOSS = {"advantages": torch.zeros(2), "cu_seqlens": CU, "old_logp": N, "ref_logp": N}
GROUP = torch.zeros(2, 3)
FRAMES = torch.zeros(2, 28, 28, 3, dtype=torch.uint8)


def decode_arguments(dim: int = 16) -> dict[str, Any]:
    """Four rows of two prefixes of 5 and 2 tokens."""
    shapes = {"q": (4, 4, dim), "prefix_k": (7, 2, dim), "prefix_v": (7, 2, dim)}
    shapes |= {"suffix_k": (4, 6, 2, dim), "suffix_v": (4, 6, 2, dim)}
    index = {"suffix_lengths": [1, 4, 2, 3], "cu_prefix": [0, 5, 7], "row_group": [0, 0, 1, 1]}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | {
        name: torch.tensor(values) for name, values in index.items()
    }


GOOD: dict[str, dict[str, Any]] = {
    "linear_logprob": HEAD | {"bias": torch.zeros(5)},
    "selective_log_softmax": {"logits": torch.zeros(2, 4), "index": torch.zeros(2).long()},
    "grpo_loss": {"logp": N} | LOSS | {"mask": N == 0},
    "linear_grpo_loss": HEAD | LOSS | {"bias": torch.zeros(5)},
    "tgrpo_advantages": {
        "accuracy": GROUP,
        "format": GROUP,
        "lengths": GROUP,
        "shuffled_accuracy": torch.zeros(2, 2),
        "length_range": (3, 6),
    },
    "prefix_attention": {
        "q": torch.zeros(5, 4, 8),
        "k": torch.zeros(5, 2, 8),
        "v": torch.zeros(5, 2, 8),
        "layout": vk.PrefixLayout([3], [[2]]),
    },
    "prefix_decode_attention": decode_arguments(),
    "sample_tokens": {"logits": torch.zeros(2, 4), "uniform": torch.zeros(2), "banned": torch.tensor([1])},
    "frames_to_patches": {"frames": FRAMES, "size": (28, 28)},
}


def usable(op: str) -> list[str]:
    return [name for name, reason in vk.backends(op).items() if reason is None]


def error_of(op: str, arguments: dict[str, Any]) -> str:
    """Type and text of the error that a call raises, on each of its backends the same."""
    said = set()
    for backend in usable(op):
        with pytest.raises((ValueError, TypeError)) as error:
            getattr(vk, op)(**{"backend": backend} | arguments)
        said.add(f"{error.type.__name__}: {error.value}")
    assert len(said) == 1, said
    return said.pop()


@pytest.mark.parametrize("op", GOOD)
def test_the_arguments_that_errors_are_made_of_are_right(op: str) -> None:
    for backend in usable(op):
        with torch.no_grad():
            getattr(vk, op)(**GOOD[op], backend=backend)


TENSORS = [(op, name) for op in GOOD for name, value in GOOD[op].items() if isinstance(value, Tensor)]


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_tensors_of_a_wrong_type_dtype_shape_or_device(op: str, name: str) -> None:
    value = GOOD[op][name]

    def error(other: object) -> str:
        return error_of(op, GOOD[op] | {name: other})

    assert error([[0.0]]) == f"TypeError: {op}: {name}: expected a torch.Tensor, got list"
    assert f"ValueError: {op}: {name}: expected dtype " in error(value.to(torch.complex64))
    assert error(value[..., None, None]).startswith(f"ValueError: {op}: ")
    if name != "banned":  # of which there may be none
        assert error(value.new_zeros(0)).startswith(f"ValueError: {op}: ")
    if name != next(iter(GOOD[op])) and name != "cu_prefix":  # of the first the device is taken
        assert f"ValueError: {op}: {name}: expected " in error(value.to("meta"))


@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in TENSORS if GOOD[o][n].is_floating_point()])
def test_a_tangent(op: str, name: str) -> None:
    """No operation has a forward-mode derivative; each says so instead of returning a result without a tangent."""
    value = GOOD[op][name]

    def call(x: Tensor) -> Any:
        return getattr(vk, op)(**GOOD[op] | {name: x})

    message = rf"^{op}: {name}: expected a tensor without a tangent"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(call, (value,), (torch.ones_like(value),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        call(forward_ad.make_dual(value, torch.ones_like(value)))
    if op != "tgrpo_advantages":
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jacfwd(call)(value)


def parameters(kind: str) -> list[tuple[str, str]]:
    """(operation, parameter) of the type that the signature gives."""
    signatures = {op: inspect.signature(getattr(vk, op)).parameters for op in GOOD}
    return [(op, name) for op, found in signatures.items() for name in found if found[name].annotation == kind]


KINDS = ("float", "float | None", "float | Tensor", "int | None")
NUMBERS = [case for kind in KINDS for case in parameters(kind)]
ABOVE_0 = ("temperature", "top_p", "scale", "clip_low", "clip_high", "kl_clamp", "num_tokens", "max_completion_length")
READ_WITH = {"num_tokens": {"loss_type": "dapo"}, "max_completion_length": {"loss_type": "dr_grpo"}}


@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_numbers_that_are_none_or_out_of_range(op: str, name: str) -> None:
    default = inspect.signature(getattr(vk, op)).parameters[name].default
    for value in (math.nan, math.inf, "1", True, -1.0, *([] if default is None else [None])):
        if value == -1.0 and name in ("correct_above", "length_bonus"):
            continue
        assert f"{op}: {name}: expected " in error_of(op, GOOD[op] | READ_WITH.get(name, {}) | {name: value})


@pytest.mark.parametrize(("op", "name"), parameters("str"))
def test_choices_that_there_are_not(op: str, name: str) -> None:
    default = inspect.signature(getattr(vk, op)).parameters[name].default
    message = rf"^{op}: {name}: expected one of .*, got '{default}s' \(did you mean '{default}'\?\)"
    with pytest.raises(ValueError, match=message):
        getattr(vk, op)(**GOOD[op] | {name: f"{default}s"})


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def layout(starts: Tensor | None = None, slots: Tensor | None = None) -> vk.DecodeLayout:
    """That of the good arguments, placed elsewhere."""
    return vk.DecodeLayout(ids(0, 5, 7), ids(0, 0, 1, 1), starts, slots)


PLACED = {"cu_prefix": None, "row_group": None}
NO_HEADS = {"prefix_k": torch.zeros(7, 0, 16), "suffix_k": torch.zeros(4, 6, 0, 16)}
VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("prefix_attention", {"q": torch.zeros(6, 4, 8)}, r"q: expected shape \[5, Hq, D\], got \[6, 4, 8\]"),
    ("prefix_attention", {"k": torch.zeros(5, 3, 8)}, "k: expected a number of heads that divides the 4 of q, got 3"),
    ("prefix_attention", {"v": torch.zeros(5, 4, 8)}, r"v: expected shape \[5, 2, 8\], got \[5, 4, 8\]"),
    ("prefix_attention", {"k": torch.zeros(5, 2, 4)}, r"k: expected shape \[T, Hkv, 8\], got \[5, 2, 4\]"),
    ("prefix_attention", {"k": torch.zeros(5, 0, 8)}, "k: expected a number of heads that divides the 4 of q, got 0"),
    ("prefix_attention", {"q": torch.zeros(5, 0, 8)}, "q: expected at least one head of at least one entry"),
    ("prefix_attention", {"q": torch.zeros(5, 4, 0)}, "q: expected at least one head of at least one entry"),
    *(
        (op, READ_WITH.get(name, {}) | {name: 0}, f"{name}: expected a finite number above 0, got 0")
        for op, name in NUMBERS
        if (op, name) != ("sample_tokens", "temperature") and name in ABOVE_0
    ),
    ("prefix_attention", {"layout": vk.PrefixLayout([3], [[2]], "meta")}, "layout: expected index tensors on cpu"),
    ("prefix_attention", {"layout": ([3], [[2]])}, "layout: expected a PrefixLayout, got tuple"),
    ("prefix_decode_attention", {"q": torch.zeros(4, 0, 16)}, "q: expected at least one head of at least one entry"),
    ("prefix_decode_attention", {"q": torch.zeros(4, 3, 16)}, "prefix_k: expected a number of heads that divides"),
    ("prefix_decode_attention", NO_HEADS, "prefix_k: expected a number of heads that divides the 4 of q, got 0"),
    ("prefix_decode_attention", decode_arguments(0), "q: expected at least one head of at least one entry"),
    ("prefix_decode_attention", {"row_group": ids(0, 0, 1, 2)}, r"row_group: expected values in \[0, 2\), got 1 outs"),
    ("prefix_decode_attention", {"row_group": ids(0, 0, 1, -1)}, r"row_group: expected values in \[0, 2\), got 1 out"),
    ("prefix_decode_attention", {"cu_prefix": ids(0, 5, 5, 7)}, "cu_prefix: expected steps of 1 or more, got 5 then 5"),
    ("prefix_decode_attention", {"cu_prefix": ids(0, -1, 7)}, "cu_prefix: expected steps of 1 or more, got 0 then -1"),
    ("prefix_decode_attention", {"cu_prefix": ids(0, 5, 8)}, r"prefix_k: expected shape \[8, 2, 16\], got \[7, 2, 16"),
    ("prefix_decode_attention", {"cu_prefix": ids(0, 2**62, 2**63 - 1)}, "prefix_k: expected shape"),
    ("prefix_decode_attention", {"cu_prefix": ids(1, 5, 7)}, "cu_prefix: expected the first entry 0 and the last 7"),
    (
        "prefix_decode_attention",
        {"cu_prefix": None},
        "prefixes: expected cu_prefix and row_group, or layout, got row_g",
    ),
    ("prefix_decode_attention", PLACED, "prefixes: .* got none of them"),
    ("prefix_decode_attention", {"layout": layout()}, "cu_prefix and row_group and layout"),
    ("prefix_decode_attention", PLACED | {"layout": layout(ids(0, 6))}, "prefix_k: expected at least the 8 tokens"),
    ("prefix_decode_attention", PLACED | {"layout": layout(ids(2**62, 0))}, r"prefix_k: expected at least the \d+ tok"),
    (
        "prefix_decode_attention",
        PLACED | {"layout": layout(None, ids(0, 1, 2, 4))},
        "suffix_k: expected at least the 5",
    ),
    ("prefix_decode_attention", PLACED | {"layout": layout(None, ids(0, 1, 2, 2**40))}, r"suffix_k: expected at least"),
    ("sample_tokens", {"logits": torch.zeros(2, 0)}, r"logits: expected at least one token, got \[2, 0\]"),
    (
        "sample_tokens",
        {"logits": torch.zeros(2, 4).long()},
        "logits: expected dtype float64, float32, bfloat16 or floa",
    ),
    (
        "sample_tokens",
        {"uniform": torch.zeros(2).half()},
        "uniform: expected dtype float32 or float64, got torch.float",
    ),
    (
        "sample_tokens",
        {"banned": ids(1, 4)},
        r"banned: expected values in \[0, 4\), got 1 outside, the first of them 4",
    ),
    ("sample_tokens", {"banned": ids(-1)}, r"banned: expected values in \[0, 4\), got 1 outside, the first of them -1"),
    ("sample_tokens", {"banned": ids(3, 1, 0, 2)}, "banned: expected at least one token that is not banned, got all 4"),
    ("sample_tokens", {"banned": ids(*range(4)).repeat(3)}, "banned: expected at least one token that is not banned"),
    ("sample_tokens", {"top_p": 0}, "top_p: expected a finite number above 0, got 0"),
    ("sample_tokens", {"top_p": 1.01}, "top_p: expected a number of at most 1, got 1.01"),
    ("sample_tokens", {"top_k": -1}, "top_k: expected an int of 0 or more, got -1"),
    ("sample_tokens", {"top_k": 2.0}, "top_k: expected an int of 0 or more, got 2.0"),
    ("sample_tokens", {"top_k": True}, "top_k: expected an int of 0 or more, got True"),
    ("frames_to_patches", {"frames": FRAMES.movedim(3, 1)}, r"frames: expected shape \[F, height, width, 3\]"),
    ("frames_to_patches", {"frames": FRAMES[0]}, r"frames: expected shape \[F, height, width, 3\]"),
    *(
        ("frames_to_patches", {"frames": FRAMES[cut]}, "frames: expected at least one frame of at least one pixel")
        for cut in (slice(0), (slice(None), slice(0)), (slice(None), slice(None), slice(0)))
    ),
    *(
        ("frames_to_patches", {"size": size}, r"size: expected \(height, width\), positive multiples of 28")
        for size in ((28, 30), (27, 28), (0, 28), (28, 0), (-28, 28), (28,), (2**63, 28))
    ),
    ("frames_to_patches", {"size": (28, 28 * 2**40)}, r"size: expected sides below 2\^30 pixels"),
    *(
        ("frames_to_patches", {"permutation": order}, r"permutation: expected each of 0\.\.1 once")
        for order in ([0, 0], [0], [1, 2], ids(0, 0))
    ),
    ("frames_to_patches", {"dtype": torch.int32}, "dtype: expected float32, bfloat16"),
    ("frames_to_patches", {"rotation": 45}, "rotation: expected a multiple of 90 degrees"),
    ("frames_to_patches", {"both": True}, "permutation: expected an order of the 2 frames, with both=True"),
]


@pytest.mark.parametrize(("op", "change", "message"), VALUES)
def test_values(op: str, change: dict[str, Any], message: str) -> None:
    assert re.search(rf"^(ValueError|TypeError): {op}: .*{message}", error_of(op, GOOD[op] | change))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        (ids(1, 0, 2, 3), 6, "values from 1 to C = 6, got 0 to 3"),
        (ids(1, 7, 2, 3), 6, "values from 1 to C = 6, got 1 to 7"),
        (ids(1, -1, 2, 3), 6, "values from 1 to C = 6, got -1 to 3"),
        (ids(1, 1, 1, 1), 0, "values from 1 to C = 0, got 1 to 1"),
    ],
)
def test_lengths_of_suffixes(backend: str, lengths: Tensor, capacity: int, message: str) -> None:
    """But for Triton, which does not wait for them."""
    if backend not in usable("prefix_decode_attention"):
        pytest.skip("it cannot run here")
    suffixes = {name: torch.zeros(4, capacity, 2, 16) for name in ("suffix_k", "suffix_v")}
    with pytest.raises(ValueError, match=f"^prefix_decode_attention: suffix_lengths: expected {message}"):
        vk.prefix_decode_attention(**decode_arguments() | suffixes | {"suffix_lengths": lengths}, backend=backend)


@pytest.mark.parametrize(("name", "values"), [("prefix_starts", ids(-1, 2)), ("suffix_slots", ids(0, 1, -2, 3))])
def test_places_below_0(name: str, values: Tensor) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -"):
        vk.DecodeLayout(ids(0, 5, 7), ids(0, 0, 1, 1), **{name: values})


CANNOT = {
    "linear_logprob": [("native", {}, "on cpu: this version of videor1_kernels has no native implementation of it")],
    "sample_tokens": [("native", {}, "backend 'native' cannot run on cpu")],
    "prefix_attention": [
        ("native", {x: torch.zeros(5, 2, 8).double() for x in "qkv"}, "backend 'native' cannot run on cpu"),
        ("triton", {x: torch.zeros(5, 2, 144) for x in "qkv"}, "q: expected a head dim of at most 128 for the triton"),
    ],
    "prefix_decode_attention": [
        ("native", decode_arguments(8), "q: expected a head dim that 16 divides for the native backend, got 8"),
        ("triton", decode_arguments(144), "q: expected a head dim of at most 128 for the triton backend, got 144"),
        *(
            (backend, {"q": torch.zeros(4, 4, 16, requires_grad=True)}, f"requires a gradient for the {backend} back")
            for backend in ("native", "triton")
        ),
        ("triton", {x: torch.zeros(4, 0, 2, 16) for x in ("suffix_k", "suffix_v")}, "suffix_k: expected room for the"),
    ],
}


@pytest.mark.parametrize(("op", "backend", "change", "message"), [(op, *row) for op in CANNOT for row in CANNOT[op]])
def test_what_a_backend_cannot_do(op: str, backend: str, change: dict[str, Any], message: str) -> None:
    if op == "prefix_decode_attention" and backend not in usable(op):
        pytest.skip("it cannot run here")
    with pytest.raises(ValueError, match=rf"^{op}: .*{message}"):
        getattr(vk, op)(**GOOD[op] | change, backend=backend)


@pytest.mark.parametrize("op", [op for op in GOOD if op != "frames_to_patches"])  # which has no such kernel
def test_triton_refuses_fp64(op: str) -> None:
    double = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in GOOD[op].items()}
    with pytest.raises(ValueError, match=rf"^{op}: backend 'triton' cannot run .*, and an input is fp64"):
        getattr(vk, op)(**double, backend="triton")
