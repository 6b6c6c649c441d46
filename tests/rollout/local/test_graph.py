"""Graphed decode steps: what is captured when, for which batches, and that nothing outlives its rollout."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rollouts import IMAGE, TEXT, answer, ask, rig
from test_engine import answers, assert_same
from tiny import make_lm, make_model, make_tokenizer
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout import LocalEngine, SamplingOptions
from videor1.rollout.local import engine
from videor1.rollout.local.graph import GraphedSteps
from videor1.rollout.local.kv_cache import KVCache
from videor1.rollout.local.step import Batch, DecodeStep
from videor1.types import Prompt
from videor1_kernels import last_backend


class Graph:
    """In place of a CUDA graph: ``replay`` does again what was captured, on what its inputs hold by then."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Tensor]] = []
        self.results: list[Tensor] = []

    def replay(self) -> None:
        for call, result in zip(self.work, self.results, strict=True):
            result.copy_(call())


class Graphs:
    """In place of ``CudaGraphs``; a step given to :meth:`watch` is recorded while a capture lasts."""

    def __init__(self, log: list[str] | None = None) -> None:
        self.log = [] if log is None else log
        self.graph: Graph | None = None

    def new(self) -> Graph:
        return Graph()

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        self.log.append("warm-up")
        yield

    @contextlib.contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        self.log.append("capture")
        self.graph = graph
        yield
        self.graph = None

    def watch(self, step: DecodeStep) -> Callable[[Batch], Tensor]:
        def call(batch: Batch) -> Tensor:
            if self.graph is None:
                return step(batch)
            # A capture runs nothing: its result is memory that a replay fills.
            self.graph.work.append(lambda: step(batch))
            self.graph.results.append(torch.full((2, len(batch.tokens)), torch.nan, dtype=torch.float64))
            return self.graph.results[-1]

        return call


@pytest.fixture
def graphed() -> Iterator[list[str]]:
    """Engines capture their steps on this machine; -> the log of warm-ups and captures."""
    log: list[str] = []

    def steps(step: DecodeStep, spare: int | None) -> GraphedSteps:
        graphs = Graphs(log)
        return GraphedSteps(graphs.watch(step), graphs, spare=spare)

    def capturable(self: DecodeStep, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.capturable = True

    start = DecodeStep.__init__
    with patch.object(DecodeStep, "__init__", capturable), patch.object(engine, "GraphedSteps", steps):
        yield log


def test_graphed_steps_answer_as_plain_ones(graphed: list[str]) -> None:
    """On the kernels, which read nothing but a graph's inputs; a batch is filled up, and its first row leaves."""
    model = VideoLM(make_model(num_hidden_layers=1), make_tokenizer(), source="tiny", position_rule="paper")
    rig(model, model.special.eos, 5.0)
    options = SamplingOptions(3)

    def lengths(prompt: Prompt, count: int, seed: int) -> list[int]:
        return [len(c.token_ids) for c in answer(model, [ask(model, prompt, count, seed)], options)[0]]

    first_leaves = next(s for s in range(1000) if 1 < (n := lengths(TEXT, 3, s))[0] < min(n[1:]))
    goes_on = next(s for s in range(1000) if lengths(IMAGE, 1, s)[0] > 1)
    requests = [ask(model, TEXT, 3, first_leaves), ask(model, IMAGE, 1, goes_on)]
    graphed.clear()
    plain = LocalEngine(model, options, cuda_graphs=False).generate(requests)
    assert not graphed
    replayed = LocalEngine(model, options, max_rows=3, backend="triton").generate(requests)
    assert last_backend("prefix_decode_attention") == last_backend("sample_tokens") == "triton"
    assert_same(answers(replayed), answers(plain))
    assert graphed == ["warm-up", "capture"] * 2  # for 4 rows and for 1, each once


def test_memory_is_gone_when_a_rollout_returns(graphed: list[str]) -> None:
    """Without a collection of cycles: after twenty rollouts as much is alive as after one."""
    caches: list[weakref.ref[Tensor]] = []
    start = KVCache.__init__

    def watched(self: KVCache, *args: Any) -> None:
        start(self, *args)
        caches.extend(weakref.ref(layers[0]) for layers in (self.prefix_k, self.suffix_k))

    model = make_lm()
    requests = [ask(model, TEXT, 2)]
    gc.collect()
    gc.disable()
    try:
        with patch.object(KVCache, "__init__", watched):
            for _ in range(20):
                LocalEngine(model, SamplingOptions(3)).generate(requests)
                assert not [cache for cache in caches if cache() is not None]
    finally:
        gc.enable()
    assert len(caches) == 40
    assert graphed.count("capture") == 20


def test_sizes() -> None:
    steps = GraphedSteps(lambda _: pytest.fail("not run"), Graphs())
    assert [steps.size(n) for n in (1, 3, 12, 13, 512, 513, 1025)] == [1, 4, 12, 16, 512, 1024, 1536]
    steps._captured = {12: None, 32: None}  # type: ignore[dict-item]
    assert [steps.size(n) for n in (12, 9, 7, 6, 5, 4, 17, 16, 13)] == [12, 12, 12, 12, 12, 4, 32, 32, 32]
