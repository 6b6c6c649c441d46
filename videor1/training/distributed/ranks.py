"""Who takes part in a run: this process alone (``Ranks``), or many on DeepSpeed's ZeRO (``zero.py``).

Every rank draws other samples, answers them with the whole weights, and adds its rows to the gradient of one step. All
ranks take the same decisions: what one of them knows is gathered before it decides anything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from videor1.training.optim import guarded_step, load_state_tensors, state_tensors

T = TypeVar("T")


class Update(NamedTuple):
    """What became of a step."""

    loss: float  # of all ranks
    grad_norm: float  # before clipping; NaN where the loss was not finite
    finite: bool  # False: nothing was changed


class Ranks:
    """A run of one process; ``ZeroRanks`` has the same methods."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self._optimizer: Any = None  # from :meth:`prepare` on
        self._max_grad_norm = math.inf

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        return self.gather(value)[0]

    def on_every_rank(self, call: Callable[[], T]) -> T:
        """Call it on every rank; what one of them raises, all raise."""
        try:
            outcome, error = call(), None
        except Exception as caught:
            outcome, error = None, caught
        for failure in self.gather(error):
            if failure is not None:
                raise failure
        return outcome  # type: ignore[return-value]

    def on_main(self, call: Callable[[], T]) -> T:
        """Call it on rank 0; every rank has what it returns, or raises what it raises."""
        return self.broadcast(self.on_every_rank(lambda: call() if self.is_main else None))  # type: ignore[return-value]

    def prepare(self, hf: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """Take over a model and its optimizer, once, before the first step."""
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm

    def gathered_parameters(self) -> contextlib.AbstractContextManager[None]:
        """Inside, every parameter is whole on this rank, and no rank waits for another; for inference only."""
        return contextlib.nullcontext()

    def update(
        self, losses: Iterator[Tensor], count: int, dummy_loss: Callable[[], Tensor],
        parameters: dict[str, nn.Parameter], rate: float,
    ) -> Update:  # fmt: skip
        """One optimizer step from the sum of all ranks' losses.

        Args:
            losses: of this rank's rows, computed one by one as they are asked for.
            count: how many.
            dummy_loss: a loss that touches every trained parameter and weighs nothing, for ranks with fewer rows.
            parameters: the trained ones.
            rate: learning rate.
        """
        total = 0.0
        for loss in losses:
            total += float(loss.detach())
            if not math.isfinite(total):
                self._optimizer.zero_grad(set_to_none=True)
                return Update(total, math.nan, False)
            if loss.requires_grad:
                loss.backward()
        norm, finite = guarded_step(self._optimizer, parameters, rate, self._max_grad_norm)
        return Update(total, norm, finite)

    def trainer_tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The optimizer's state that this rank writes, as ``optim.state_tensors`` names it."""
        return state_tensors(self._optimizer, parameters)

    def load_trainer_tensors(self, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
        """The inverse, from all ranks' tensors."""
        moments = {key: value for key, value in tensors.items() if not key.endswith("/master")}
        load_state_tensors(self._optimizer, parameters, moments)

    def close(self, *, failed: bool) -> None:
        """Leave the group; the others end too if this rank has failed."""


def start_of(saved: Any, shard: tuple[int, int]) -> Any:
    """Where a rank's source begins: what it saved itself, or its part of what another number of ranks had drawn."""
    rank, world = shard
    positions = saved if isinstance(saved, list) else [saved]
    if len(positions) == world:
        return positions[rank]
    if not all(isinstance(position, int) for position in positions):
        return positions[0]  # of a stream, which says that it cannot go on with another number of ranks
    return (sum(positions) - rank + world - 1) // world
