"""All weights that a decode step reads, at addresses that stay from one rollout to the next.

A CUDA graph reads the addresses that it was captured with. So a weight here is the model's own parameter where that
stays where it is, and otherwise memory into which its values of now are copied: a cast, an adapter, or under ZeRO-3 a
parameter that is whole only while it is gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from videor1.model import VideoLM
from videor1.rollout.local.linear_attention import LinearWeights, products_of
from videor1.rollout.local.projections import Projections, same_memory, second_copy
from videor1_kernels.rotary_append.reference import HeadNorms

# Makes parameters whole while the context lasts.
Gathered = Callable[[Sequence[nn.Parameter]], contextlib.AbstractContextManager[Any]]


class Norm(NamedTuple):
    weight: Tensor
    eps: float
    unit_offset: bool  # whether it multiplies by 1 + weight


class DecodeLayer(NamedTuple):
    """What a decoder layer computes with."""

    input_norm: Norm
    qkv: Projections  # of the layer's input: q, k and v, or what linear attention takes
    out: Projections
    mlp_norm: Norm
    gate_up: Projections
    down: Projections
    head_norms: HeadNorms | None  # of each head of q and k
    linear: LinearWeights | None  # of a layer of linear attention

    @property
    def projections(self) -> tuple[Projections, ...]:
        return self.qkv, self.out, self.gate_up, self.down


class DecodeWeights:
    """The weights of the decoder layers, the norms, the embedding and the head.

    Args:
        model: the model whose weights they are.
        packed: see :class:`~videor1.rollout.local.projections.Projections`.
        gathered: gathers the weights of one layer, under ZeRO-3: they are copied layer by layer, and no more than a
            layer is gathered at a time. None: the parameters are whole already.
    """

    def __init__(self, model: VideoLM, *, packed: bool = True, gathered: Gathered | None = None) -> None:
        self._model, self._text, dtype = model, model.hf.model.language_model, model.compute_dtype
        self._fleeting = gathered is not None
        self._single: dict[nn.Module, Tensor] = {}  # the weights of modules that are not joined with others

        def fixed(module: Any, kind: torch.dtype | None = None) -> Tensor:
            weight = module.weight.detach()
            weight = weight.to(kind or weight.dtype, copy=self._fleeting)
            return self._single.setdefault(module, weight)

        offset = model.family.unit_offset

        def norm(module: Any) -> Norm:
            return Norm(fixed(module), _eps(module), offset)

        def join(layers: Sequence[nn.Module], stacked: bool = False) -> Projections:
            return Projections(layers, dtype, packed=packed, stacked=stacked, fleeting=self._fleeting)

        self.layers: list[DecodeLayer] = []
        for layer in self._text.layers:
            with _whole(layer, gathered):
                qkv, out, gate_up, down = _groups(layer)
                norms = norm(layer.input_layernorm), norm(layer.post_attention_layernorm)
                joined = join(qkv), join(out), join(gate_up, stacked=True), join(down)
                heads, linear = None, getattr(layer, "linear_attn", None)
                if linear is None:
                    heads = _head_norms(model.family.head_norms(layer.self_attn), fixed, offset)
                own = None if linear is None else LinearWeights.of(linear, copy=self._fleeting)
                self.layers.append(DecodeLayer(norms[0], *joined[:2], norms[1], *joined[2:], heads, own))
        embedding, head = self._text.embed_tokens, model.hf.lm_head
        for module in (self._text.norm, embedding):
            with _whole(module, gathered):
                fixed(module)
        with _whole(head, gathered):
            tied = head.weight is embedding.weight and head.weight.dtype == dtype
            self.head = self._single[embedding] if tied else fixed(head, dtype)

    def renew(self, gathered: Gathered | None = None) -> bool:
        """Take the model's weights of now; return False where they do not fit in here, so that this is of no use."""
        for layer, ours in zip(self._text.layers, self.layers, strict=True):
            with _whole(layer, gathered):
                heads: Sequence[Any] = ()
                if ours.linear is None:
                    heads = self._model.family.head_norms(layer.self_attn) or ()
                elif not ours.linear.renew(layer.linear_attn, copied=self._fleeting):
                    return False
                norms = layer.input_layernorm, layer.post_attention_layernorm, *heads
                if not all(map(self._renew, norms)) or not all(joined.renew() for joined in ours.projections):
                    return False
        for module in (self._text.norm, self._text.embed_tokens, self._model.hf.lm_head):  # in the order of __init__
            with _whole(module, gathered):
                if not self._renew(module):
                    return False
        return True

    def _renew(self, module: Any) -> bool:
        ours, weight = self._single.get(module), module.weight.detach()
        if ours is None:
            return module.weight is self._text.embed_tokens.weight  # a head that is tied to the embedding
        if same_memory(ours, weight):
            return True
        if not self._fleeting and ours.dtype == weight.dtype:
            return False  # it was used where it lay, and has moved
        ours.copy_(weight)
        return True

    def held(self) -> dict[nn.Parameter, Tensor]:
        """Return the parameters whose values are here, with those: where they are, none has to be gathered again."""
        found: dict[Any, Tensor] = {
            m.weight: value for m, value in self._single.items() if m.weight.dtype == value.dtype
        }
        for layer in self.layers:
            for projections in layer.projections:
                found |= projections.held()
        return found

    def tensors(self) -> list[Tensor] | None:
        """Return all weights that a step reads; None where some of them are not known."""
        found = [*self._single.values()]
        for layer in self.layers:
            found += [] if layer.linear is None else layer.linear.tensors()
            for projections in layer.projections:
                read = projections.tensors()
                if read is None:
                    return None
                found += read
        return found

    def bytes(self) -> int:
        """Return the bytes of what is not the memory of the model's parameters."""
        parameters = {
            p.untyped_storage()._cdata for p in self._model.hf.parameters() if not hasattr(p, "ds_id")
        }  # those of ZeRO-3 may lie here for the time of a rollout
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in self.tensors() or []}
        return sum(size for key, size in storages.items() if key not in parameters)


def _head_norms(
    modules: tuple[Any, Any] | None, weight: Callable[[Any], Tensor], unit_offset: bool
) -> HeadNorms | None:
    """Return the norms of a layer's heads of q and k, which have one eps."""
    if modules is None:
        return None
    q, k = modules
    assert _eps(q) == _eps(k), (_eps(q), _eps(k))
    return HeadNorms(weight(q), weight(k), _eps(q), unit_offset)


def _eps(norm: Any) -> float:
    """Of an RMSNorm of transformers, which name it differently."""
    eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return eps


@contextlib.contextmanager
def _whole(module: nn.Module, gathered: Gathered | None) -> Iterator[None]:
    with contextlib.nullcontext() if gathered is None else gathered(list(module.parameters())):
        yield


def copied_bytes(model: VideoLM) -> int:
    """Return the bytes of the second copy that packing the weights of a model would make."""
    layers = model.hf.model.language_model.layers
    return sum(second_copy(modules, model.compute_dtype) for layer in layers for modules in _groups(layer))


def _groups(layer: Any) -> tuple[Sequence[nn.Module], ...]:
    """Return the linear layers of a decoder layer that share their input."""
    mlp = layer.mlp
    if linear := getattr(layer, "linear_attn", None):
        own: tuple[Sequence[nn.Module], ...] = (products_of(linear), (linear.out_proj,))
    else:
        attention = layer.self_attn
        own = (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)
    return (*own, (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))
