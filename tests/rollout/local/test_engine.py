"""The in-process engine: what is computed how often, in how much memory, and that none of it shows in the answers."""

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rollouts import IMAGE, TEXT, VIDEO, Judge, ask, ending, rig, tokens
from tiny import log_prob_rounding, make_lm, make_model, make_tokenizer
from torch import Tensor
from triton.runtime import interpreter
from waits import READS

from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.rollout import Branch, LocalEngine, Request, Rollout, SamplingOptions
from videor1.rollout.local import engine as local
from videor1.rollout.local import inflight
from videor1.rollout.local.inflight import InFlight
from videor1.rollout.local.step import DecodeStep
from videor1.types import Completion, Prompt
from videor1_kernels import last_backend

OPTIONS = SamplingOptions(9, top_p=0.95)
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of K and V, 2 layers, 2 heads of 16, fp32


def both(model: VideoLM, prompt: Prompt, ordered: int, shuffled: int, judge: Any = None) -> Request:
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
    assert tokens(a) == tokens(b)
    for one, other in zip((c for g in a for c in g), (c for g in b for c in g), strict=True):
        assert (one.logp - other.logp).abs().max() <= log_prob_rounding(one.logp)
        assert one.finished == other.finished


def prefilled(model: VideoLM) -> list[int]:
    """How many prompt tokens each pass of the model took, as it goes on."""
    seen: list[int] = []
    layers = model.hf.model.language_model
    layers.register_forward_hook(lambda _module, _args, out: seen.append(out.last_hidden_state.shape[1]))
    return seen


ROOMS = {"max_rows": 1}, {"max_rows": 6}, {"max_rows": 7, "eager": True}, {"kv_bytes": 190 * TOKEN}


@pytest.mark.parametrize("engine", [*ROOMS, {"kv_bytes": 400 * TOKEN}], ids=str)
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


def test_a_prompt_is_prefilled_once_and_the_head_sees_its_end_alone() -> None:
    model = make_lm()
    passes = prefilled(model)
    with patch.object(DecodeStep, "logits", autospec=True, side_effect=DecodeStep.logits) as head:
        rollout = LocalEngine(model, SamplingOptions(3)).generate([both(model, VIDEO, 8, 4), ask(model, TEXT, 6)])
    assert passes == [2 * len(VIDEO.input_ids) + len(TEXT.input_ids)]
    assert [len(call.args[1]) for call in head.call_args_list] == [3, 18, 18]
    stats = rollout.stats
    assert (stats.decode_steps, stats.row_steps <= 2 * 18) == (2, True)
    assert stats.tokens == sum(len(c.token_ids) for group in answers(rollout) for c in group)
    # The cache takes the shared amount: two prompts and twelve suffixes, not twelve prompts.
    assert stats.kv_bytes == (2 * len(VIDEO.input_ids) + len(TEXT.input_ids) + 18 * 3) * TOKEN
    # In bounded passes.
    model = ending()
    requests = mixed(model)
    expected = answers(LocalEngine(model, OPTIONS).generate(requests))
    most = 2 * len(VIDEO.input_ids) + 1
    passes = prefilled(model)
    with patch.object(local, "PREFILL_TOKENS", most):
        assert_same(answers(LocalEngine(model, OPTIONS).generate(requests)), expected)
    assert len(passes) >= 3
    assert max(passes) <= most
    assert LocalEngine(model, OPTIONS).generate([]).groups == []


def test_a_budget_that_cannot_be_is_refused_before_memory_is_taken() -> None:
    model = make_lm()
    small = r"kv_mib: 8 completions of up to 9 tokens to a prompt of \d+ tokens need 0\.1\d+ MiB .* is 0\.009537 MiB"
    large = r"rollout.kv_mib: expected at most [\d,]+, the memory of this cpu"
    for engine, count, message in (
        (LocalEngine(model, OPTIONS, kv_bytes=10_000), 8, small),
        (LocalEngine(model, OPTIONS, kv_bytes=2**60), 8, large),
        (LocalEngine(model, SamplingOptions(2**24), max_rows=2**16), 2**16, "lower max_completion_length, num_gen"),
    ):
        with patch.object(local, "KVCache") as taken, pytest.raises(ConfigError, match=message):
            engine.generate([ask(model, VIDEO, count)])
        assert not taken.called


