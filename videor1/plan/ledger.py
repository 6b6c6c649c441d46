"""Count the memory of code that runs on torch's fake tensors, which have shapes and dtypes but no storage.

The trainer's own code runs on them, so torch itself and not a formula determines what autograd saves, what autocast
casts and keeps, and when each tensor is freed. Fake tensors do not show the buffers inside the launch of a Triton
kernel. They are added here, with the sizes that the launchers allocate.
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
from videor1_kernels.grpo_loss.records import Completions
from videor1_kernels.linear_logprob import reference as head_reference
from videor1_kernels.linear_logprob import tiles
from videor1_kernels.linear_logprob.inputs import HeadInputs, head_inputs
from videor1_kernels.linear_logprob.products import chunk_rows
from videor1_kernels.linear_logprob.waves import inner_parts
from videor1_kernels.prefix_attention import MOST_D
from videor1_kernels.prefix_attention import ops as attention_ops
from videor1_kernels.prefix_attention import reference as attention_reference
from videor1_kernels.prefix_attention.softmax import SCORE_BYTES
from videor1_kernels.prefix_attention.work import key_items

CUDA_ROUNDING = 512  # bytes; torch's CUDA allocator rounds sizes up to multiples of this
KEY_BLOCK = 128  # keys per program of prefix_attention's backward kernel, the largest on any architecture
_CASTS = {torch.ops.aten._to_copy, torch.ops.aten.to}
PROCESSORS = 132  # multiprocessors of a Hopper, for which the head's gradient is cut into parts
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
HEAD_BLOCK = 128  # vocabulary entries per program of linear_logprob's kernel, the smallest, with most partial results


class Ledger(TorchDispatchMode):
    """Counts the live bytes of each part while it is entered, and their peak.

    Args:
        cuda: whether to count as for a GPU with the Triton kernels; otherwise as for a CPU with the references.

    Attributes:
        live: live bytes by part.
        peak: bytes by part at the moment of the most bytes since the last :meth:`restart`.
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
        self._replacements: dict[Any, Callable[..., Any]] = {
            torch.ops.videor1.prefix_attention.default: self._attention,
            torch.ops.videor1.prefix_attention_backward.default: self._attention_backward,
            torch.ops.videor1.linear_logprob.default: self._logprob,
            torch.ops.videor1.linear_grpo_loss.default: self._loss,
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Nothing here is compiled. Otherwise torch wraps every call, which doubles the time.

    @property
    def total(self) -> int:
        """The live bytes of all parts."""
        return self._total

    def restart(self) -> None:
        """Start to look for a new peak."""
        self._most = 0
        self._update_peak()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is allocated inside the context as the part ``name``."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def hold(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors as the part ``name``. Casts of the tensors of ``weights`` are later counted as such."""
        for tensor in tensors:
            self._add(tensor, name)
            if name == "weights":
                self._weights.add(_key(tensor))

    def watch(self, model: nn.Module, parts: dict[str, nn.Module]) -> None:
        """Count the forward passes of modules as parts, and the gradients of the model's parameters as ``gradients``.

        Args:
            model: the model whose gradients are counted.
            parts: modules of the model by the name of their part.
        """
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
                parameter.register_post_accumulate_grad_hook(self._count_gradient)

    def workspace(self, size: int, name: str | None = None) -> None:
        """Count memory that an operator allocates and frees again beside its outputs.

        Args:
            size: bytes.
            name: its part; default: the current part.
        """
        self._update_peak(size, name or self._part)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # This is the most frequent call by far, and FakeTensor is slow.
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func in self._replacements:
            return self._replacements[func](*args)
        if func in _INDEXED:
            args = (args[0], _numbered(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        if func.is_view and (not isinstance(out, Tensor) or _key(out) == _key(args[0])):
            return out  # A list of views often holds thousands of windows, so its tensors are not visited.
        if _writes(func):
            return out  # An argument. A real one, beside the fake ones, comes back as a fake one, which takes nothing.
        # In inference mode `to` arrives here undecomposed. Its schema says that it returns a view, but it may copy.
        cast = func.overloadpacket in _CASTS and _key(args[0]) in self._weights
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value, "weights cast" if cast else self._part)
        if str(func) == "mkldnn._linear_pointwise.default" and not args[0].is_contiguous():
            self.workspace(args[0].nbytes)  # oneDNN's product copies an operand that is not contiguous.
        return out

    def _add(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        if self.cuda:
            size = -(-size // CUDA_ROUNDING) * CUDA_ROUNDING
        self._storages[key] = weakref.ref(storage, functools.partial(self._remove, key)), size, name
        self.live[name] += size
        self._total += size
        self._update_peak()

    def _remove(self, key: int, _reference: Any) -> None:
        """Stop counting a storage that was freed."""
        _, size, name = self._storages.pop(key)
        self.live[name] -= size
        self._total -= size
        self._weights.discard(key)

    def _count_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter as ``gradients`` instead of the part that was current when it was made."""
        assert parameter.grad is not None
        key = _key(parameter.grad)
        reference, size, name = self._storages[key]
        self._storages[key] = reference, size, "gradients"
        self.live[name] -= size
        self.live["gradients"] += size

    def _update_peak(self, more: int = 0, name: str = "other") -> None:
        """Record a new peak if the live bytes and ``more`` bytes of the part ``name`` exceed the last."""
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
            if self._uses_attention_kernel(q, k, v):
                return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
            out, lse = attention_reference.forward(q, k, v, layout, scale)
            return out.contiguous(), lse

    def _attention_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        prompts: Any,
        counts: Any,
        completions: Any,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = attention_ops._layout(prompts, counts, completions, q.device)
        with self:
            if self._uses_attention_kernel(q, k, v):
                dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
                slots = key_items(layout, KEY_BLOCK)[2]
                self.workspace(lse.nbytes + slots * 2 * k.shape[1] * KEY_BLOCK * k.shape[2] * 4)
            else:
                dq, dk, dv = attention_reference.backward(grad, q, k, v, out, lse, layout, scale)
            return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def _uses_attention_kernel(self, *inputs: Tensor) -> bool:
        """Return whether a GPU would use the Triton kernel for these inputs.

        If a GPU would use the reference instead, its scores of several queries at a time are counted as a workspace.
        The reference runs here as on a CPU, where it keeps no scores.
        """
        if not self.cuda:
            return False
        kernel = inputs[0].shape[2] <= MOST_D and all(x.dtype.itemsize == 2 for x in inputs)
        if not kernel:
            self.workspace(3 * SCORE_BYTES)
        return kernel

    def _logprob(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Any,
        temperatures: Any,
        temperature: float,
        operands: torch.dtype | None,
        softcap: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self, self.part("head and loss"), _without_pointers():
            inputs = head_inputs(hidden, weight, labels, bias, temperatures, temperature, operands, softcap)
            if not self.cuda:
                return head_reference.forward(inputs)
            rows, vocabulary = len(labels), len(weight)
            if inputs.hidden.dtype.itemsize == 2 and not softcap:
                self.workspace(3 * -(-vocabulary // HEAD_BLOCK) * rows * 4)
            else:
                self.workspace(_logits_bytes(rows, vocabulary))
            logp, entropy = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
            return logp, entropy, hidden.new_empty(rows, dtype=torch.float64)

    def _loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> tuple[Any, ...]:
        # of each completion; of the head; of the loss; which gradients are wanted, and the backend
        bias, temperatures, temperature, operands, softcap, *_, needs, _ = others[len(Completions._fields) :]
        with self, self.part("head and loss"), _without_pointers():
            scalars = [hidden.new_empty((), dtype=torch.float32) for _ in range(4)]
            logp, entropy = (hidden.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
            inputs = head_inputs(hidden, weight, labels, bias, temperatures, temperature, operands, softcap)
            if self.cuda:
                d_hidden, d_weight = self._loss_kernel(inputs.hidden, inputs.weight, needs)
            else:
                d_hidden, d_weight = _loss_reference(inputs, needs)
            nothing = hidden.new_empty(0)
            return (
                scalars[0],
                logp,
                entropy,
                scalars[1],
                scalars[2],
                hidden.new_empty((), dtype=torch.int64),
                nothing if d_hidden is None else d_hidden,
                nothing if d_weight is None else d_weight,
                nothing,
                scalars[3],
            )

    def _loss_kernel(
        self, hidden: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        rows, (vocabulary, width) = len(hidden), weight.shape
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = weight.new_empty(weight.shape, dtype=torch.float32) if needs[1] else None
        chunk = chunk_rows(rows, vocabulary)
        # A chunk of rows needs its logits, which become their own gradient, its hidden states and their fp32 gradient,
        # perhaps in parts that are then added up.
        parts = 1 if hidden.dtype.itemsize == 4 else inner_parts(chunk, width, vocabulary, PROCESSORS)
        gradients = (parts + (parts > 1)) * 4 * needs[0]
        self.workspace(_logits_bytes(rows, vocabulary) + chunk * width * (hidden.dtype.itemsize + gradients))
        return d_hidden, d_weight


def _loss_reference(inputs: HeadInputs, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    _, entropy, lse = head_reference.forward(inputs)
    if not any(needs):
        return None, None
    grad_logp = (inputs.labels != IGNORED).float()  # Every token has a gradient, which takes the most memory.
    d_hidden, d_weight, _ = head_reference.backward(inputs, (grad_logp, None), entropy, lse, needs)
    return d_hidden, d_weight


@contextlib.contextmanager
def _without_pointers() -> Iterator[None]:
    """Replace the CPU's product of bf16 matrices by a function that only allocates its result.

    The product is C++ code that reads memory, which fake tensors do not have.
    """
    real = tiles.bf16_product
    stand_in = None if real() is None else lambda a, b: a.new_empty(len(a), len(b), dtype=torch.float32)
    tiles.bf16_product = lambda: stand_in
    try:
        yield
    finally:
        tiles.bf16_product = real


def _logits_bytes(rows: int, vocabulary: int) -> int:
    return chunk_rows(rows, vocabulary) * -(-vocabulary // 64) * 64 * 4


@functools.cache
def _writes(func: Any) -> bool:
    """Return whether all that an operator returns are arguments that it has written to."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and r.alias_info.is_write for r in returns)


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with masks as the numbers of their True entries.

    torch does not know the size of a fake tensor indexed by a mask, though the mask (of a row's media tokens) is real.
    """
    numbered: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        numbered += index.nonzero().unbind(1) if index is not None and masks else [index]
    return numbered


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
