"""How often an operation makes the host wait for the device, counted where its kernels are launched.

A function mode sees every call that reads values of a tensor or gives a result whose size depends on them. On a GPU
each stops the host until the device has caught up, and none may be made while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter
from loss_cases import BOTH, make_case, make_linear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE
from waits import READS

from videor1_kernels import DecodeLayout
from videor1_kernels.add_rms_norm.triton import add_rms_norm
from videor1_kernels.grpo_loss import ops as grpo_ops
from videor1_kernels.grpo_loss import triton as grpo
from videor1_kernels.grpo_loss.reference import Completions, GrpoLossOptions
from videor1_kernels.linear_logprob import products
from videor1_kernels.linear_logprob import triton as logprob
from videor1_kernels.linear_logprob.inputs import HeadInputs
from videor1_kernels.output_gates.triton import gated_rms_norm, sigmoid_mul
from videor1_kernels.prefix_attention import triton_decode
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs
from videor1_kernels.prefix_gated_delta.reference_step import ConvStep, DeltaStep
from videor1_kernels.prefix_gated_delta.triton_step import causal_conv_step, gated_delta_step
from videor1_kernels.rotary_append.reference import Places
from videor1_kernels.rotary_append.triton import rotary_append
from videor1_kernels.sampling.reference import SampleTokensOptions
from videor1_kernels.sampling.triton import sample_tokens
from videor1_kernels.silu_mul.triton import silu_mul
from videor1_kernels.testing import assert_matches


class Waits(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool
        if func in READS or by_mask:
            self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Counts the waits within a block, without those of Triton's interpreter itself."""
    launch = interpreter.GridExecutor.__call__

    def unseen(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unseen)

    @contextmanager
    def counted() -> Iterator[list[str]]:
        with Waits() as mode:
            yield mode.seen

    return counted


def options(**chosen: Any) -> GrpoLossOptions:
    given = {"loss_type": "grpo", "beta": 0.0, "clip_low": None, "clip_high": None, "kl_clamp": 10.0} | chosen
    return GrpoLossOptions(**{"importance_level": "token", "max_completion_length": None, "num_tokens": None} | given)


