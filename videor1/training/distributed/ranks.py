"""The processes of a run: this one alone (``Ranks``), or several on DeepSpeed's ZeRO (``zero.py``).

Every rank draws different samples, samples completions with the whole weights, and adds its rows to the gradient of one
step. All ranks take the same decisions: anything that a decision depends on is gathered from all ranks first.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from videor1.side_by_side import side_by_side, threads
from videor1.training.optim import guarded_step, load_state_tensors, state_tensors

T = TypeVar("T")


class Update(NamedTuple):
    """The result of an optimizer step."""

    loss: float  # sum over all ranks
    grad_norm: float  # before clipping; NaN where the loss was not finite
    finite: bool  # False: a loss or gradient was not finite, and no weight was changed


class Ranks:
    """A run of one process; ``ZeroRanks`` has the same methods."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self._optimizer: Any = None  # from :meth:`prepare` on
        self._max_grad_norm = math.inf
        self._random = False  # whether a training pass draws random numbers, in an order that must stay

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in the order of ranks."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self.gather(value)[0]

    def on_every_rank(self, call: Callable[[], T]) -> T:
        """Call ``call`` on every rank; if it raises on one of them, all ranks raise that exception."""
        try:
            outcome, error = call(), None
        except Exception as caught:
            outcome, error = None, caught
        for failure in self.gather(error):
            if failure is not None:
                raise failure
        return outcome  # type: ignore[return-value]

    def on_main(self, call: Callable[[], T]) -> T:
        """Call ``call`` on rank 0; every rank returns its result, or raises its exception."""
        return self.broadcast(self.on_every_rank(lambda: call() if self.is_main else None))  # type: ignore[return-value]

    def prepare(self, hf: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """Set the model and its optimizer; called once, before the first step."""
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in hf.modules())

    @property
    def partitioned(self) -> bool:
        """Whether a rank holds only its part of each parameter."""
        return False

    def gathered(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which these parameters are whole, to be copied and not used by their modules."""
        return contextlib.nullcontext()

    def gathered_parameters(
        self, held: Mapping[nn.Parameter, Tensor] = MappingProxyType({})
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every parameter is whole on this rank, and no rank waits for another.

        It is for inference only.

        Args:
            held: parameters whose whole values are on this rank already, with those: they are not gathered.
        """
        return contextlib.nullcontext()

    def update(
        self,
        losses: Sequence[Callable[[], Tensor]],
        dummy_loss: Callable[[], Tensor],
        parameters: dict[str, nn.Parameter],
        rate: float,
    ) -> Update:
        """Make one optimizer step on the sum of all ranks' losses.

        Args:
            losses: compute the losses of this rank's rows, each once at most; on a CPU several at a time.
            dummy_loss: returns a loss of 0 that depends on every trained parameter, for ranks with fewer rows.
            parameters: the trained parameters by name.
            rate: learning rate.
        """
        total = 0.0
        for loss in self._differentiated(losses, list(parameters.values())):
            total += loss
            if not math.isfinite(total):
                self._optimizer.zero_grad(set_to_none=True)
                return Update(total, math.nan, False)
        norm, finite = guarded_step(self._optimizer, parameters, rate, self._max_grad_norm)
        return Update(total, norm, finite)

    def _differentiated(
        self, losses: Sequence[Callable[[], Tensor]], parameters: Sequence[nn.Parameter]
    ) -> Iterator[float]:
        """Yield each loss, and add its gradient to the parameters' before the next.

        On a CPU several rows are differentiated side by side; their gradients are added in the order of the rows, with
        the same sums as one after the other.
        """
        device = parameters[0].device
        if self._random or device.type != "cpu" or threads() < 2:
            for compute in losses:
                loss = compute()
                yield float(loss.detach())
                if loss.requires_grad:
                    loss.backward()
            return

        def gradients(compute: Callable[[], Tensor]) -> tuple[float, Sequence[Tensor]]:
            loss = compute()
            found = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
            return float(loss.detach()), found

        for start in range(0, len(losses), threads()):  # so that no more gradients than these are in memory
            some = losses[start : start + threads()]
            for value, gradient in side_by_side([functools.partial(gradients, call) for call in some], device):
                yield value
                for parameter, own in zip(parameters, gradient, strict=bool(gradient)):
                    if own is None:
                        continue
                    if parameter.grad is None:
                        parameter.grad = torch.empty_like(parameter).copy_(own)
                    else:
                        parameter.grad.add_(own)

    def trainer_tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the part of the optimizer's state that this rank writes, named as by ``optim.state_tensors``."""
        return state_tensors(self._optimizer, parameters)

    def load_trainer_tensors(self, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
        """Load the optimizer's state from the :meth:`trainer_tensors` of all ranks together."""
        moments = {key: value for key, value in tensors.items() if not key.endswith("/master")}
        load_state_tensors(self._optimizer, parameters, moments)

    def close(self, *, failed: bool) -> None:
        """Leave the run; if this rank has ``failed``, the other ranks end too."""


def start_position(saved: Any, shard: tuple[int, int]) -> Any:
    """Return the position at which a rank's source begins in a resumed run.

    It is what this rank saved itself or, where the number of ranks has changed, its share of all draws so far.

    Args:
        saved: the checkpoint's position: one, or a list with one per rank.
        shard: (rank, number of ranks) of this process.
    """
    rank, world = shard
    positions = saved if isinstance(saved, list) else [saved]
    if len(positions) == world:
        return positions[rank]
    if not all(isinstance(position, int) for position in positions):
        return positions[0]  # A stream's position: the stream itself refuses another number of ranks.
    return (sum(positions) - rank + world - 1) // world
