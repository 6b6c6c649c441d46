"""The rows of rollouts.jsonl: each prompt of a step with its completions and their rewards.

For the first few prompts of a step every token and its log-prob are written too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from videor1.model import VideoLM
from videor1.rewards.advantages import Scored
from videor1.rewards.structured import MALFORMED
from videor1.types import Group, MediaItem, Prompt


def rollout_rows(
    groups: Sequence[Group], scored: Scored, model: VideoLM, *, log_tokens: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield one row of rollouts.jsonl per group.

    ``completions`` are what the model wrote, ``opened`` is what the chat template opened each of them with.

    Args:
        log_tokens: the first so many groups also get ``tokens`` and ``logps``, one list per ordered completion: the
            tokens as text (see :func:`token_strings`) and their log-probs at sampling, in nats, rounded to 4 decimals
            (NaN where a server returned none).
    """
    result = scored.result
    for i, group in enumerate(groups):
        sample = group.prompt.sample
        row: dict[str, Any] = {
            "draw": group.prompt.draw,
            "problem_id": sample.problem_id,
            "path": sample.path,
            "data_type": sample.data_type,
            "problem_type": sample.problem_type,
            "frames": model.family.frames.name,
            "problem": sample.problem,
            "options": list(sample.options),
            "prompt": model.tokenizer.decode(_without_media(model, group.prompt).tolist()),
            "solution": sample.solution,
            "permutation": group.permutation,
            "opened": model.opened_text,
            "completions": [c.text for c in group.ordered],
            "finished": [c.finished for c in group.ordered],
            "shuffled_asked": group.shuffled_asked,
            "shuffled_completions": [c.text for c in group.shuffled],
            "lengths": scored.lengths[i],
            "accuracy": scored.accuracy[i],
            "format": scored.format[i],
            "shuffled_accuracy": scored.shuffled_accuracy[i],
            "rewards": result.rewards[i],
            "advantages": result.advantages[i],
            "temporal": result.temporal[i],
            "p": result.p[i],
            "p_shuffled": result.p_shuffled[i],
        }
        if group.prompt.offline:
            row["sources"] = [c.source for c in group.ordered]  # None: sampled
        if sample.media:
            row["media"] = [_media_row(item) for item in sample.media]
        if scored.malformed is not None:
            row["malformed"] = [("", *MALFORMED)[fault] for fault in scored.malformed[i].tolist()]
        if i < log_tokens:
            row["tokens"] = [token_strings(model.tokenizer, c.token_ids.tolist()) for c in group.ordered]
            row["logps"] = [[round(logp, 4) for logp in c.logp.tolist()] for c in group.ordered]
        yield row


def _media_row(item: MediaItem) -> dict[str, Any]:
    """Return what the data say of a medium, without what they do not say."""
    fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item) if field.name != "root"}
    return {name: value for name, value in fields.items() if value not in (None, ())}


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds, special tokens included.

    A character whose bytes are spread over several tokens belongs to the last of them; the others add nothing.

    Returns:
        One string per id; joined they are ``tokenizer.decode(ids)``.
    """
    strings: list[str] = []
    # Decoded texts of the tokens since the last complete character: of the first of them, the first two, and so on.
    texts: list[str] = []
    for end in range(1, len(ids) + 1):
        start = end - 1 - len(texts)
        texts.append(tokenizer.decode(list(ids[start:end])))
        if end < len(ids) and texts[-1].endswith("\ufffd"):
            continue  # The next tokens may hold the rest of this character's bytes.
        emitted = 0
        for text in texts:
            settled = max(emitted, _common_prefix_length(text, texts[-1]))
            strings.append(texts[-1][emitted:settled])
            emitted = settled
        texts.clear()
    return strings


def _common_prefix_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _without_media(model: VideoLM, prompt: Prompt) -> Tensor:
    """Return the prompt's ids with each run of media tokens shortened to one, for readability."""
    ids = prompt.input_ids
    pads = torch.isin(ids, torch.tensor([model.special.video_pad, model.special.image_pad]))
    repeated = pads & torch.cat([pads.new_zeros(1), pads[:-1]])
    return ids[~repeated]
