"""Answers that the data bring: they take slots of a prompt's group, beside those that the policy samples."""

from __future__ import annotations

import torch

from videor1.answer import left_to_write
from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.model.prompts import check_no_special_tokens, encode, special_ids
from videor1.types import Completion, Sample, SampleError


def offline_completions(model: VideoLM, sample: Sample, config: TrainConfig) -> tuple[tuple[Completion, ...], int]:
    """Return a sample's own answers as completions of its prompt, and how many are left out.

    They end with EOS, and their log-probs at sampling are not known (NaN). In the order of the data they take
    ``config.num_offline`` slots at most, and never all. Those for which there is no slot are left out, and those of
    more than ``config.max_completion_length`` tokens.

    Raises:
        SampleError: ``completions`` for an answer that does not begin as the chat template opens it;
            ``special_token`` and ``bad_text`` as of a prompt.
    """
    slots = config.num_generations - 1 if config.num_offline is None else config.num_offline
    found: list[Completion] = []
    for number, answer in enumerate(sample.completions):
        if len(found) == slots:
            break
        text = left_to_write(model.opened_text, answer.text.strip())
        if text is None:
            raise SampleError(
                "completions",
                f"problem {sample.problem_id}: the chat template opens an answer with {model.opened_text!r}, so that "
                f"completions[{number}].text must begin with it, got {answer.text[:60]!r}",
                sample.path,
            )
        check_no_special_tokens(model.tokenizer, sample, text)
        ids = [*encode(model.tokenizer, text, sample), special_ids(model.tokenizer).eos]
        if len(ids) <= config.max_completion_length:
            unknown = torch.full((len(ids),), torch.nan)
            found.append(Completion(torch.tensor(ids), unknown, True, text, answer.source))
    return tuple(found), len(sample.completions) - len(found)
