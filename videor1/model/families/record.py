"""What one family of models does differently from another, as one record.

A family is one file with one record, and one line in the table of :mod:`videor1.model.families`. Nothing else asks for
a model's type. All families so far have in common: transformers' classes with ``model.visual``, ``lm_head`` and
``model.language_model``; 2 x 2 patches of two frames as one media token; Qwen's special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1.model.positions import MediaRun
from videor1.types import Media
from videor1.video import FrameRules

QWEN_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pooled(output: Any) -> Tensor:
    return output.pooler_output


def nothing(further: Sequence[Tensor], at: Tensor) -> dict[str, Any]:
    return {}


def _no_reason(user: str, tool: str) -> str | None:
    return None


def _no_norms(attention: Any) -> None:
    return None


@dataclass(frozen=True)
class Family:
    r"""A family of models.

    Attributes:
        model_type: of its config.json.
        name: what messages call it.
        model_class: the name of its class in transformers.
        frames: which frames its tower takes, in which size, cut into which patches.
        tower_inputs: (grids int64 [media, 3] on the CPU, the tower's config, device, dtype of the pass) -> further
            arguments of the tower's ``forward``, such that it reads nothing back from the device.
        runs: (media, the tower's config) -> the runs of media tokens in a prompt, in order; all of one length.
        video_text: (a video, the template's start, pad and end tokens) -> the text that stands in their place, with one
            pad token a run. None: the template's own.
        features: the tower's output -> features [tokens, n * H] of all media, H being the language model's width. The
            first H columns replace the embeddings of the media tokens.
        layer_inputs: (the further features, [tokens, H] each, mask [1, T] of the row's media tokens) -> further
            arguments of the language model's ``forward``. It is asked for rows with media only.
        head_norms: a layer's attention -> its RMSNorms of each head of q and of k, which a decode step computes before
            the rotary embedding; None: it has none.
        unit_offset: whether the language model's RMSNorms, but for those in linear attention, multiply by 1 + weight.
        output_gate: whether ``q_proj`` gives, behind each head's query, a gate of the same size: attention's output is
            multiplied by its sigmoid.
        tokens: further single tokens that its tokenizer must have.
        lora_targets: the linear layers of the language model that get an adapter by default.
        recipes: the files in ``videor1/configs`` that train it, by the size of the model.
        foreign_tokens: single tokens of another family's tokenizer, whose ids follow each other in it; one of which
            that holds is that family's.
        opened: the texts, character by character, that its chat templates may open an answer with behind the head of
            the assistant's turn, such as "<think>\n" of thinking models. A template that opens none is always taken,
            one that opens another is refused.
        foreign_template: (a user's turn, a conversation with a tool, as a chat template renders them) -> whose it is
            and how that shows, if it is another family's; None: it is not.
        server_video: a video -> what vLLM's loader of frames is told (``media_io_kwargs``), so that it puts them at the
            same times; None: ``rollout.engine: server`` cannot sample from it yet.
    """

    model_type: str
    name: str
    model_class: str
    frames: FrameRules
    tower_inputs: Callable[[Tensor, Any, torch.device, torch.dtype], dict[str, Any]]
    runs: Callable[[Media, Any], list[MediaRun]]
    video_text: Callable[[Media, str], str] | None = None
    features: Callable[[Any], Tensor] = pooled
    layer_inputs: Callable[[Sequence[Tensor], Tensor], dict[str, Any]] = nothing
    head_norms: Callable[[Any], tuple[Any, Any] | None] = _no_norms
    unit_offset: bool = False
    output_gate: bool = False
    tokens: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = QWEN_LINEAR
    recipes: tuple[str, ...] = ()
    foreign_tokens: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    foreign_template: Callable[[str, str], str | None] = _no_reason
    server_video: Callable[[Media], dict[str, Any]] | None = None

    def transformers_class(self) -> Any:
        """Return its class in transformers, which is imported now."""
        import transformers

        return getattr(transformers, self.model_class)
