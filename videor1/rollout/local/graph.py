"""Decode steps as CUDA graphs: a step of hundreds of small kernels becomes one launch.

A graph is captured for a number of sequences, and replayed for others by writing into its inputs. A batch between two
sizes is padded with copies of its first sequence, which write to the cache what that one writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1.rollout.local.step import StepInputs

# Batch sizes of the graphs; above the last one, its multiples.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

StepFunction = Callable[[StepInputs], tuple[Tensor, Tensor]]


@dataclass
class Captured:
    """A captured step: ``replay`` runs it again on the current contents of ``inputs``."""

    inputs: StepInputs
    outputs: tuple[Tensor, Tensor]
    replay: Callable[[], None]
    source: Any = None  # the layout that was last copied into the inputs


class GraphedSteps:
    """Runs decode steps as CUDA graphs; called like the step it wraps, with a batch padded to :meth:`size`.

    Args:
        step: the step; it must not wait for the device.
        capture: makes a :class:`Captured` of the step and its inputs; None captures a CUDA graph (tests replace it).
    """

    def __init__(
        self, step: StepFunction, capture: Callable[[StepFunction, StepInputs], Captured] | None = None
    ) -> None:
        self._step = step
        self._pool: Any = None
        self._capture = capture or self._capture_cuda_graph
        self._captured: dict[int, Captured] = {}

    def size(self, count: int) -> int:
        """Return the size that a batch of ``count`` sequences is padded to.

        It is the smallest existing graph that is large enough, unless that is more than twice as large as needed.
        """
        smallest = next((size for size in SIZES if size >= count), -(-count // SIZES[-1]) * SIZES[-1])
        return min((size for size in self._captured if smallest <= size <= 2 * smallest), default=smallest)

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        size = len(inputs.tokens)
        if size not in self._captured:
            self._captured[size] = self._capture(self._step, inputs)
        captured = self._captured[size]
        for name in ("tokens", "positions", "lengths", "uniform"):
            getattr(captured.inputs, name).copy_(getattr(inputs, name))
        if captured.source is not inputs.layout:
            captured.inputs.layout.copy_(inputs.layout)
            captured.source = inputs.layout
        captured.replay()
        return captured.outputs

    def _capture_cuda_graph(self, step: StepFunction, inputs: StepInputs) -> Captured:
        static_inputs = inputs.clone()
        # The step runs twice before the capture, on a separate stream, so that kernels are compiled, workspaces
        # allocated and weights cast. The same inputs give the same keys and values, so that the cache is as after one
        # step.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(static_inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = step(static_inputs)
        self._pool = graph.pool()
        return Captured(static_inputs, outputs, graph.replay)