def head(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[HeadInputs, Completions]:
    made, case = make_linear(dtype, ignored=True)
    inputs = HeadInputs(made.hidden.detach(), made.weight.detach(), made.labels, None, 1.0)
    return inputs, Completions(**(case | changes))


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("rows", [4096, 4])
def test_a_loss_on_policy_waits_once(waits: Any, beta: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk or in many, with masked tokens; without a KL term with completions of advantage 0 too."""
    monkeypatch.setattr(products, "MIN_CHUNK_ROWS", rows)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    inputs, completions = head(old_logp=None)
    if not beta:
        completions.advantages[1] = 0.0
    with waits() as seen:
        grpo.linear_grpo_loss(inputs, completions, options(beta=beta), (True, True, False))
    assert seen == ["tolist"]


def test_a_clipped_loss_waits_for_the_size_of_each_chunk(waits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MIN_CHUNK_ROWS", 8)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    inputs, completions = head()
    with waits() as seen:
        grpo.linear_grpo_loss(inputs, completions, options(**BOTH), (True, True, False))
    assert seen == ["tolist", *["nonzero"] * -(-int((inputs.labels != -100).sum()) // 8)]


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_a_truncating_correction_does_not_wait(waits: Any, correction: str) -> None:
    """Nor do completions that do not count; weights that may be 0 have their rows read, by chunk."""
    inputs, completions = head(old_logp=None)
    completions = completions._replace(
        rollout_logp=completions.ref_logp, completion_mask=torch.ones_like(completions.advantages, dtype=torch.bool)
    )
    for mode, seen_by_chunk in (("truncate", []), ("mask", ["nonzero"])):
        with waits() as seen:
            chosen = options(importance_correction=correction, correction_mode=mode)
            grpo.linear_grpo_loss(inputs, completions, chosen, (True, True, False))
        assert seen == ["tolist", *seen_by_chunk]


def test_checks_wait_with_the_rest(waits: Any) -> None:
    """Of the operator: lengths, labels and temperatures are read together, and every fault still has its message."""
    inputs, completions = head(old_logp=None)
    size = len(inputs.labels)

    def call(labels: torch.Tensor, temperatures: torch.Tensor, cu_seqlens: torch.Tensor) -> Any:
        chosen = options().packed()
        given = completions._replace(cu_seqlens=cu_seqlens)
        run = grpo_ops.linear_grpo_loss_op._init_fn
        return run(
            *(inputs.hidden, inputs.weight, labels, *given, None, temperatures, 1.0, None, 0.0),
            *(*chosen, [True] * 3, "triton"),
        )

    good = inputs.labels, torch.ones(size, device=DEVICE), completions.cu_seqlens
    with waits() as seen:
        call(*good)
    assert seen == ["tolist"]
    for i, (bad, message) in enumerate(
        (
            (torch.full_like(inputs.labels, 999), "labels: expected values in"),
            (torch.zeros(size, device=DEVICE), "temperature: expected finite values above 0"),
            (completions.cu_seqlens + 1, "cu_seqlens: expected the first entry 0"),
        )
    ):
        arguments = list(good)
        arguments[i] = bad
        with pytest.raises(ValueError, match=message):
            call(*arguments)


def test_what_a_graph_can_capture_never_waits(waits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses from log-probs, log-probs, both passes of selective_log_softmax, and all of a decode step."""
    monkeypatch.setattr(logprob, "capturing", lambda _: True)
    inputs, _ = head(torch.bfloat16)
    logp, case = make_case()
    sliced = torch.randn(2, 4, 70, device=DEVICE)[:, :-1]
    index = torch.randint(70, (6, 1), device=DEVICE)
    q = torch.randn(3, 4, 16, device=DEVICE)
    kv = torch.randn(9, 2, 16, device=DEVICE)
    suffix = torch.randn(3, 5, 2, 16, device=DEVICE)
    layout = DecodeLayout(torch.tensor([0, 4, 9]), torch.tensor([0, 0, 1]))
    lengths = torch.tensor([1, 3, 5], dtype=torch.int32)
    with waits() as seen:
        found = logprob.forward(inputs)
        grpo.grpo_loss(logp.detach(), Completions(**case), None, options(**BOTH))
        for correction in ("token", "sequence"):
            given = Completions(**case, rollout_logp=logp.detach(), completion_mask=case["advantages"] > 0)
            grpo.grpo_loss(logp.detach(), given, None, options(importance_correction=correction))
        out, kept = logprob.selective_forward(sliced, index, 0.7)
        logprob.selective_backward(torch.ones_like(out), sliced, index, 0.7, kept)
        for splits in (1, 2):
            sample_tokens(sliced[0], torch.rand(3, device=DEVICE), None, SampleTokensOptions(1.0, 0.9, 5), splits)
        decode = DecodeInputs(q, kv, kv, suffix, suffix, lengths)
        triton_decode.prefix_decode_attention(decode, layout, 0.3, triton_decode.BLOCKS[80])
        add_rms_norm(q[0], q[0, 0], q[1], 1e-6)
        qkv, table = q.view(3, 64).repeat(1, 2), kv[:, 0]
        rotary_append(qkv, table, table, suffix, suffix, Places(lengths, lengths, lengths - 1))
        silu_mul(qkv)
        sigmoid_mul(qkv, qkv)
        gated_rms_norm(q, q, q[0, 0], 1e-6)
        gates, slots = q[:, :, 0], lengths - 1
        gated_delta_step(DeltaStep(q, q, q, gates, gates, torch.zeros(5, 4, 16, 16, device=DEVICE), slots), 1.0, True)
        causal_conv_step(
            ConvStep(qkv, torch.zeros(5, 128, 1, device=DEVICE), qkv[0].expand(2, -1).T, None, slots), "silu"
        )
    assert not seen
    monkeypatch.setattr(logprob, "capturing", lambda _: False)
    for ours, theirs in zip(found, logprob.forward(inputs), strict=True):
        assert_matches(ours, theirs)  # in other tiles: not to the bit


@pytest.mark.parametrize(
    ("loss_type", "masked", "most"), [("grpo", False, 2), ("bnpo", False, 2), ("grpo", True, 2), ("bnpo", True, 3)]
)
def test_a_loss_of_log_probs_is_few_launches(
    loss_type: str, masked: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kernels, and the sum of a mask where it decides what all are divided by: each takes longer to launch than to
    run."""
    logp, case = make_case(masked=masked)
    mask = case.pop("mask", None)
    launched: list[str] = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn.__name__))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "empty" not in str(func) and not func.is_view and "detach" not in str(func):
                launched.append(str(func))
            return func(*args, **(kwargs or {}))

    with Operations(), torch.no_grad():
        grpo.grpo_loss(logp, Completions(**case), mask, options(loss_type=loss_type, beta=0.04))
    assert launched.count("terms_kernel") == launched.count("finish_kernel") == 1
    assert len(launched) == most, launched
