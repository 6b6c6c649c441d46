"""What a rollout engine is asked and what it gives back. Any engine that keeps this protocol can serve the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from videor1.types import Completion, Group, Prompt


@dataclass(frozen=True)
class SamplingOptions:
    """How a completion is drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off


class RolloutError(Exception):
    """An engine that cannot go on: a dead server, say. Says what was asked of whom, and what came back."""


@dataclass(frozen=True)
class Branch:
    """``count`` answers to a prompt seen in one order of its frames.

    Row i draws its random numbers from (the request's seed, ``names``, i): whatever else is in flight, it draws the
    same.
    """

    count: int
    names: tuple[str | int, ...]
    features: Tensor | None = None  # [tokens, H] of the prompt's media in this branch's order; None: text, or no need
    permutation: tuple[int, ...] | None = None  # of the frames or temporal patches; None: in order


class Judge(Protocol):
    """Tells an engine whether the shuffled branch of one request can still change the advantages.

    An engine tells it each finished answer; the order in which it hears of them is free.
    """

    def ordered_done(self, answer: Completion) -> None: ...

    def shuffled_done(self, answer: Completion) -> None: ...

    @property
    def needed(self) -> bool | None:
        """True: the shuffled answers matter; False: they cannot; None: not decided by what has been heard."""
        ...


@dataclass(frozen=True)
class Request:
    """One prompt and the answers wanted."""

    prompt: Prompt
    seed: int
    ordered: Branch
    shuffled: Branch | None = None
    judge: Judge | None = None  # None: every answer is run to its end


@dataclass
class RolloutStats:
    """What an engine did, summed over a call. A row step is one row in one decode step."""

    tokens: int = 0  # sampled, those of stopped answers included
    decode_steps: int = 0
    row_steps: int = 0
    shuffled_asked: int = 0  # shuffled answers that requests asked for
    shuffled_skipped: int = 0  # of these: never started
    shuffled_stopped: int = 0  # of these: started and stopped before their end
    kv_bytes: int = 0  # preallocated
    retries: int = 0  # of a server's requests


@dataclass(frozen=True)
class Rollout:
    """Answers to requests, in their order."""

    groups: list[Group | None]  # None: this request failed
    stats: RolloutStats = field(default_factory=RolloutStats)
    failed: dict[int, str] = field(default_factory=dict)  # index of a failed request -> why


class RolloutEngine(Protocol):
    """Answers requests with the current weights of the policy."""

    needs_features: bool  # whether branches must bring their vision features

    def generate(self, requests: Sequence[Request]) -> Rollout:
        """All answers. Raises RolloutError where the engine as a whole cannot go on."""
        ...

    def weights_changed(self) -> None:
        """The policy's weights are new: what is computed from now on must come from them."""
        ...

    def close(self) -> None:
        """Free what the engine holds; repeatable."""
        ...
