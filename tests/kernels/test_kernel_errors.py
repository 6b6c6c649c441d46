"""What every operation refuses, on every backend alike: before a kernel runs, and so with the same words."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import videor1_kernels as vk

N, CU = torch.zeros(3), torch.tensor([0, 1, 3], dtype=torch.int32)
HEAD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3).long()}
LOSS = {"advantages": torch.zeros(2), "cu_seqlens": CU, "old_logp": N, "ref_logp": N, "rollout_logp": N} | {
    "token_weight": N,
    "importance_weight": N,
    "completion_mask": torch.zeros(2) == 0,
}
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


DELTA = {
    "q": torch.zeros(5, 2, 8),
    "k": torch.zeros(5, 2, 8),
    "v": torch.zeros(5, 4, 6),
    "g": torch.zeros(5, 4),
    "beta": torch.zeros(5, 4),
}
FILTER = {"weight": torch.zeros(6, 4), "bias": torch.zeros(6)}

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
    "add_rms_norm": {"x": torch.zeros(2, 4), "weight": torch.zeros(4), "residual": torch.zeros(2, 4)},
    "rotary_append": {
        "qkv": torch.zeros(2, 8 * 4),
        "cos": torch.zeros(9, 4),
        "sin": torch.zeros(9, 4),
        "suffix_k": torch.zeros(3, 5, 2, 4),
        "suffix_v": torch.zeros(3, 5, 2, 4),
        "positions": torch.tensor([8, 0]),
        "suffix_lengths": torch.tensor([5, 1]),
        "suffix_slots": torch.tensor([2, 0]),
    },
    "silu_mul": {"gate_up": torch.zeros(2, 8), "inner": torch.zeros(2, 6), "b": torch.zeros(8, 3)},
    "sigmoid_mul": {"x": torch.zeros(2, 8), "gate": torch.zeros(2, 8)},
    "gated_rms_norm": {"x": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 3, 4), "weight": torch.zeros(4)},
    "prefix_gated_delta": DELTA | {"layout": vk.PrefixLayout([3], [[2]])},
    "prefix_causal_conv": {"x": torch.zeros(5, 6)} | FILTER | {"layout": vk.PrefixLayout([3], [[2]])},
    "gated_delta_step": DELTA | {"state": torch.zeros(7, 4, 8, 6), "slots": torch.tensor([6, 0, 2, 1, 5])},
    "causal_conv_step": {"x": torch.zeros(5, 6), "state": torch.zeros(7, 6, 3)}
    | FILTER
    | {"slots": torch.tensor([6, 0, 2, 1, 5])},
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
ABOVE_0 = ("temperature", "scale", "clip_low", "clip_high", "kl_clamp", "num_tokens", "max_completion_length")
ABOVE_0 += ("delta", "correction_max", "sapo_temperature_pos", "sapo_temperature_neg")
ABOVE_0 += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
READ_WITH = {"num_tokens": {"loss_type": "dapo"}, "max_completion_length": {"loss_type": "dr_grpo"}}


@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_numbers_that_are_none_or_out_of_range(op: str, name: str) -> None:
    parameter = inspect.signature(getattr(vk, op)).parameters[name]
    may_be_none = parameter.default is None or parameter.annotation == "float | None"
    for value in (math.nan, math.inf, "1", True, -1.0, *([] if may_be_none else [None])):
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


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


PLACED = {"cu_prefix": None, "row_group": None}
NO_HEADS = {"prefix_k": zeros(7, 0, 16), "suffix_k": zeros(4, 6, 0, 16)}
FLOATS = "expected dtype float64, float32, bfloat16 or float16, got torch.int64"
Values = list[tuple[dict[str, Any], str]]
EMPTY = (FRAMES[:0], FRAMES[:, :0], FRAMES[:, :, :0])
NO_SIZES = ((28, 30), (27, 28), (0, 28), (28, 0), (-28, 28), (28,), (2**63, 28))
NO_ORDERS = ([0, 0], [0], [1, 2], ids(0, 0))
OF_HEAD: Values = [
    ({"labels": ids(0, 0, 0, 0)}, "labels: expected shape [3], got [4]"),
    ({"labels": zeros(3).int()}, "labels: expected dtype int64, got torch.int32"),
    ({"weight": zeros(5, 3)}, "weight: expected shape [V, 4], got [5, 3]"),
    ({"bias": zeros(4)}, "bias: expected shape [5], got [4]"),
    ({"temperature": torch.ones(2)}, "temperature: expected shape [3], got [2]"),
]
OF_LOSS: Values = [
    ({"advantages": zeros(3)}, "advantages: expected shape [2], got [3]"),
    ({"advantages": ids(0, 0)}, f"advantages: {FLOATS}"),
    ({"cu_seqlens": ids(0, 2, 4)}, "cu_seqlens: expected the first entry 0 and the last 3, got 0 and 4"),
    ({"old_logp": zeros(2)}, "old_logp: expected shape [3], got [2]"),
    ({"ref_logp": zeros(4)}, "ref_logp: expected shape [3], got [4]"),
    ({"rollout_logp": zeros(4)}, "rollout_logp: expected shape [3], got [4]"),
    ({"token_weight": zeros(2)}, "token_weight: expected shape [3], got [2]"),
    ({"completion_mask": zeros(3) == 0}, "completion_mask: expected shape [2], got [3]"),
    (
        {"importance_correction": "token", "rollout_logp": None, "importance_weight": None},
        "rollout_logp: expected a tensor [3], as importance_correction is 'token', got None",
    ),
    ({"importance_correction": "token"}, "importance_weight: expected None, as importance_correction 'token' forms it"),
    ({"correction_min": 3.0}, "correction_min: expected at most correction_max, 2, got 3.0"),
    ({"loss_type": "cispo", "num_tokens": 1, "delta": 2.0}, "delta: expected None, as loss_type 'cispo' has no such"),
    ({"loss_type": "sapo", "clip_low": 0.2}, "clip_low: expected None, as loss_type 'sapo' has no such bound, got 0.2"),
    ({"loss_type": "vespo"}, "num_tokens: expected the tokens of the whole accumulated batch, as loss_type is 'vespo'"),
    (
        {"loss_type": "vespo", "num_tokens": 1, "importance_level": "sequence"},
        "importance_level: expected 'token' (or no correction), as vespo's weight is that of a whole completion",
    ),
    ({"use_bias_correction_kl": 1}, "use_bias_correction_kl: expected True or False, got 1"),
    ({"clip_dual": 1.0}, "clip_dual: expected a finite number above 1, got 1.0"),
]
OF_DELTA: Values = [
    ({"q": zeros(5, 0, 8)}, "q: expected at least one head of at least one entry"),
    ({"q": zeros(5, 2, 0)}, "q: expected at least one head of at least one entry"),
    ({"k": zeros(5, 1, 8)}, "k: expected shape [5, 2, 8], got [5, 1, 8]"),
    ({"v": zeros(5, 3, 6)}, "Hv a multiple of the 2 heads of q, got [5, 3, 6]"),
    ({"v": zeros(5, 0, 6)}, "Hv a multiple of the 2 heads of q, got [5, 0, 6]"),
    ({"v": zeros(5, 4, 0)}, "Hv a multiple of the 2 heads of q, got [5, 4, 0]"),
    ({"g": zeros(5, 2)}, "g: expected shape [5, 4], got [5, 2]"),
    ({"beta": zeros(4, 4)}, "beta: expected shape [5, 4], got [4, 4]"),
    ({"use_qk_l2norm": 1}, "use_qk_l2norm: expected True or False, got 1"),
]
OF_FILTER: Values = [
    ({"x": zeros(5, 0)}, "x: expected at least one channel, got [5, 0]"),
    ({"weight": zeros(5, 4)}, "weight: expected shape [6, K], got [5, 4]"),
    ({"weight": zeros(6, 0)}, "weight: expected a filter of at least one input, got [6, 0]"),
    ({"bias": zeros(4)}, "bias: expected shape [6], got [4]"),
    ({"activation": "gelu"}, "activation: expected one of 'none', 'silu', got 'gelu'"),
]
OF_PLACES: Values = [
    ({"layout": vk.PrefixLayout([3], [[2]], "meta")}, "layout: expected index tensors on cpu"),
    ({"layout": ([3], [[2]])}, "layout: expected a PrefixLayout, got tuple"),
    ({"return_states": None}, "return_states: expected True or False, got None"),
]
VALUES: dict[str, Values] = {
    "linear_logprob": OF_HEAD,
    "linear_grpo_loss": [
        ({"hidden": zeros(1, 3, 4)}, "hidden: expected shape [N, H], got [1, 3, 4]"),
        *OF_HEAD,
        *OF_LOSS,
    ],
    "grpo_loss": [
        ({"entropy_coef": 0.1}, "entropy_coef: expected 0, as log-probs show no distribution"),
        ({"mask": torch.ones(3)}, "mask: expected dtype bool"),
        ({"mask": zeros(2) == 0}, "mask: expected shape [3], got [2]"),
        *OF_LOSS,
    ],
    "selective_log_softmax": [
        ({"index": ids(0, 1, 2)}, "index: expected shape [2] or [2, K], got [3]"),
        ({"index": ids(0, 1)[:, None, None]}, "index: expected shape [2] or [2, K], got [2, 1, 1]"),
        (
            {"index": ids(0, 1, 2, -1).view(2, 2)},
            "index: expected values in [0, 4), got 1 outside, the first of them -1",
        ),
    ],
    "tgrpo_advantages": [
        ({"format": zeros(2, 4)}, "format: expected shape [2, 3], got [2, 4]"),
        ({"lengths": zeros(3, 2)}, "lengths: expected shape [2, 3], got [3, 2]"),
        ({"lengths": GROUP > 0}, "lengths: expected dtype int64"),
        ({"shuffled_accuracy": zeros(3, 2)}, "shuffled_accuracy: expected shape [2, Gs], got [3, 2]"),
        (
            {"batch_std": zeros(2)},
            'batch_std: expected None unless normalize is "batch", got a tensor with normalize "std"',
        ),
        ({"batch_std": zeros(3), "normalize": "batch"}, "batch_std: expected shape [2], got [3]"),
        ({"correct_above": zeros(3)}, "correct_above: expected shape [2], got [3]"),
        ({"correct_above": zeros(2) / 0}, "correct_above: expected finite values, got others"),
        ({"batch_std": zeros(2) - 1, "normalize": "batch"}, "batch_std: expected finite values of 0 or more"),
    ],
    "prefix_attention": [
        ({"q": zeros(6, 4, 8)}, "q: expected shape [5, Hq, D], got [6, 4, 8]"),
        ({"k": zeros(5, 3, 8)}, "k: expected a number of heads that divides the 4 of q, got 3"),
        ({"v": zeros(5, 4, 8)}, "v: expected shape [5, 2, 8], got [5, 4, 8]"),
        ({"k": zeros(5, 2, 4)}, "k: expected shape [T, Hkv, 8], got [5, 2, 4]"),
        ({"k": zeros(5, 0, 8)}, "k: expected a number of heads that divides the 4 of q, got 0"),
        ({"q": zeros(5, 0, 8)}, "q: expected at least one head of at least one entry"),
        ({"q": zeros(5, 4, 0)}, "q: expected at least one head of at least one entry"),
        ({"layout": vk.PrefixLayout([3], [[2]], "meta")}, "layout: expected index tensors on cpu"),
        ({"layout": ([3], [[2]])}, "layout: expected a PrefixLayout, got tuple"),
    ],
    "prefix_decode_attention": [
        ({"q": zeros(4, 0, 16)}, "q: expected at least one head of at least one entry"),
        ({"q": zeros(4, 3, 16)}, "prefix_k: expected a number of heads that divides"),
        (NO_HEADS, "prefix_k: expected a number of heads that divides the 4 of q, got 0"),
        (decode_arguments(0), "q: expected at least one head of at least one entry"),
        ({"row_group": ids(0, 0, 1, 2)}, "row_group: expected values in [0, 2), got 1 outside"),
        ({"row_group": ids(0, 0, 1, -1)}, "row_group: expected values in [0, 2), got 1 outside"),
        ({"cu_prefix": ids(0, 5, 5, 7)}, "cu_prefix: expected steps of 1 or more, got 5 then 5"),
        ({"cu_prefix": ids(0, -1, 7)}, "cu_prefix: expected steps of 1 or more, got 0 then -1"),
        ({"cu_prefix": ids(0, 5, 8)}, "prefix_k: expected shape [8, 2, 16], got [7, 2, 16]"),
        ({"cu_prefix": ids(0, 2**62, 2**63 - 1)}, "prefix_k: expected shape"),
        ({"cu_prefix": ids(1, 5, 7)}, "cu_prefix: expected the first entry 0 and the last 7"),
        ({"cu_prefix": None}, "prefixes: expected cu_prefix and row_group, or layout, got row_group"),
        (PLACED, "got none of them"),
        ({"layout": layout()}, "cu_prefix and row_group and layout"),
        (PLACED | {"layout": layout(ids(0, 6))}, "prefix_k: expected at least the 8 tokens"),
        (PLACED | {"layout": layout(ids(2**62, 0))}, f"prefix_k: expected at least the {2**62 + 5} tokens"),
        (PLACED | {"layout": layout(None, ids(0, 1, 2, 4))}, "suffix_k: expected at least the 5"),
        (PLACED | {"layout": layout(None, ids(0, 1, 2, 2**40))}, "suffix_k: expected at least"),
    ],
    "sample_tokens": [
        ({"logits": zeros(2, 0)}, "logits: expected at least one token, got [2, 0]"),
        ({"logits": zeros(2, 4).long()}, f"logits: {FLOATS}"),
        ({"uniform": zeros(2).half()}, "uniform: expected dtype float32 or float64, got torch.float"),
        ({"banned": ids(1, 4)}, "banned: expected values in [0, 4), got 1 outside, the first of them 4"),
        ({"banned": ids(-1)}, "banned: expected values in [0, 4), got 1 outside, the first of them -1"),
        ({"banned": ids(3, 1, 0, 2)}, "banned: expected at least one token that is not banned, got all 4"),
        ({"banned": ids(*range(4)).repeat(3)}, "banned: expected at least one token that is not banned"),
        ({"top_p": 0}, "top_p: expected a finite number above 0, got 0"),
        ({"top_p": 1.01}, "top_p: expected a number of at most 1, got 1.01"),
        *(({"top_k": k}, f"top_k: expected an int of 0 or more, got {k}") for k in (-1, 2.0, True)),
    ],
    "frames_to_patches": [
        ({"frames": FRAMES.movedim(3, 1)}, "frames: expected shape [F, height, width, 3]"),
        ({"frames": FRAMES[0]}, "frames: expected shape [F, height, width, 3]"),
        *(({"frames": x}, "frames: expected at least one frame of at least one pixel") for x in EMPTY),
        *(({"size": size}, "size: expected (height, width), positive multiples of 28") for size in NO_SIZES),
        ({"patch_size": 16}, "size: expected (height, width), positive multiples of 32, got (28, 28)"),
        ({"patch_size": 15}, "patch_size: expected 14 or 16, got 15"),
        ({"size": (28, 28 * 2**40)}, "size: expected sides below 2^30 pixels"),
        *(({"permutation": order}, "permutation: expected each of 0..1 once") for order in NO_ORDERS),
        ({"dtype": torch.int32}, "dtype: expected float32, bfloat16"),
        ({"rotation": 45}, "rotation: expected a multiple of 90 degrees"),
        ({"both": True}, "permutation: expected an order of the 2 frames, with both=True"),
    ],
    "add_rms_norm": [
        ({"x": zeros(2, 0)}, "x: expected at least one entry in a row, got [2, 0]"),
        ({"weight": zeros(3)}, "weight: expected shape [4], got [3]"),
        ({"residual": zeros(1, 4)}, "residual: expected shape [2, 4], got [1, 4]"),
    ],
    "silu_mul": [
        ({"gate_up": zeros(2, 7)}, "gate_up: expected an even number of columns, gate then up, got 7"),
        ({"b": None}, "b: expected both of inner and b, or neither, got None"),
        ({"inner": None}, "inner: expected both of inner and b, or neither, got None"),
        ({"b": zeros(4, 3)}, "b: expected shape [8, r], got [4, 3]"),
        ({"inner": zeros(2, 3)}, "inner: expected shape [2, 6], got [2, 3]"),
        ({"inner": zeros(2, 6).half()}, "inner: expected dtype float32, got torch.float16"),
    ],
    "sigmoid_mul": [
        ({"gate": zeros(2, 7)}, "gate: expected shape [2, 8], got [2, 7]"),
        ({"gate": zeros(2, 8).half()}, "gate: expected dtype float32, got torch.float16"),
    ],
    "gated_rms_norm": [
        ({"x": zeros(2, 3, 0)}, "x: expected at least one entry in a head, got [2, 3, 0]"),
        ({"gate": zeros(2, 4, 3)}, "gate: expected shape [2, 3, 4], got [2, 4, 3]"),
        ({"weight": zeros(3)}, "weight: expected shape [4], got [3]"),
    ],
    "prefix_gated_delta": [
        ({"q": zeros(4, 2, 8)}, "q: expected shape [5, Hk, Dk], got [4, 2, 8]"),
        *OF_DELTA,
        *OF_PLACES,
    ],
    "prefix_causal_conv": [({"x": zeros(4, 6)}, "x: expected shape [5, C], got [4, 6]"), *OF_FILTER, *OF_PLACES],
    "gated_delta_step": [
        *OF_DELTA,
        ({"state": zeros(7, 4, 6, 8)}, "state: expected shape [S, 4, 8, 6], got [7, 4, 6, 8]"),
        ({"state": zeros(7, 4, 8, 6).half()}, "state: expected dtype float64 or float32, got torch.float16"),
        ({"state": zeros(7, 4, 6, 8).mT}, "state: expected the numbers of a slot side by side"),
        ({"slots": ids(0, 1)}, "slots: expected shape [5], got [2]"),
        ({"slots": None, "state": zeros(4, 4, 8, 6)}, "state: expected a slot for each of the 5 rows, or slots, got 4"),
    ],
    "causal_conv_step": [
        *OF_FILTER,
        ({"state": zeros(7, 6, 4)}, "state: expected shape [S, 6, 3], got [7, 6, 4]"),
        ({"state": zeros(7, 6, 3).half()}, "state: expected dtype float32, got torch.float16"),
        ({"state": zeros(7, 3, 6).mT}, "state: expected the numbers of a slot side by side"),
        ({"slots": ids(0, 1)}, "slots: expected shape [5], got [2]"),
        ({"slots": None, "state": zeros(4, 6, 3)}, "state: expected a slot for each of the 5 rows, or slots, got 4"),
    ],
    "rotary_append": [
        *(({"qkv": zeros(2, n)}, "qkv: expected q of a multiple of 2 heads of 4") for n in (33, 28, 16)),
        ({"qkv": zeros(2, 32).bfloat16()}, "suffix_k: expected dtype bfloat16, got torch.float32"),
        *(({"suffix_k": zeros(3, 5, *n)}, "suffix_k: expected at least one head of an even") for n in ((0, 4), (2, 3))),
        ({"suffix_v": zeros(3, 4, 2, 4)}, "suffix_v: expected shape [3, 5, 2, 4]"),
        ({"suffix_v": zeros(3, 5, 4, 2).transpose(2, 3)}, "suffix_v: expected the entries of a head side by side"),
        *(
            ({"cos": zeros(9, n)}, f"cos: expected an even number of columns from 2 to the head's 4, got {n}")
            for n in (0, 3, 6)
        ),
        ({"cos": zeros(9, 2)}, "sin: expected shape [9, 2], got [9, 4]"),
        ({"sin": zeros(8, 4)}, "sin: expected shape [9, 4], got [8, 4]"),
        ({"positions": ids(1, 2, 3)}, "positions: expected shape [2], got [3]"),
        ({"unit_offset": True}, "unit_offset: expected q_norm and k_norm with it, got neither"),
        ({"q_norm": zeros(4)}, "q_norm: expected both q_norm and k_norm, or neither"),
        ({"q_norm": zeros(4), "k_norm": zeros(3)}, "k_norm: expected shape [4], got [3]"),
        ({"q_norm": zeros(4), "k_norm": zeros(4), "eps": -1.0}, "eps: expected a finite number of 0 or more"),
        (
            {"suffix_slots": None, "suffix_k": zeros(1, 5, 2, 4), "suffix_v": zeros(1, 5, 2, 4)},
            "suffix_k: expected a slot for each of the 2 rows, or suffix_slots, got 1",
        ),
    ],
}
for op, name in NUMBERS:
    if (op, name) != ("sample_tokens", "temperature") and name in ABOVE_0:
        zero = READ_WITH.get(name, {}) | {name: 0}
        VALUES[op] = [*VALUES[op], (zero, f"{name}: expected a finite number above 0, got 0")]


@pytest.mark.parametrize(("op", "change", "message"), [(op, *row) for op in VALUES for row in VALUES[op]])
def test_values(op: str, change: dict[str, Any], message: str) -> None:
    error = error_of(op, GOOD[op] | change)
    assert error.startswith((f"ValueError: {op}: ", f"TypeError: {op}: "))
    assert message in error


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


NO_GRADIENT = [
    (op, name)
    for op in (
        *("add_rms_norm", "rotary_append", "silu_mul", "sigmoid_mul", "gated_rms_norm"),
        *("gated_delta_step", "causal_conv_step"),
    )
    for name, value in GOOD[op].items()
    if value.is_floating_point()
]


@pytest.mark.parametrize(("op", "name"), NO_GRADIENT)
def test_what_has_no_gradient(op: str, name: str) -> None:
    leaf = GOOD[op] | {name: GOOD[op][name].clone().requires_grad_()}
    assert f"ValueError: {op}: {name}: expected a tensor that requires no gradient" in error_of(op, leaf)
    with torch.no_grad():
        getattr(vk, op)(**leaf)


CANNOT = {
    "add_rms_norm": [
        ("native", {"x": torch.zeros(2, 4).half()}, "it takes fp32 and bf16, and an input is torch.float16")
    ],
    "rotary_append": [
        ("native", {"cos": torch.zeros(9, 4).half()}, "it takes fp32 and bf16, and an input is torch.flo")
    ],
    "silu_mul": [("native", {}, "backend 'native' cannot run on cpu")],
    "sigmoid_mul": [("native", {}, "backend 'native' cannot run on cpu")],
    "gated_rms_norm": [
        ("native", {"weight": torch.zeros(4).half()}, "it takes fp32 and bf16, and an input is torch.float16")
    ],
    "prefix_gated_delta": [("fla", {}, "backend 'fla' cannot run on cpu: it needs CUDA tensors")],
    "prefix_causal_conv": [("fla", {}, "backend 'fla' cannot run on cpu: it needs CUDA tensors")],
    "linear_logprob": [("native", {}, "on cpu: this version of videor1_kernels has no native implementation of it")],
    "sample_tokens": [
        ("native", {"logits": torch.zeros(2, 5).double()}, "it takes fp32, and an input is torch.float64")
    ],
    "prefix_attention": [
        ("native", {x: torch.zeros(5, 2, 8).double() for x in "qkv"}, "backend 'native' cannot run on cpu"),
        ("triton", {x: torch.zeros(5, 2, 272) for x in "qkv"}, "q: expected a head dim of at most 256 for the triton"),
    ],
    "prefix_decode_attention": [
        ("native", decode_arguments(8), "q: expected a head dim that 16 divides for the native backend, got 8"),
        ("triton", decode_arguments(272), "q: expected a head dim of at most 256 for the triton backend, got 272"),
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


@pytest.mark.parametrize("op", [op for op in GOOD if "triton" in vk.backends(op)])
def test_triton_refuses_fp64(op: str) -> None:
    double = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in GOOD[op].items()}
    with pytest.raises(ValueError, match=rf"^{op}: backend 'triton' cannot run .*, and an input is fp64"):
        getattr(vk, op)(**double, backend="triton")


@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
def test_options_that_equal_known_ones_are_checked_too(op: str) -> None:
    call = GOOD[op] | {"beta": 1, "use_bias_correction_kl": True}
    getattr(vk, op)(**call)
    for wrong in ({"beta": True}, {"use_bias_correction_kl": 1}, {"kl_clamp": [1]}, {"beta": torch.tensor(1)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            getattr(vk, op)(**call | wrong)
