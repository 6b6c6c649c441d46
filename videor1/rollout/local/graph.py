"""Decode steps as CUDA graphs: a step of hundreds of small kernels becomes one launch.

A graph is captured for a number of rows and replayed with other rows by writing into its inputs; a batch between two
sizes is filled up with copies of its first row, which write what that row writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1.rollout.local.step import StepInputs

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows of a graph; above: multiples of 512

StepFunction = Callable[[StepInputs], tuple[Tensor, Tensor]]


@dataclass
class Captured:
    """A step whose work is done again by ``replay``, on what then stands in ``inputs``."""

    inputs: StepInputs
    outputs: tuple[Tensor, Tensor]
    replay: Callable[[], None]
    source: Any = None  # the layout that was copied in last


class GraphedSteps:
    """Callable as the step it wraps, with rows filled up to a size of which there is a graph.

    Args:
        step: must not wait for the device.
        capture: makes a :class:`Captured` of the step and its inputs; given by tests.
    """

    def __init__(
        self, step: StepFunction, capture: Callable[[StepFunction, StepInputs], Captured] | None = None
    ) -> None:
        self._step = step
        self._pool: Any = None
        self._capture = capture or self._on_cuda
        self._captured: dict[int, Captured] = {}

    def size(self, rows: int) -> int:
        """Rows that a batch of ``rows`` is filled up to: those of an existing graph, unless it is twice too large."""
        wanted = next((size for size in SIZES if size >= rows), -(-rows // SIZES[-1]) * SIZES[-1])
        return min((size for size in self._captured if wanted <= size <= 2 * wanted), default=wanted)

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        rows = len(inputs.tokens)
        if rows not in self._captured:
            self._captured[rows] = self._capture(self._step, inputs)
        held = self._captured[rows]
        for name in ("tokens", "positions", "lengths", "uniform"):
            getattr(held.inputs, name).copy_(getattr(inputs, name))
        if held.source is not inputs.layout:
            held.inputs.layout.copy_(inputs.layout)
            held.source = inputs.layout
        held.replay()
        return held.outputs

    def _on_cuda(self, step: StepFunction, inputs: StepInputs) -> Captured:
        held = inputs.clone()
        # Twice before the capture, on a stream of its own: kernels compile, workspaces are made, weights are cast. The
        # same inputs give the same keys and values, so the cache ends as after one step.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = step(held)
        self._pool = graph.pool()
        return Captured(held, outputs, graph.replay)
