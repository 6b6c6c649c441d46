"""Decode steps as CUDA graphs: a step of hundreds of small kernels becomes one launch.

A graph is captured for a number of sequences, and replayed for others by writing into its batch, which it advances by
itself. A batch between two sizes is padded with copies of its first sequence, which write to the cache what that one
writes; where a step changes states, they have a slot of their own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from videor1.rollout.local.step import Batch

# Batch sizes of the graphs; above the last one, its multiples.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

StepFunction = Callable[[Batch], Tensor]


class Graphs(Protocol):
    """Makes graphs of what runs in a context; :class:`CudaGraphs` on a GPU."""

    def warm_up(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context for what must run before a capture: kernels are compiled, workspaces allocated."""

    def capture(self, graph: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose work goes into ``graph``."""

    def new(self) -> Any:
        """Return an empty graph, whose ``replay()`` does its work again."""


class CudaGraphs:
    """CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def warm_up(self) -> Any:
        current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            yield
        current.wait_stream(side)

    def capture(self, graph: torch.cuda.CUDAGraph) -> contextlib.AbstractContextManager[Any]:
        # Threads of other libraries, such as NCCL's watchdog, may call CUDA meanwhile.
        stream = _side_stream(torch.cuda.current_device())
        return torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")

    def new(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph()


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all warm-ups and captures: cuBLAS keeps a workspace of 32 MiB for every stream."""
    return torch.cuda.Stream(device)


@dataclass
class Captured:
    """A captured step: ``graph.replay()`` runs it again on ``batch``, which it advances."""

    batch: Batch
    output: Tensor
    graph: Any


class GraphedSteps:
    """Runs decode steps as CUDA graphs, on batches padded to :meth:`size`.

    Nothing here refers to itself: graphs and the KV cache are freed as soon as the last reference to this is gone.

    Args:
        step: the step; it must not wait for the device.
        graphs: makes the graphs; None: CUDA graphs.
        spare: a slot of the cache that belongs to no sequence, where a step changes what it reads (states of linear
            attention): what runs before a capture has to leave the sequences' own as they are.
    """

    def __init__(self, step: StepFunction, graphs: Graphs | None = None, *, spare: int | None = None) -> None:
        self._step, self._spare = step, spare
        self._graphs = CudaGraphs() if graphs is None else graphs
        self._captured: dict[int, Captured] = {}

    def size(self, count: int) -> int:
        """Return the size that a batch of ``count`` sequences is padded to.

        It is the smallest existing graph that is large enough, unless that is more than twice as large as needed.
        """
        smallest = next((size for size in SIZES if size >= count), -(-count // SIZES[-1]) * SIZES[-1])
        return min((size for size in self._captured if smallest <= size <= 2 * smallest), default=smallest)

    def __call__(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Return the step's output, which the next call overwrites, and the batch that the step has advanced."""
        size = len(batch.tokens)
        if size not in self._captured:
            self._captured[size] = self._capture(batch)
        captured = self._captured[size]
        if batch is not captured.batch:
            captured.batch.copy_(batch)
        captured.graph.replay()
        return captured.output, captured.batch

    def _capture(self, batch: Batch) -> Captured:
        """Capture the step for this size, on a batch of its own.

        It runs twice before. The same inputs give the same keys and values, so that the cache is as after one step;
        with states, all rows have the spare slot until the replay gives them their own.
        """
        own, graph = replace(batch.clone(), layout=batch.layout.clone()), self._graphs.new()
        if self._spare is not None and own.layout.suffix_slots is not None:
            own.layout.suffix_slots.fill_(self._spare)
        with self._graphs.warm_up():
            for _ in range(2):
                self._step(own.clone())
        with self._graphs.capture(graph):
            output = self._step(own)
        return Captured(own, output, graph)