@pytest.mark.parametrize("eager", [True, False])
def test_shuffled_answers_that_do_not_matter(eager: bool) -> None:
    model = ending()
    plain = [both(model, VIDEO, 6, 3), both(model, IMAGE, 5, 2), both(model, TEXT, 4, 2)]
    whole = LocalEngine(model, OPTIONS, eager=eager).generate(plain)
    judges = [Judge(None, None, False), Judge(None, None, None, True), Judge(*[None] * 5, False)]
    judged = [dataclasses.replace(r, judge=judge) for r, judge in zip(plain, judges, strict=True)]
    rollout = LocalEngine(model, OPTIONS, eager=eager).generate(judged)
    for group, reference, request in zip(rollout.groups, whole.groups, plain, strict=True):
        assert tokens([group.ordered]) == tokens([reference.ordered])
        ran, every = tokens([group.shuffled, reference.shuffled])
        assert all(ids in every for ids in ran)
        assert (group.shuffled_asked, group.permutation) == (request.shuffled.count, (1, 0))
    kept, stats = answers(rollout), rollout.stats
    assert len(kept[1]) == 7  # those that matter are all there
    assert stats.shuffled_asked == 7
    missing = sum(map(len, answers(whole))) - sum(map(len, kept))
    assert stats.shuffled_skipped + stats.shuffled_stopped == missing > 0
    assert stats.row_steps < whole.stats.row_steps
    assert (stats.shuffled_stopped > 0) >= eager
    # Each judge has heard of every answer of its group that was finished.
    for judge, group in zip(judges, kept, strict=True):
        assert {id(c) for c in (*judge.ordered, *judge.shuffled)} == {id(c) for c in group}


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("rows", [64, 6])
def test_steps_that_are_read_late_show_in_no_answer(ahead: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the next step is launched first: a row that has ended runs along for nothing."""
    model = make_lm()
    rig(model, model.special.eos, 2.0)
    requests, start = mixed(model), local.Run.__init__
    engine = LocalEngine(model, OPTIONS, max_rows=rows)
    plain = engine.generate(requests)

    def late(self: local.Run, *args: Any) -> None:
        start(self, *args)
        self.ahead = ahead

    monkeypatch.setattr(local.Run, "__init__", late)
    other = engine.generate(requests)
    assert_same(answers(other), answers(plain))
    assert other.stats.tokens == plain.stats.tokens
    assert other.stats.row_steps > plain.stats.row_steps


class OnDevice(Tensor):
    """A tensor that a GPU would hold, as all that is computed from one; what reads its values is noted."""

    reads: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            cls.reads.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read the tokens of a step, and for nothing else: neither rows that end nor prompts that enter wait."""
    model = VideoLM(make_model(num_hidden_layers=1), make_tokenizer(), source="tiny", position_rule="paper")
    rig(model, model.special.eos, 2.0)
    requests, layout, launch = mixed(model), InFlight._layout, interpreter.GridExecutor.__call__

    def scattered(self: InFlight, padded: Any) -> Any:
        made = layout(self, padded)
        object.__setattr__(made, "slots_in_order", False)  # which the CPU's own shortcut would ask for
        return made

    def unseen(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return launch(self, *args, **kwargs)

    def sampled(self: DecodeStep, *args: Any) -> Any:  # a kernel fills memory, which is no tensor that was computed
        return tuple(x.as_subclass(OnDevice) for x in draw(self, *args))

    draw = DecodeStep.draw
    monkeypatch.setattr(DecodeStep, "draw", sampled)
    monkeypatch.setattr(InFlight, "_layout", scattered)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unseen)
    for module in (inflight, local):
        monkeypatch.setattr(module, "to_device", lambda values, device: values.as_subclass(OnDevice))
    OnDevice.reads = []
    stats = LocalEngine(model, SamplingOptions(5), max_rows=6, backend="triton").generate(requests).stats
    assert last_backend("prefix_decode_attention") == last_backend("sample_tokens") == "triton"
    # Seven branches enter one by one or together, each time with one more read.
    assert set(OnDevice.reads) == {"tolist"}
    assert stats.decode_steps < len(OnDevice.reads) <= stats.decode_steps + 7
