"""Counts the memory of code that runs on fake tensors: torch's, which have shapes and dtypes and no storage.

The trainer's own code is what runs, so that what autograd saves, what autocast casts and keeps, and when each is freed
are torch's word and not a formula's. What fake tensors cannot see are the buffers inside a Triton kernel's launch:
they are added here, from the sizes that the launchers take.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videor1_kernels.checks import IGNORED
from videor1_kernels.linear_logprob import reference as head_reference
from videor1_kernels.linear_logprob import tiles
from videor1_kernels.linear_logprob.products import chunk_rows
from videor1_kernels.prefix_attention import MOST_D
from videor1_kernels.prefix_attention import ops as attention_ops
from videor1_kernels.prefix_attention import reference as attention_reference
from videor1_kernels.prefix_attention.softmax import SCORE_BYTES
from videor1_kernels.prefix_attention.work import key_items

CUDA_ROUNDING = 512  # bytes: torch's allocator hands out multiples
KEY_BLOCK = 128  # keys of a program of prefix_attention's backward kernel: the most of any architecture
_CASTS = {torch.ops.aten._to_copy, torch.ops.aten.to}
HEAD_BLOCK = 128  # vocabulary entries of a program of linear_logprob's kernel: the fewest, so the most partial results


class Ledger(TorchDispatchMode):
    """Live bytes by part while it is entered, and what they were when they were most.

    Args:
        cuda: count as a card with the Triton kernels would: else as a CPU with the references.

    Attributes:
        live: bytes by part.
        peak: bytes by part at the moment of the most bytes since :meth:`restart`.
    """

    def __init__(self, *, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._total = self._most = 0
        self._part = "other"
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._weights: set[int] = set()
        self._instead: dict[Any, Callable[..., Any]] = {
            torch.ops.videor1.prefix_attention.default: self._attention,
            torch.ops.videor1.prefix_attention_backward.default: self._attention_backward,
            torch.ops.videor1.linear_logprob.default: self._logprob,
            torch.ops.videor1.linear_grpo_loss.default: self._loss,
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled: without this torch wraps every call, which doubles the time

    @property
    def total(self) -> int:
        """Bytes that are live."""
        return self._total

    def restart(self) -> None:
        """Look for a new peak from here on."""
        self._most = 0
        self._see()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is allocated inside counts as ``name``."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def hold(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count these as ``name``; a weight's casts to other dtypes are then known as such."""
        for tensor in tensors:
            self._add(tensor, name)
            if name == "weights":
                self._weights.add(_key(tensor))

    def watch(self, model: nn.Module, parts: dict[str, nn.Module]) -> None:
        """Name the modules' forward passes, and the gradients of the model's parameters."""
        for name, module in parts.items():
            stack: list[str] = []

            def enter(_module: Any, _args: Any, name: str = name, stack: list[str] = stack) -> None:
                stack.append(self._part)
                self._part = name

            def leave(_module: Any, _args: Any, _out: Any, stack: list[str] = stack) -> None:
                self._part = stack.pop()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def workspace(self, size: int, name: str | None = None) -> None:
        """Memory that is taken and given back inside one operator, beside its outputs."""
        self._see(size, name or self._part)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # the most frequent by far, and FakeTensor takes long for it
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func in self._instead:
            return self._instead[func](*args)
        out = func(*args, **(kwargs or {}))
        if func.is_view and (not isinstance(out, Tensor) or _key(out) == _key(args[0])):
            return out  # a list is often of thousands of windows
        # In inference mode nothing takes `to` apart before it comes here; its schema says view, and it may copy.
        cast = func.overloadpacket in _CASTS and _key(args[0]) in self._weights
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value, "weights cast" if cast else self._part)
        if str(func) == "mkldnn._linear_pointwise.default" and not args[0].is_contiguous():
            self.workspace(args[0].nbytes)  # oneDNN's product copies such an operand
        return out

    def _add(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        if self.cuda:
            size = -(-size // CUDA_ROUNDING) * CUDA_ROUNDING
        self._storages[key] = weakref.ref(storage, functools.partial(self._gone, key)), size, name
        self.live[name] += size
        self._total += size
        self._see()

    def _gone(self, key: int, _reference: Any) -> None:
        _, size, name = self._storages.pop(key)
        self.live[name] -= size
        self._total -= size
        self._weights.discard(key)

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = _key(parameter.grad)
        reference, size, name = self._storages[key]
        self._storages[key] = reference, size, "gradients"
        self.live[name] -= size
        self.live["gradients"] += size

    def _see(self, more: int = 0, name: str = "other") -> None:
        if self._total + more > self._most:
            self._most = self._total + more
            self.peak = {part: size for part, size in self.live.items() if size}
            if more:
                self.peak[name] = self.peak.get(name, 0) + more

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, prompts: Any, counts: Any, completions: Any, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        layout = attention_ops._layout(prompts, counts, completions, q.device)
        with self:
            if self._attention_kernel(q, k, v):
                return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
            out, lse = attention_reference.forward(q, k, v, layout, scale)
            return out.contiguous(), lse

    def _attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, prompts: Any, counts: Any,
        completions: Any, scale: float, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        layout = attention_ops._layout(prompts, counts, completions, q.device)
        with self:
            if self._attention_kernel(q, k, v):
                dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
                slots = key_items(layout, KEY_BLOCK)[2]
                self.workspace(lse.nbytes + slots * 2 * k.shape[1] * KEY_BLOCK * k.shape[2] * 4)
            else:
                dq, dk, dv = attention_reference.backward(grad, q, k, v, out, lse, layout, scale)
            return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def _attention_kernel(self, *inputs: Tensor) -> bool:
        """Whether a card's Triton kernel takes these; its reference works through the scores of some queries at once,
        where a CPU's, which is what runs here, keeps none."""
        if not self.cuda:
            return False
        kernel = inputs[0].shape[2] <= MOST_D and all(x.dtype.itemsize == 2 for x in inputs)
        if not kernel:
            self.workspace(3 * SCORE_BYTES)
        return kernel

    def _logprob(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Any, temperatures: Any, temperature: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with self, self.part("head and loss"), _without_pointers():
            if not self.cuda:
                return head_reference.forward(hidden, weight, labels, bias, temperature)
            rows, vocabulary = len(labels), len(weight)
            if hidden.dtype.itemsize == 2:
                self.workspace(3 * -(-vocabulary // HEAD_BLOCK) * rows * 4)
            else:
                self.workspace(_logits_bytes(rows, vocabulary))
            logp, entropy = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
            return logp, entropy, hidden.new_empty(rows, dtype=torch.float64)

    def _loss(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, cu_seqlens: Tensor, old_logp: Any,
        ref_logp: Any, bias: Any, temperatures: Any, temperature: float, *options: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        needs: Sequence[bool] = options[-2]
        with self, self.part("head and loss"), _without_pointers():
            scalars = [hidden.new_empty((), dtype=torch.float32) for _ in range(4)]
            logp, entropy = (hidden.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
            if self.cuda:
                d_hidden, d_weight = self._loss_kernel(hidden, weight, needs)
            else:
                d_hidden, d_weight = _loss_reference(hidden, weight, labels, bias, temperature, needs)
            nothing = hidden.new_empty(0)
            return (
                scalars[0], logp, entropy, scalars[1], scalars[2], 0, nothing if d_hidden is None else d_hidden,
                nothing if d_weight is None else d_weight, nothing, scalars[3],
            )  # fmt: skip

    def _loss_kernel(
        self, hidden: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        rows, (vocabulary, width) = len(hidden), weight.shape
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = weight.new_empty(weight.shape, dtype=torch.float32) if needs[1] else None
        chunk = chunk_rows(rows, vocabulary)
        # The logits, which become their own gradient; of the same rows the hidden states and their fp32 gradient.
        self.workspace(_logits_bytes(rows, vocabulary) + chunk * width * (hidden.dtype.itemsize + 4 * needs[0]))
        return d_hidden, d_weight


def _loss_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Any, temperature: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    _, entropy, lse = head_reference.forward(hidden, weight, labels, bias, temperature)
    if not any(needs):
        return None, None
    every = (labels != IGNORED).float()  # every token has a gradient: the most memory
    d_hidden, d_weight, _ = head_reference.backward(
        every, None, hidden, weight, labels, bias, temperature, entropy, lse, needs
    )
    return d_hidden, d_weight


@contextlib.contextmanager
def _without_pointers() -> Iterator[None]:
    """The CPU's own product of bf16 matrices is C++ that reads memory: its result alone stands for it."""
    real = tiles.bf16_product
    stand_in = None if real() is None else lambda a, b: a.new_empty(len(a), len(b), dtype=torch.float32)
    tiles.bf16_product = lambda: stand_in
    try:
        yield
    finally:
        tiles.bf16_product = real


def _logits_bytes(rows: int, vocabulary: int) -> int:
    return chunk_rows(rows, vocabulary) * -(-vocabulary // 64) * 64 * 4


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
