"""The protocol of rollout engines: their requests, their results and their methods.

The trainer works with any engine that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from videor1.rewards.slow import SlowCounts
from videor1.types import Completion, Group, Orders, Prompt


@dataclass(frozen=True)
class SamplingOptions:
    """The options by which a completion's tokens are sampled."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off


class RolloutError(Exception):
    """The engine as a whole cannot go on, for instance because its server does not respond.

    The message says what was requested, from where, and what was received.
    """


@dataclass(frozen=True)
class Branch:
    """The completions of a prompt that see its frames in one order.

    Completion i draws its random numbers from (the request's seed, ``names``, i), so that they do not depend on what
    else is in flight.
    """

    count: int  # number of completions
    names: tuple[str | int, ...]  # part of the seed
    features: Tensor | None = None  # [tokens, H] of the media in this order; None: no media, or not needed
    permutation: Orders | None = None  # of the frames or temporal patches; None: in order


class Judge(Protocol):
    """Decides whether the shuffled branch of one request can still change the advantages.

    The engine reports each finished completion to it, in any order.
    """

    def ordered_done(self, completion: Completion) -> None:
        """Take note of a finished completion from ordered frames."""

    def shuffled_done(self, completion: Completion) -> None:
        """Take note of a finished completion from shuffled frames."""

    @property
    def needed(self) -> bool | None:
        """True: the shuffled completions matter; False: they cannot; None: the reported ones do not decide it yet."""
        ...


class LateScores(Protocol):
    """The scores of completions that a judge was told of, and that are still worked out.

    They do not change what the judge needs before the engine settles them.
    """

    @property
    def unsettled(self) -> Sequence[Future[Any]]:
        """Those that the judge does not take into account yet."""
        ...

    def settle(self, *, wait: bool) -> None:
        """Have the judge take them into account: all of them, once they have arrived (``wait``), or those that have."""


@dataclass(frozen=True)
class Request:
    """A prompt and the completions to sample of it."""

    prompt: Prompt
    seed: int
    ordered: Branch
    shuffled: Branch | None = None
    judge: Judge | None = None  # None: every completion is sampled to its end
    late: LateScores | None = None  # None: the judge knows each score at once


@dataclass
class RolloutStats:
    """The work that an engine did in one call."""

    tokens: int = 0  # sampled tokens, those of stopped completions included
    decode_steps: int = 0
    row_steps: int = 0  # one sequence in one decode step counts as one
    shuffled_asked: int = 0  # shuffled completions that were requested
    shuffled_skipped: int = 0  # of these: never started
    shuffled_stopped: int = 0  # of these: started, and stopped before their end
    kv_bytes: int = 0  # size of the preallocated KV cache
    retries: int = 0  # repeated requests to a server


@dataclass(frozen=True)
class Rollout:
    """The completions of a list of requests, in the order of the requests."""

    groups: list[Group | None]  # None: this request failed
    stats: RolloutStats = field(default_factory=RolloutStats)
    failed: dict[int, str] = field(default_factory=dict)  # index of a failed request -> the reason
    slow: SlowCounts = field(default_factory=SlowCounts)  # of the rewards that take time


class RolloutEngine(Protocol):
    """Samples completions with the current weights of the policy."""

    needs_features: bool  # whether branches must bring their vision features

    def generate(self, requests: Sequence[Request]) -> Rollout:
        """Sample the completions of all requests.

        Raises:
            RolloutError: the engine as a whole cannot go on.
        """
        ...

    def weights_changed(self) -> None:
        """Tell the engine that the policy's weights have changed: it must sample with the new ones from now on."""
        ...

    def close(self) -> None:
        """Free the engine's resources; may be called more than once."""
        ...
