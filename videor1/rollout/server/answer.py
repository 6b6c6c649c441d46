"""Checking a server's chat completion (JSON) and converting it to a Completion."""

from __future__ import annotations

import math
import reprlib
import warnings
from typing import Any

import torch

from videor1.model.prompts import SpecialIds
from videor1.remote.client import RequestFailed, quoted
from videor1.rollout.protocol import RolloutError, SamplingOptions
from videor1.types import Completion, Prompt

_ROUNDING = 1e-3  # by which a server's kernels may put the log-prob of a certain token above 0


def logp_warning(options: SamplingOptions) -> str | None:
    """Return what to tell where a server's log-probs cannot be those of what was sampled; None where they can.

    vLLM (by default) and SGLang return log-probs at temperature 1 before top-p and top-k. The trainer's are at the
    sampling temperature, and ignore top-p and top-k as well.
    """
    if options.temperature not in (0.0, 1.0):
        return (
            f"temperature {options.temperature:g}: a server returns log-probs at temperature 1, which are not those of "
            "what was sampled; they are not used, so that sampling/* has no values and nothing can be corrected by them"
        )
    cut = [f"top_p {options.top_p:g}"] * (options.top_p < 1) + [f"top_k {options.top_k}"] * (options.top_k > 0)
    if cut and options.temperature:
        return (
            f"{', '.join(cut)}: a server returns log-probs of the whole distribution, and tokens were sampled from a "
            "part of it; sampling/* compares whole ones, and top_p 1 and top_k 0 make them those of what was sampled"
        )
    return None


class AnswerReader:
    """Converts the replies of one server to completions."""

    def __init__(self, tokenizer: Any, special: SpecialIds, options: SamplingOptions) -> None:
        self._tokenizer, self._special, self._most = tokenizer, special, options.max_new_tokens
        self._vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._stops = (special.eos, special.pad)
        # Servers return log-probs at temperature 1; the trainer's are at the sampling temperature (or 1 where it is 0).
        self.logp_usable = options.temperature in (0.0, 1.0)
        self._warned = False

    def read(self, reply: Any, prompt: Prompt) -> Completion:
        """Return the completion in a reply.

        If it finished, its token_ids end with EOS, which is appended where the server leaves it out.

        Raises:
            RequestFailed: the reply is not one complete, valid completion.
            RolloutError: the server has read another prompt than the one that was sent.
        """
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise RequestFailed(f"expected a chat completion of one choice, got {quoted(reply)}")
        choice = choices[0]
        seen = reply.get("prompt_token_ids") or choice.get("prompt_token_ids")  # vLLM, SGLang
        if isinstance(seen, list):
            if not all(type(i) is int for i in seen):
                raise RequestFailed(f"expected the prompt's token ids, got {quoted(seen)}")
            self._check_prompt(seen, prompt)
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise RequestFailed(f"the answer ended with finish_reason {reprlib.repr(reason)}, expected stop or length")

        ids = self._token_ids(choice)
        logp = self._logp(choice, len(ids))
        if reason == "stop" and (not ids or ids[-1] not in self._stops):
            ids, logp = [*ids, self._special.eos], [*logp, math.nan]
        self._check_tokens(ids)
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(torch.tensor(ids), torch.tensor(logp, dtype=torch.float32), reason == "stop", text)

    def _token_ids(self, choice: dict[str, Any]) -> list[int]:
        ids = next((choice[k] for k in ("token_ids", "response_token_ids") if choice.get(k) is not None), None)
        if ids is not None:  # The first name is vLLM's, the second is SGLang's.
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self._vocabulary for i in ids):
                raise RequestFailed(f"expected token ids below {self._vocabulary}, got {quoted(ids)}")
            return ids
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        # vLLM's and SGLang's names of what their parsers take out of the content, tags included.
        if isinstance(message, dict) and (message.get("reasoning") or message.get("reasoning_content")):
            raise RequestFailed(
                "the server returns no token ids, and took the reasoning out of the answer's text, so that what was "
                "sampled is not known: start it without a reasoning parser"
            )
        if not isinstance(text, str):
            raise RequestFailed(f"expected an answer's text or token_ids, got {quoted(choice)}")
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the server does not return token ids: answers are encoded again from their text, which need not give "
                "the tokens that were sampled (use vLLM 0.19 or newer)",
                stacklevel=2,
            )
        try:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # Which kind it is depends on the tokenizer.
            raise RequestFailed(f"the tokenizer cannot encode the answer's text: {quoted(str(error))}") from None

    def _logp(self, choice: dict[str, Any], count: int) -> list[float]:
        """Return one log-prob per token; NaN where the server returned none."""
        logprobs = choice.get("logprobs")
        if not self.logp_usable or logprobs is None:
            return [math.nan] * count
        try:
            logp = [_log_prob(entry["logprob"]) for entry in logprobs["content"]]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RequestFailed(f"expected log-probs, got {quoted(logprobs)}") from None
        return logp if len(logp) == count else [math.nan] * count

    def _check_tokens(self, ids: list[int]) -> None:
        if not ids:
            raise RequestFailed("the answer has no tokens")
        if len(ids) > self._most:
            raise RequestFailed(f"the answer has {len(ids)} tokens, of {self._most} that were asked for")
        if banned := sorted(set(ids) & set(self._special.vision)):
            names = ", ".join(map(str, self._tokenizer.convert_ids_to_tokens(banned)))
            raise RequestFailed(f"the answer holds {names}, which logit_bias bans")
        if any(i in self._stops for i in ids[:-1]):
            raise RequestFailed("the answer goes on after a token that ends it")

    def _check_prompt(self, seen: list[int], prompt: Prompt) -> None:
        """Check that the server has read this prompt.

        Only the number of media tokens is compared, since SGLang replaces their ids by hashes.

        Raises:
            RolloutError: it has not.
        """
        ours, pads = prompt.input_ids.tolist(), (self._special.video_pad, self._special.image_pad)
        media = sum(i in pads for i in ours)
        differs = [at for at, (a, b) in enumerate(zip(seen, ours, strict=False)) if a != b and b not in pads]
        if len(seen) == len(ours) and not differs:
            return
        where = f"; they differ from token {differs[0]} on" if differs else ""
        raise RolloutError(
            f"problem {prompt.sample.problem_id}: the server's prompt has {len(seen)} tokens, ours {len(ours)} "
            f"({media} of them media){where}. It must serve this model's tokenizer and chat template, and neither "
            "resize nor resample: see videor1.rollout.server.engine"
        )


def _log_prob(value: Any) -> float:
    """Return a log-prob of a reply as a float; raise a ValueError for what cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value <= _ROUNDING:
        raise ValueError(value)
    return min(float(value), 0.0)
