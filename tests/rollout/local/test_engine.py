"""The in-process engine: what is computed how often, in how much memory, and that none of it shows in the answers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
from rollouts import ask
from test_answers import IMAGE, TEXT, VIDEO, rig
from test_scheduler import Verdict
from tiny import log_prob_rounding, make_lm
from torch import Tensor

import videor1.rollout
import videor1.rollout.local
import videor1.rollout.local.engine
from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.rollout import Branch, LocalEngine, Request, Rollout, SamplingOptions
from videor1.rollout.local.graph import SIZES, Captured, GraphedSteps
from videor1.rollout.local.step import DecodeStep, StepInputs
from videor1.types import Completion
from videor1_kernels import last_backend

OPTIONS = SamplingOptions(9, top_p=0.95)


def both(model: VideoLM, prompt: Any, ordered: int, shuffled: int, judge: Any = None) -> Request:
    """A request with a shuffled branch, which sees the features in another order."""
    request = ask(model, prompt, ordered)
    features = None if request.ordered.features is None else request.ordered.features.flip(0)
    branch = Branch(shuffled, ("shuffled", prompt.draw), features, (1, 0))
    return dataclasses.replace(request, shuffled=branch, judge=judge)


def mixed(model: VideoLM) -> list[Request]:
    return [both(model, VIDEO, 4, 2), ask(model, TEXT, 3), both(model, IMAGE, 2, 1), ask(model, VIDEO, 5, seed=1)]


def answers(rollout: Rollout) -> list[list[Completion]]:
    return [[*group.ordered, *group.shuffled] for group in rollout.groups if group is not None]


def assert_same(a: list[list[Completion]], b: list[list[Completion]]) -> None:
    assert [[c.token_ids.tolist() for c in group] for group in a] == [[c.token_ids.tolist() for c in g] for g in b]
    for one, other in zip((c for g in a for c in g), (c for g in b for c in g), strict=True):
        assert (one.logp - other.logp).abs().max() <= log_prob_rounding(one.logp)
        assert one.finished == other.finished


def ending(seed: int = 0) -> VideoLM:
    """A tiny model whose answers end at many lengths."""
    model = make_lm(seed)
    rig(model, model.special.eos, 5.0)
    return model


TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of K and V, 2 layers, 2 heads of 16, fp32


@pytest.mark.parametrize(
    "engine",
    [
        {"max_rows": 1},
        {"max_rows": 6},
        {"max_rows": 7, "eager": True},
        {"kv_bytes": 190 * TOKEN},
        {"kv_bytes": 400 * TOKEN},
    ],
    ids=str,
)
def test_neither_room_nor_order_shows(engine: dict[str, Any]) -> None:
    model = ending()
    requests = mixed(model)
    whole = LocalEngine(model, OPTIONS).generate(requests)
    assert [len(group) for group in answers(whole)] == [6, 3, 3, 5]
    assert len({len(c.token_ids) for group in answers(whole) for c in group}) >= 4
    tight = LocalEngine(model, OPTIONS, **engine).generate(requests)
    assert_same(answers(tight), answers(whole))
    assert tight.stats.kv_bytes < whole.stats.kv_bytes
    assert tight.stats.decode_steps > whole.stats.decode_steps
    assert tight.stats.row_steps == whole.stats.row_steps
    turned = LocalEngine(model, OPTIONS, **engine).generate(requests[::-1])
    assert_same(answers(turned)[::-1], answers(whole))


def test_a_prompt_is_prefilled_once_and_the_head_sees_its_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, heads = make_lm(), [], []
    model.hf.model.language_model.register_forward_hook(
        lambda _module, _args, out: tokens.append(out.last_hidden_state.shape[1])
    )
    logits = DecodeStep.logits

    def counted(self: DecodeStep, hidden: Tensor) -> Tensor:
        heads.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(DecodeStep, "logits", counted)
    rollout = LocalEngine(model, SamplingOptions(3)).generate([both(model, VIDEO, 8, 4), ask(model, TEXT, 6)])
    assert tokens == [2 * len(VIDEO.input_ids) + len(TEXT.input_ids)]
    assert heads == [3, 18, 18]
    assert rollout.stats.decode_steps == 2
    assert rollout.stats.row_steps <= 2 * 18
    assert rollout.stats.tokens == sum(len(c.token_ids) for group in answers(rollout) for c in group)


def test_prompts_are_prefilled_in_bounded_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = ending(), []
    requests = mixed(model)
    expected = answers(LocalEngine(model, OPTIONS).generate(requests))
    monkeypatch.setattr(videor1.rollout.local.engine, "PREFILL_TOKENS", 2 * len(VIDEO.input_ids) + 1)
    model.hf.model.language_model.register_forward_hook(
        lambda _module, _args, out: tokens.append(out.last_hidden_state.shape[1])
    )
    assert_same(answers(LocalEngine(model, OPTIONS).generate(requests)), expected)
    assert len(tokens) >= 3
    assert max(tokens) <= 2 * len(VIDEO.input_ids) + 1


def test_the_cache_takes_the_shared_amount() -> None:
    model = make_lm()
    rollout = LocalEngine(model, OPTIONS).generate([both(model, VIDEO, 8, 4)])
    assert rollout.stats.kv_bytes == (2 * len(VIDEO.input_ids) + 12 * 9) * TOKEN


def test_a_budget_too_small_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lm()
    monkeypatch.setattr(videor1.rollout.local.engine, "KVCache", lambda *_: pytest.fail("memory was taken"))
    needs = (
        r"kv_mib: 8 completions of up to 9 tokens to a prompt of \d+ tokens need 0\.1\d+ MiB .* budget is 0\.009537 MiB"
    )
    with pytest.raises(ConfigError, match=needs):
        LocalEngine(model, OPTIONS, kv_bytes=10_000).generate([ask(model, VIDEO, 8)])


def test_a_budget_above_the_machines_memory_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lm()
    monkeypatch.setattr(videor1.rollout.local.engine, "KVCache", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(ConfigError, match=r"rollout.kv_mib: expected at most [\d,]+, the memory of this cpu"):
        LocalEngine(model, OPTIONS, kv_bytes=2**60).generate([ask(model, VIDEO, 8)])
    with pytest.raises(ConfigError, match="lower max_completion_length, num_generations"):
        LocalEngine(model, SamplingOptions(2**24), max_rows=2**16).generate([ask(model, VIDEO, 2**16)])


def test_no_request_no_group() -> None:
    assert LocalEngine(make_lm(), OPTIONS).generate([]).groups == []


class After(Verdict):
    """Says ``verdict`` once it has heard of ``count`` answers; None before."""

    def __init__(self, count: int, verdict: bool) -> None:
        super().__init__()
        self._count, self._verdict = count, verdict

    @property  # type: ignore[override]
    def needed(self) -> bool | None:
        return self._verdict if len(self.heard) >= self._count else None

    @needed.setter
    def needed(self, value: bool | None) -> None:
        pass


@pytest.mark.parametrize("eager", [True, False])
def test_shuffled_answers_that_do_not_matter(eager: bool) -> None:
    model = ending()
    plain = [both(model, VIDEO, 6, 3), both(model, IMAGE, 5, 2), both(model, TEXT, 4, 2)]
    whole = LocalEngine(model, OPTIONS, eager=eager).generate(plain)
    judges = [After(2, False), After(3, True), After(5, False)]
    judged = [dataclasses.replace(r, judge=judge) for r, judge in zip(plain, judges, strict=True)]
    rollout = LocalEngine(model, OPTIONS, eager=eager).generate(judged)
    kept = [[c.token_ids.tolist() for c in group] for group in answers(rollout)]
    for group, reference, request in zip(rollout.groups, whole.groups, plain, strict=True):
        assert group is not None
        assert reference is not None
        assert request.shuffled is not None
        assert [c.token_ids.tolist() for c in group.ordered] == [c.token_ids.tolist() for c in reference.ordered]
        ran = [c.token_ids.tolist() for c in group.shuffled]
        assert all(ids in [c.token_ids.tolist() for c in reference.shuffled] for ids in ran)
        assert group.shuffled_asked == request.shuffled.count
        assert group.permutation == (1, 0)
    stats = rollout.stats
    assert len(kept[1]) == 7  # those that matter are all there
    assert stats.shuffled_asked == 7
    missing = sum(map(len, answers(whole))) - sum(map(len, kept))
    assert stats.shuffled_skipped + stats.shuffled_stopped == missing > 0
    assert stats.row_steps < whole.stats.row_steps
    assert (stats.shuffled_stopped > 0) >= eager
    # Each judge has heard of every answer of its group that was finished.
    for judge, group in zip(judges, rollout.groups, strict=True):
        assert group is not None
        assert {id(c) for c in judge.heard} == {id(c) for c in (*group.ordered, *group.shuffled)}


def fake_capture(log: list[int], step: Any, inputs: StepInputs) -> Captured:
    """As a CUDA graph: later replays see only what is written into the captured inputs."""
    held = inputs.clone()
    outputs = step(held)
    log.append(len(held.tokens))

    def replay() -> None:
        for old, new in zip(outputs, step(held), strict=True):
            old.copy_(new)

    return Captured(held, outputs, replay)


def test_graphed_steps_answer_as_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the kernels, which read nothing but a graph's inputs; batches between two sizes are filled up."""
    model, sizes = ending(), []
    options = SamplingOptions(4)
    requests = [both(model, VIDEO, 3, 1), ask(model, TEXT, 2)]
    plain = LocalEngine(model, options).generate(requests)
    engine = functools.partial(LocalEngine, model, options, max_rows=5, backend="triton")

    def capturable(self: DecodeStep, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.capturable = True

    start = DecodeStep.__init__
    monkeypatch.setattr(DecodeStep, "__init__", capturable)
    monkeypatch.setattr(
        videor1.rollout.local.engine,
        "GraphedSteps",
        lambda step: GraphedSteps(step, functools.partial(fake_capture, sizes)),
    )
    graphed = engine().generate(requests)
    assert last_backend("prefix_decode_attention") == last_backend("sample_tokens") == "triton"
    assert_same(answers(graphed), answers(plain))
    assert sizes
    assert len(set(sizes)) == len(sizes)
    assert set(sizes) <= set(SIZES)
    sizes.clear()
    engine(cuda_graphs=False).generate(requests)
    assert not sizes


def test_sizes_of_graphs() -> None:
    captured: list[int] = []
    steps = GraphedSteps(lambda _: pytest.fail("not run"), functools.partial(fake_capture, captured))
    assert [steps.size(n) for n in (1, 3, 12, 13, 512, 513, 1025)] == [1, 4, 12, 16, 512, 1024, 1536]
    steps._captured = {12: None, 32: None}  # type: ignore[dict-item]
    assert [steps.size(n) for n in (12, 9, 7, 6, 5, 4, 17, 16, 13)] == [12, 12, 12, 12, 12, 4, 32, 32, 32]
