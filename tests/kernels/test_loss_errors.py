"""Sizes and dtypes that do not fit together, which the losses, the head and the advantages refuse on every backend.

What each argument may be by itself is in test_kernel_errors.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from loss_cases import BACKENDS
from torch import Tensor
from triton_cases import DEVICE

import videor1_kernels

HEAD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3).long()}
LOSS = {"advantages": torch.zeros(2), "cu_seqlens": torch.tensor([0, 2, 3]), "beta": 0}
GROUP = {name: torch.zeros(2, 3) for name in ("accuracy", "format", "lengths")}
GOOD: dict[str, dict[str, Any]] = {
    "linear_logprob": HEAD,
    "linear_grpo_loss": HEAD | LOSS,
    "grpo_loss": {"logp": torch.zeros(3)} | LOSS,
    "selective_log_softmax": {"logits": torch.zeros(2, 4), "index": torch.tensor([0, 1])},
    "tgrpo_advantages": GROUP | {"shuffled_accuracy": torch.zeros(2, 2)},
}
OF_HEAD = [
    ("labels", torch.zeros(4).long(), "shape [3], got [4]"),
    ("labels", torch.zeros(3).int(), "dtype int64, got torch.int32"),
    ("weight", torch.zeros(5, 3), "shape [V, 4], got [5, 3]"),
    ("bias", torch.zeros(4), "shape [5], got [4]"),
    ("temperature", torch.ones(2), "shape [3], got [2]"),
]
OF_LOSS = [
    ("advantages", torch.zeros(3), "shape [2], got [3]"),
    ("advantages", torch.zeros(2).long(), "dtype float64, float32, bfloat16 or float16, got torch.int64"),
    ("cu_seqlens", torch.tensor([0, 2, 4]), "the first entry 0 and the last 3, got 0 and 4"),
    ("old_logp", torch.zeros(2), "shape [3], got [2]"),
    ("ref_logp", torch.zeros(4), "shape [3], got [4]"),
    ("num_tokens", 0, "a finite number above 0, got 0"),
]
TABLES = {
    "linear_logprob": OF_HEAD,
    "linear_grpo_loss": [("hidden", torch.zeros(1, 3, 4), "shape [N, H], got [1, 3, 4]"), *OF_HEAD, *OF_LOSS],
    "grpo_loss": [("mask", torch.ones(3), "dtype bool"), ("mask", torch.ones(2) > 0, "shape [3], got [2]"), *OF_LOSS],
    "selective_log_softmax": [
        ("index", torch.tensor([0, 1, 2]), "shape [2] or [2, K], got [3]"),
        ("index", torch.tensor([[[0]], [[1]]]), "shape [2] or [2, K], got [2, 1, 1]"),
        ("index", torch.tensor([[0, 1], [2, -1]]), "values in [0, 4), got 1 outside, the first of them -1"),
    ],
    "tgrpo_advantages": [
        ("format", torch.zeros(2, 4), "shape [2, 3], got [2, 4]"),
        ("lengths", torch.zeros(3, 2), "shape [2, 3], got [3, 2]"),
        ("lengths", torch.zeros(2, 3) > 0, "dtype int64"),
        ("shuffled_accuracy", torch.zeros(3, 2), "shape [2, Gs], got [3, 2]"),
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", TABLES)
def test_what_does_not_fit_is_named(op: str, backend: str) -> None:
    for name, value, message in TABLES[op]:
        arguments = GOOD[op] | {name: value, **({"loss_type": "dapo"} if name == "num_tokens" else {})}
        arguments = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in arguments.items()}
        with pytest.raises(ValueError, match=re.escape(f"{op}: {name}: expected {message}")):
            getattr(videor1_kernels, op)(**arguments, backend=backend)
