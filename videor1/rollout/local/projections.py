"""Linear layers of a decode step that share their input, with their LoRA adapters: one or two products, and no casts.

Layers with one input have one matrix here, [W; A] of all their weights and the A of their adapters, in the compute
dtype; where adapters are, a second product adds B times what the A gave, in place. peft computes each adapted layer as
base(x) + B(A(x)) * scale, with casts to the adapters' fp32 and back around it: about ten kernels a layer, each of which
takes longer to launch than to run. Merging adapters into weights of 16 bits would round small deltas away: the sampled
policy would not be the trained one.

The matrix is no second copy of weights that are in the compute dtype already: the layers' own parameters become rows of
it, in which an optimizer changes them as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from videor1.model.cpu_linear import linear
from videor1.model.lora import plain_adapter


class _Layer(NamedTuple):
    """What the form of a layer's part follows from; its weights' values do not."""

    out: int
    weight: torch.dtype
    bias: bool
    adapter: str | None  # the name of the one that it adds now
    rank: int  # of that; 0: none
    room: int  # for the A of any of its adapters


class Projections:
    """Linear layers of one input, as a callable: x [R, in] -> their outputs side by side, [R, sum of out].

    What a call reads lies where it lay at the first call, as a CUDA graph needs it; :meth:`renew` takes new values.

    Args:
        layers: the layers, adapted or not. If one is neither plain nor a plain LoRA layer, all are called as they are.
        dtype: what the step computes in. Weights in another are cast to it here.
        packed: whether to join weights that are in the compute dtype already; otherwise they are used as they are.
        stacked: whether the adapters' B are one above the other, for :meth:`terms`, instead of block-diagonal.
        fleeting: whether the weights lie where they lie for now alone, so that they have to be copied.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        dtype: torch.dtype,
        *,
        packed: bool = True,
        stacked: bool = False,
        fleeting: bool = False,
    ) -> None:
        self._layers, self._dtype, self._stacked = layers, dtype, stacked
        self._form = _form(layers)
        if self._form is None:
            return
        form = self._form
        self._outs, self._width = [f.out for f in form], sum(f.out for f in form)
        ranks, rooms = [f.rank for f in form], [f.room for f in form]
        if stacked:  # all of one rank, which rows of zeros fill up
            ranks, rooms = [max(ranks)] * len(form), [max(rooms)] * len(form)
        weights = self._weights_now()
        inputs = self._plain[0].in_features
        cast = any(f.weight != dtype for f in form)
        self._joins = cast or fleeting or (packed and (len(form) > 1 or sum(rooms) > 0))
        self._matrix: Tensor | None = None  # [W; A], or the weight of a single layer without an adapter
        self._a: Tensor | None = None
        if self._joins:
            rows = self._width + sum(rooms)
            found = None if cast or fleeting else _joined(weights, self._width, rows)
            if found is None or len(found) < rows:
                self._movable = [not (cast or fleeting) and (found is not None or _owns(p)) for p in self._parameters()]
                found = weights[0].new_empty((rows, inputs), dtype=dtype)
            else:
                self._movable = [True] * len(form)
            self._parts = list(found[: self._width].split(self._outs))
            self._matrix = found[: self._width + sum(ranks)]
            self._a = self._matrix[self._width :] if sum(ranks) else None
        else:
            self._parts = weights
            self._matrix = weights[0] if len(form) == 1 and not sum(ranks) else None
            self._a = weights[0].new_empty((sum(ranks), inputs), dtype=dtype) if sum(ranks) else None
        self._b: Tensor | None = None
        if sum(ranks):
            self._b = weights[0].new_zeros((self._width, ranks[0] if stacked else sum(ranks)), dtype=dtype)
            self._a_parts = self._a.split(ranks)  # type: ignore[union-attr]
            columns = [self._b] * len(form) if stacked else self._b.split(ranks, 1)
            self._b_parts = [c.split(self._outs)[i] for i, c in enumerate(columns)]
        self._bias: Tensor | None = None
        if any(f.bias for f in form):
            length = self._width if self._matrix is None else len(self._matrix)
            self._bias = weights[0].new_zeros(length, dtype=dtype)
        assert self.renew()

    @property
    def _plain(self) -> list[Any]:
        return [getattr(layer, "base_layer", layer) for layer in self._layers]

    def _parameters(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self._plain]

    def _weights_now(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters()]

    def renew(self) -> bool:
        """Take the layers' values of now; return False where these layers have another form, or have to be called.

        Weights that are used where they lie must lie there still.
        """
        if self._form is None or _form(self._layers) != self._form:
            return False
        for i, (part, parameter) in enumerate(zip(self._parts, self._parameters(), strict=True)):
            weight = parameter.detach()
            if same_memory(part, weight):
                continue
            if not self._joins:
                return False
            part.copy_(weight)
            if self._movable[i]:
                parameter.data = part
        for i, (form, layer) in enumerate(zip(self._form, self._layers, strict=True)):
            if self._a is not None:
                self._a_parts[i][form.rank :].zero_()
            if form.adapter is not None:
                adapter = _adapter(layer, form.adapter)
                self._a_parts[i][: form.rank].copy_(adapter.a)
                self._b_parts[i][:, : form.rank].copy_(adapter.b)
        if self._bias is not None:
            for own, layer in zip(self._bias[: self._width].split(self._outs), self._plain, strict=True):
                if layer.bias is not None:
                    own.copy_(layer.bias.detach())
        return True

    def held(self) -> dict[nn.Parameter, Tensor]:
        """Return the parameters whose values this holds, with those, in the parameters' own dtype."""
        if self._form is None:
            return {}
        pairs = zip(self._parameters(), self._parts, strict=True)
        return {parameter: part for parameter, part in pairs if parameter.dtype == part.dtype}

    def joined(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Return (matrix [out + ranks, in], its bias, block-diagonal B [out, ranks]); None without a matrix."""
        if self._form is None or self._matrix is None:
            return None
        stacked = self._b is not None and self._stacked
        b = torch.block_diag(*self._b.split(self._outs)) if stacked and self._b is not None else self._b
        return self._matrix, self._bias, b

    def tensors(self) -> list[Tensor] | None:
        """Return all that a call reads; None where layers are called as they are."""
        if self._form is None:
            return None
        weights = [*self._parts, self._a] if self._matrix is None else [self._matrix]
        return [x for x in (*weights, self._bias, self._b) if x is not None]

    def __call__(self, x: Tensor) -> Tensor:
        if self._form is None:
            return torch.cat([layer(x) for layer in self._layers], 1)
        out, inner, b = self.terms(x)
        if inner is None or b is None:
            return out
        if not self._stacked:
            return out.addmm_(inner, b.T)
        parts = zip(out.split(self._outs, 1), inner.chunk(len(self._outs), 1), self._b_parts, strict=True)
        for part, of, factors in parts:
            part.addmm_(of, factors.T)
        return out

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the layers' outputs without their adapters, and what these would add to them: inner and b.

        With ``stacked``, inner is [R, layers * rank], and b [sum of out, rank].
        """
        if self._form is None:
            return self(x), None, None
        if self._matrix is not None:
            out = linear(x, self._matrix, self._bias)
            return (out, None, None) if self._a is None else (out[:, : self._width], out[:, self._width :], self._b)
        out = x.new_empty((len(x), self._width))
        for part, weight in zip(out.split(self._outs, 1), self._parts, strict=True):
            torch.mm(x, weight.T, out=part)
        if self._bias is not None:
            out += self._bias
        return (out, None, None) if self._a is None else (out, x @ self._a.T, self._b)


def second_copy(layers: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """Return the bytes that joining these layers takes beside their own memory, which cannot become a part of it."""
    form = _form(layers)
    if form is None or any(f.weight != dtype for f in form) or (len(form) == 1 and not form[0].room):
        return 0
    plain: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
    parameters = [layer.weight for layer in plain]
    width = sum(f.out for f in form)
    if _joined([p.detach() for p in parameters], width, width + len(form) * max(f.room for f in form)) is not None:
        return 0
    return sum(p.nbytes for p in parameters if not _owns(p))


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape are the same numbers in memory."""
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and (a.storage_offset(), a.stride(), a.dtype) == (b.storage_offset(), b.stride(), b.dtype)
        and a.shape == b.shape
    )


def _owns(parameter: nn.Parameter) -> bool:
    """Return whether a parameter's memory is its own, so that it may move; DeepSpeed's is not."""
    whole = parameter.untyped_storage().nbytes() == parameter.nbytes and parameter.is_contiguous()
    return whole and not hasattr(parameter, "ds_id")


def _joined(weights: Sequence[Tensor], width: int, rows: int) -> Tensor | None:
    """Return the matrix of at most ``rows`` rows in whose first ``width`` the weights lie one below the other."""
    first, end = weights[0], 0
    for weight in weights:
        together = weight.untyped_storage()._cdata == first.untyped_storage()._cdata and weight.is_contiguous()
        if not together or weight.storage_offset() != end:
            return None
        end += weight.numel()
    inputs = first.shape[1]
    found = first.untyped_storage().nbytes() // (inputs * first.dtype.itemsize)
    return first.as_strided((found, inputs), (inputs, 1), 0) if width <= found <= rows else None


def _form(layers: Sequence[Any]) -> tuple[_Layer, ...] | None:
    """Return the form of each layer; None where one does anything beyond a product and one adapter's."""
    found = []
    for layer in layers:
        adapted = type(getattr(layer, "base_layer", None)) is nn.Linear
        name = plain_adapter(layer) if adapted else None
        if name is None and adapted and not layer.disable_adapters:
            return None
        plain = layer.base_layer if adapted else layer
        if type(plain) is not nn.Linear or (adapted and layer.merged):
            return None
        room = max((a.out_features for a in layer.lora_A.values()), default=0) if adapted else 0
        rank = 0 if name is None else layer.lora_A[name].out_features
        found.append(_Layer(plain.out_features, plain.weight.dtype, plain.bias is not None, name, rank, room))
    return tuple(found)


class _Adapter(NamedTuple):
    """An adapter of one layer: its change of the output is (x A^T) B^T."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank], times the scale


def _adapter(layer: Any, name: str) -> _Adapter:
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return _Adapter(a, b * layer.scaling[name])
