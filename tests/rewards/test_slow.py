"""Rewards that take time: they start with their completion's end, cost the longest call, and change no result."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import Reply
from judging import answer_of, by_lot, judge_config, judge_server, reply
from test_judge import PROMPT, SAMPLE, completion, group_of, make_config, score

from videor1.config import RewardConfig, TrainConfig
from videor1.errors import ConfigError
from videor1.rewards import background, load_reward
from videor1.rewards.advantages import score_groups
from videor1.rewards.judge import Starter, TemporalJudge
from videor1.rewards.slow import JUDGE, GroupScores, RewardFailed, SlowCounts, SlowRewards
from videor1.types import Completion, Group, Sample

CLOCK = 0.3  # seconds that a slow call takes


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.001)


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """``rewards(functions...)``: their names, as options give them."""
    made = iter(range(1000))

    def name(*functions: Callable[..., Any]) -> list[str]:
        module = f"made_rewards_{id(tmp_path)}_{next(made)}"
        import sys
        import types

        holder = types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, holder)
        for function in functions:
            setattr(holder, function.__name__, function)
        return [f"{module}:{function.__name__}" for function in functions]

    yield name
    load_reward.cache_clear()


def texts(count: int) -> list[Completion]:
    return [Completion(torch.arange(4), torch.zeros(4), True, f"<answer>{i}</answer>") for i in range(count)]


def group(ordered: list[Completion], shuffled: list[Completion] = []) -> Group:  # noqa: B006
    return group_of(ordered, shuffled, len(shuffled))


def start(scores: GroupScores, whole: Group) -> None:
    starter = Starter(scores)
    assert starter.needed is True
    for done in whole.ordered:
        starter.ordered_done(done)
    for done in whole.shuffled:
        starter.shuffled_done(done)


def scores_of(slow: SlowRewards, sample: Sample = SAMPLE, **options: Any) -> GroupScores:
    scores = slow.group(sample, **options)
    assert scores is not None
    return scores


def test_async_functions_give_what_sync_ones_give(rewards: Any, tmp_path: Path) -> None:
    """In the order of the options, whatever the order in which they return; with whole answers."""

    def first(completions: list[str], samples: list[Sample]) -> list[float]:
        return [by_lot(text) / 3 for text in completions]

    def second(completions: list[str], samples: list[Sample]) -> list[float]:
        return [by_lot(text + sample.problem) / 7 for text, sample in zip(completions, samples, strict=True)]

    async def slow_first(completion: str, sample: Sample) -> float:
        await asyncio.sleep(random.random() / 50)
        return by_lot(completion) / 3

    class Second:
        __name__ = "slow_second"

        async def __call__(self, completion: str, sample: Sample) -> torch.Tensor:
            await asyncio.sleep(random.random() / 50)
            return torch.tensor(by_lot(completion + sample.problem) / 7, dtype=torch.float64)

    whole = group([*texts(5), texts(1)[0]], [completion(0.5)])
    expected = None
    for functions in itertools.product((first, slow_first), (second, Second())):
        config = replace(make_config("margin", "advantage"), reward=RewardConfig(functions=rewards(*functions)))
        with SlowRewards(config.reward, tmp_path) as slow:
            scores = slow.group(SAMPLE, opened="<think>")
            found = whole
            if scores is not None:
                start(scores, whole)
                found = scores.collect(whole)
            counts = slow.take_counts()
        assert counts.calls == 6 * sum(function not in (first, second) for function in functions)
        got = score_groups([found], config, opened="<think>")
        expected = expected or got
        assert torch.equal(got.format, expected.format)
        assert torch.equal(got.result.advantages, expected.result.advantages)


def test_a_slow_judge_costs_the_longest_call(tmp_path: Path) -> None:
    """Not the sum; and what decodes meanwhile hides it."""
    count = 12
    with judge_server(delay=CLOCK) as server:
        config = RewardConfig(judge=judge_config(server, concurrency=count))
        with SlowRewards(config, tmp_path) as slow:
            scores_of(slow).collect(group([completion(0.5)]))  # the first opens the client
            slow.take_counts()
            scores, waited = scores_of(slow), slow.seconds
            whole = group(texts(count))
            started = time.perf_counter()
            start(scores, whole)
            began = time.perf_counter() - started
            found = scores.collect(whole)
            seconds = time.perf_counter() - started
            assert began < CLOCK <= seconds < count * CLOCK / 3  # the engine goes on meanwhile
            assert slow.seconds - waited <= seconds
            assert slow.take_counts() == SlowCounts(groups=1, calls=count)
    assert server.most_in_flight == count
    assert found.accuracies == {c.text: by_lot(c.text[8:-9]) for c in whole.ordered}

    with judge_server(delay=CLOCK) as server:
        config = RewardConfig(judge=judge_config(server, concurrency=3))
        with SlowRewards(config, tmp_path / "other") as slow:
            scores = scores_of(slow)
            start(scores, whole)
            time.sleep(2 * count / 3 * CLOCK)  # a decode that is longer than all four rounds
            waited = slow.seconds
            scores.collect(whole)
            assert server.most_in_flight == 3
            assert slow.seconds - waited < CLOCK  # hides them


def test_equal_requests_are_asked_once_and_known_ones_never(tmp_path: Path) -> None:
    """Also where completions differ around their answers; a score that no answer could earn takes no request."""
    answers = ["red", "red", "blue", "red"]
    ordered = [replace(texts(1)[0], text=f"{i}<answer>{answer}</answer>") for i, answer in enumerate(answers)]
    none = replace(ordered[0], text="red, without tags")
    whole = group([*ordered, none], ordered[:2])
    with judge_server(delay=0.05) as server:
        config = RewardConfig(judge=judge_config(server))
        for calls in (2, 0):
            with SlowRewards(config, tmp_path) as slow:
                scores = scores_of(slow)
                start(scores, whole)
                found = scores.collect(whole)
                counts = slow.take_counts()
                assert (counts.calls, counts.retries, slow.answered[JUDGE] > 0) == (calls, 0, True)
                assert bool(counts.cache_hits) == (calls == 0)
            assert len(server.asked) == 2
            expected = {c.text: by_lot(a) for c, a in zip(ordered, answers, strict=True)}
            assert found.accuracies == expected | {none.text: 0.0}


def test_a_failed_call_drops_its_group_alone(rewards: Any, tmp_path: Path) -> None:
    async def picky(completion: str, sample: Sample) -> float:
        if "3" in completion and sample.problem_id == "bad":
            raise RuntimeError("no service")
        return 1.0

    config = RewardConfig(functions=rewards(picky), retries=2)
    with SlowRewards(config, tmp_path) as slow:
        bad = replace(SAMPLE, problem_id="bad")
        groups = [(scores_of(slow, sample), group(texts(5))) for sample in (bad, SAMPLE)]
        for scores, whole in groups:
            start(scores, whole)
        with pytest.raises(RewardFailed, match=r":picky: RuntimeError: no service \(tried 3 times\)") as failed:
            groups[0][0].collect(groups[0][1])
        assert failed.value.name == config.functions[0]
        assert groups[1][0].collect(groups[1][1]).rewards == {config.functions[0]: (1.0,) * 5}
        assert slow.take_counts() == SlowCounts(groups=2, failed=1, calls=10, retries=2)
        assert slow.take_counts() == SlowCounts()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, [1.0], torch.ones(2)])
def test_what_is_no_finite_number_is_a_failure(value: Any, rewards: Any, tmp_path: Path) -> None:
    async def gives(completion: str, sample: Sample) -> Any:
        return value

    with SlowRewards(RewardConfig(functions=rewards(gives), retries=1), tmp_path) as slow:
        scores = scores_of(slow)
        with pytest.raises(RewardFailed, match=r"expected a finite number .* \(tried 2 times\)"):
            scores.collect(group(texts(2)))


def test_a_judge_without_a_score_is_tried_again_and_is_no_zero(tmp_path: Path) -> None:
    with judge_server() as server:
        good = server.respond
        server.respond = lambda body, attempt: good(body, attempt) if attempt else Reply(body=reply("hm"))
        config = RewardConfig(judge=judge_config(server, retries=1))
        with SlowRewards(config, tmp_path) as slow:
            whole = group(texts(3))
            found = scores_of(slow).collect(whole)
            assert found.accuracies == {c.text: by_lot(c.text[8:-9]) for c in whole.ordered}
            assert slow.take_counts() == SlowCounts(groups=1, calls=3, retries=3)
        server.respond = lambda body, attempt: Reply(body=reply("hm"))
        with SlowRewards(config, tmp_path) as slow:
            found = scores_of(slow).collect(whole)  # known
            with pytest.raises(RewardFailed, match=r"^the judge: expected a score .* got 'hm' \(tried 2 times\)$"):
                scores_of(slow).collect(group([completion(0.7)]))
            # It is not remembered as an answer: the next such request is sent again.
            server.respond = good
            assert scores_of(slow).collect(group([completion(0.7)])).accuracies


def test_nothing_is_scored_without_the_judge(tmp_path: Path, rewards: Any) -> None:
    async def one(completion: str, sample: Sample) -> float:
        return 1.0

    from videor1.rewards import score as plain

    with judge_server() as server:
        config = TrainConfig(reward=RewardConfig(judge=judge_config(server)))
        with pytest.raises(AssertionError, match="the judge has not been asked"):
            score_groups([group(texts(2))], config)
        with pytest.raises(ConfigError, match=r"reward\.judge: it scores regression answers"):
            plain(["x"], [SAMPLE], config.reward)
    (name,) = rewards(one)
    with pytest.raises(ConfigError, match="it is async"):
        plain(["x"], [SAMPLE], RewardConfig(functions=[name]))
    with SlowRewards(RewardConfig(), tmp_path) as slow:
        assert not slow.some
        assert slow.group(SAMPLE) is None
    with SlowRewards(RewardConfig(functions=[name]), tmp_path, functions=False) as slow:
        assert not slow.some
    assert not list(tmp_path.iterdir())


class Arriving:
    """The scores of a group, each of which arrives when told; waiting for them makes all arrive in a random order."""

    def __init__(self, rng: random.Random, failing: bool = False) -> None:
        self.rng, self.failing = rng, failing
        self.started: list[tuple[Completion, bool, Future[float]]] = []
        self.waits = 0

    def start(self, done: Completion, *, ordered: bool) -> Future[float]:
        future: Future[float] = Future()
        self.started.append((done, ordered, future))
        return future

    def some_arrive(self) -> None:
        for done, _, future in self.rng.sample(self.started, self.rng.randint(0, len(self.started))):
            if not future.done():
                future.set_result(accuracy_of(done))

    def wait(self, futures: Any) -> None:
        self.waits += 1
        self.rng.shuffle(self.started)
        for done, _, future in self.started:
            if not future.done():
                future.set_result(accuracy_of(done))


def accuracy_of(done: Completion) -> float:
    return max(0.0, 1 - abs(float(done.text.partition("<answer>")[2][:-9]) - 100) / 100)


def played(
    ordered: list[Completion], shuffled: list[Completion], config: TrainConfig, rng: random.Random, live: bool
) -> Group:
    """A group as an engine plays it: shuffled completions run once it has settled (``live``: while scores arrive)."""
    scores = Arriving(rng)
    judge = TemporalJudge(SAMPLE, config, ordered=len(ordered), shuffled=len(shuffled), scores=scores)  # type: ignore[arg-type]
    left, done = list(ordered), []
    for answer in shuffled if live else []:
        while left and (rng.random() < 0.5 or judge.needed is False):
            judge.ordered_done(left.pop())
        scores.some_arrive()
        judge.settle(wait=False)
        if judge.needed is False:
            break
        judge.shuffled_done(answer)
        done.append(answer)
    while left:
        judge.ordered_done(left.pop())
        scores.some_arrive()
        if not live:
            assert judge.needed is None  # nothing is settled before
    judge.settle(wait=True)
    assert not judge.unsettled
    if not live and judge.needed:
        done = shuffled
        for answer in shuffled:
            judge.shuffled_done(answer)
    assert judge.needed is False or len(done) == len(shuffled)
    known = {c.text: accuracy_of(c) for c in (*ordered, *done)}
    return replace(group_of(ordered, done, len(shuffled)), accuracies=known)


@pytest.mark.grid(
    rule=["margin", "threshold", "reference"],
    given=list(itertools.product(["reward", "advantage"], ["std", "none", "batch", "gdpo"])),
    live=[True, False],
)
def test_the_same_advantages_whenever_scores_arrive(rule: str, given: tuple[str, str], live: bool) -> None:
    apply, normalize = given
    rng, config = random.Random(f"{rule}{apply}{live}"), make_config(rule, apply, normalize)
    skipped, full = 0, 0
    for _ in range(30):
        size, others = rng.choice([2, 4, 8]), rng.choice([1, 2, 4])
        kinds = rng.choice([(0.0,), (0.0, 1.0), (1.0,), (0.0, 1.0, round(rng.random(), 3))])
        rows = [[completion(rng.choice(kinds), rng.random() < 0.7) for _ in range(n)] for n in (size, others)]
        ordered, shuffled = ([replace(c, text=f"{i}{c.text}") for i, c in enumerate(row)] for row in rows)
        whole = group_of(ordered, shuffled, others)
        whole = replace(whole, accuracies={c.text: accuracy_of(c) for c in (*ordered, *shuffled)})
        some = played(ordered, shuffled, config, rng, live)
        one, other = score([some], config), score([whole], config)
        assert (one.result.advantages - other.result.advantages).abs().max() <= 1e-6
        assert ((one.result.advantages == 0) == (other.result.advantages == 0)).all()
        skipped, full = skipped + others - len(some.shuffled), full + others
        if not live:  # what runs does not depend on the order of arrivals
            again = played(ordered, shuffled, config, random.Random(rng.random()), live)
            assert again.shuffled == some.shuffled
            assert torch.equal(score([again], config).result.advantages, one.result.advantages)
    assert 0 < skipped < full


def test_a_failed_score_needs_no_more_completions() -> None:
    scores = Arriving(random.Random(0))
    judge = TemporalJudge(SAMPLE, make_config("margin", "advantage"), ordered=2, shuffled=1, scores=scores)  # type: ignore[arg-type]
    for accuracy in (1, 0):
        judge.ordered_done(completion(accuracy))
    scores.started[0][2].set_exception(RuntimeError("no"))
    assert judge.needed is None
    judge.settle(wait=False)
    assert judge.needed is False
    assert len(judge.unsettled) == 1


def test_a_group_that_is_not_used_is_cancelled(rewards: Any, tmp_path: Path) -> None:
    ended = threading.Event()

    async def forever(completion: str, sample: Sample) -> float:
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.set()
        return 0.0

    with SlowRewards(RewardConfig(functions=rewards(forever), timeout=1e6), tmp_path) as slow:
        scores = scores_of(slow)
        start(scores, group(texts(2)))
        time.sleep(0.05)
        scores.abandon()
        assert ended.wait(60)


def test_the_prompt_is_that_of_the_group() -> None:
    assert PROMPT.sample.problem  # of the tests of the judge that skips
    assert answer_of({"messages": [{"content": "Answer to grade, x:\nA\nB\n\n1 means"}]}) == "A\nB"
