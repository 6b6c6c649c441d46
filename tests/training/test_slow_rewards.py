"""Runs whose rewards take time: the same as with quick ones, exactly resumed, and ended where nothing answers."""

import asyncio
import itertools
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import Reply
from judging import answer_of, judge_flags, judge_server, reply, tagged
from runs import Lab, assert_same_run, kill, last_metrics, metrics, run_lines, weights
from spies import wrap

from videor1.answer import extract_answer
from videor1.errors import ConfigError, TrainingStopped
from videor1.rewards import background
from videor1.rollout import Request, Rollout
from videor1.training.tgrpo import Trainer
from videor1.types import Completion, Group, Sample

OPTIONS: dict[str, Any] = {"num_generations": 3, "temporal__num_generations": 2, "per_device_train_batch_size": 2}
OPTIONS |= {"num_iterations": 1}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.001)


async def slow_uneven(completion: str, sample: Sample) -> float:
    """``toy_rewards.uneven`` of one completion, after a while that depends on it."""
    await asyncio.sleep(zlib.crc32(completion.encode()) % 7 / 100)
    return zlib.crc32(completion.encode()) % 97 / 97


async def broken(completion: str, sample: Sample) -> float:
    raise RuntimeError("no service")


async def broken_for_some(completion: str, sample: Sample) -> float:
    if sample.index % 2:
        raise RuntimeError("no service")
    return zlib.crc32(completion.encode()) % 97 / 97


def binary(body: dict[str, Any]) -> float:
    return float(zlib.crc32(answer_of(body).encode()) % 2)


def test_an_async_function_makes_the_same_run(lab: Lab) -> None:
    ends = []
    for name, module in (("quick", "toy_rewards:uneven"), ("slow", f"{__name__}:slow_uneven")):
        ends.append(weights(lab.make(name, max_steps=2, reward__functions=module, **OPTIONS).train()))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert run_lines(lab.folder / "quick", "rollouts.jsonl") == run_lines(lab.folder / "slow", "rollouts.jsonl")
    quick, slow = (metrics(lab.folder / name) for name in ("quick", "slow"))
    assert [{k: v for k, v in row.items() if k != "rewards/failed"} for row in slow] == quick
    assert all(row["rewards/failed"] == 0 for row in slow if "loss" in row)
    rows = [row for row in run_lines(lab.folder / "slow", "metrics.jsonl") if "loss" in row]
    assert [row["time/reward_calls"] for row in rows] == [6, 6]
    assert all(row["time/reward"] > 0 for row in rows)


def test_a_reward_starts_while_others_decode(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from videor1.rewards.slow import SlowRewards
    from videor1.rollout.local.engine import Run

    order: list[str] = []
    wrap(monkeypatch, SlowRewards, "call", lambda call, *args: (order.append("reward"), call(*args))[1])
    wrap(monkeypatch, Run, "_decode", lambda decode, *args: (order.append("decode"), decode(*args))[1])
    ends = itertools.count()

    def read(original: Any, run: Run) -> None:
        """One completion of the first four is ended early."""
        if next(ends) == 2:
            run._finish(run.in_flight.sequences[0], True)
        original(run)

    wrap(monkeypatch, Run, "_read", read)
    options = OPTIONS | {"temporal__enabled": False, "max_steps": 1, "reward__functions": f"{__name__}:slow_uneven"}
    lab.make(**options).train()
    first = order.index("reward")
    assert order[:first].count("decode") < order.count("decode")
    assert "decode" in order[first:]


@pytest.mark.parametrize(("rule", "apply"), [("margin", "advantage"), ("reference", "reward")])
def test_skipping_waits_for_the_judge_and_changes_nothing(rule: str, apply: str, lab: Lab) -> None:
    ends, lines, left_out, asked = [], [], [], []
    options = OPTIONS | {"temporal__rule": rule, "temporal__apply": apply, "max_steps": 2, "data__shuffle": False}
    options |= {"per_device_train_batch_size": 3}
    with judge_server(binary, delay=0.02) as server:
        for skip in (True, False):
            server.asked.clear()
            run = tagged(lab.make(str(skip), temporal__skip_shuffled=skip, **options, **judge_flags(server)))
            ends.append(weights(run.train()))
            lines.append(run_lines(lab.folder / str(skip), "rollouts.jsonl"))
            rows = [row for row in metrics(lab.folder / str(skip)) if "loss" in row]
            left_out.append(sum(row["rollout/shuffled_skipped"] + row["rollout/shuffled_stopped"] for row in rows))
            asked.append(len(server.asked))
    for one, other in zip(*lines, strict=True):
        assert one["completions"] == other["completions"]
        assert one["accuracy"] == other["accuracy"]
        assert one["advantages"] == pytest.approx(other["advantages"], abs=1e-6)
        for text, accuracy in zip(one["completions"], one["accuracy"], strict=True):
            answer = extract_answer(text)
            assert accuracy == (zlib.crc32(answer.encode()) % 2 if answer else 0)
    assert any(any(line["advantages"]) for line in lines[0])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-6)
    assert left_out[0] > left_out[1] == 0
    assert asked[0] < asked[1]  # what is skipped is not judged


def test_a_resumed_run_asks_nothing_again(lab: Lab) -> None:
    """Bit for bit the same, from the scores on disk, though the judge has changed its mind; a lost cache asks anew."""
    options = OPTIONS | {"max_steps": 3, "save_steps": 1}
    with judge_server(binary, delay=0.01) as server:
        flags = judge_flags(server)
        tagged(lab.make("whole", **options, **flags)).train()
        kill(tagged(lab.make("killed", **options, **flags)), Trainer, "optimizer_step", 3)
        count = len(server.asked)
        server.respond = lambda body, attempt: Reply(body=reply("<score>0.123</score>"))
        tagged(lab.make("killed", **options, **flags, resume="auto")).train()
        assert len(server.asked) == count
        assert_same_run(lab.folder / "killed", lab.folder / "whole")
        rows = [row for row in run_lines(lab.folder / "killed", "metrics.jsonl") if "loss" in row]
        assert (rows[-1]["time/reward_calls"], rows[-1]["time/reward_cache_hits"] > 0) == (0, True)
        # A folder that several runs share.
        shared = judge_flags(server, cache_dir=lab.folder / "whole" / "judge_cache")
        tagged(lab.make("shared", **options, **shared)).train()
        assert len(server.asked) == count
        assert not (lab.folder / "shared" / "judge_cache").exists()


class Answering:
    """An engine that tells no judge of anything."""

    needs_features = False

    def __init__(self, run: Trainer) -> None:
        self.eos, self.calls = run.model.special.eos, 0

    def generate(self, requests: list[Request]) -> Rollout:
        self.calls += 1
        texts = [f"<answer>a{self.calls}</answer>", f"<answer>b{self.calls}</answer>", "c"]
        ids = torch.tensor([5, 6, 7, self.eos])
        answers = tuple(Completion(ids, torch.zeros(4), True, text) for text in texts)
        return Rollout([Group(request.prompt, answers) for request in requests])

    def weights_changed(self) -> None: ...

    def close(self) -> None: ...


def test_a_failed_reward_drops_its_group_and_is_counted(lab: Lab) -> None:
    options = OPTIONS | {"per_device_train_batch_size": 4, "max_steps": 2, "data__shuffle": False}
    run = lab.make(reward__functions=f"{__name__}:broken_for_some", reward__retries=1, **options)
    run.engine = Answering(run)
    run.train()
    skips = run_lines(lab.folder, "skipped.jsonl")
    assert {line["kind"] for line in skips} == {"reward"}
    assert all("broken_for_some: RuntimeError: no service (tried 2 times)" in line["message"] for line in skips)
    rows = [row for row in run_lines(lab.folder, "metrics.jsonl") if "loss" in row]
    failed = [row["rewards/failed"] for row in rows]
    assert sum(failed) == len(skips) == last_metrics(lab.folder)["data/skipped/reward"] > 0
    assert [row["time/reward_retries"] for row in rows] == [3 * count for count in failed]
    assert len(run_lines(lab.folder, "rollouts.jsonl")) == 8 - len(skips)


@pytest.mark.parametrize("worked", [False, True])
def test_a_run_ends_where_no_reward_comes(worked: bool, lab: Lab) -> None:
    """At once where none ever came, and otherwise after three batches: a prompt may be one that no judge takes."""
    with judge_server(binary) as server:
        run = lab.make(max_steps=9, **OPTIONS, **judge_flags(server))
        run.engine = Answering(run)
        good = server.respond
        server.respond = lambda body, attempt: Reply(500, "down")
        if worked:
            server.respond = lambda body, attempt: good(body, attempt) if run.step < 2 else Reply(500, "down")
        often = " in 3 batches in a row" if worked else ""
        with pytest.raises(
            TrainingStopped,
            match=rf"none of 2 prompts got its rewards{often}\. The last: the judge: "
            r"HTTP 500: down \(tried once\); there is no checkpoint yet",
        ):
            run.train()
    assert run.step == (2 + 2 if worked else 0)


def test_wrong_options_are_told_before_the_run(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"reward\.judge\.model"):
        lab.make(reward__judge__url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="has no 'nothing_such'"):
        lab.make(reward__functions=f"{__name__}:nothing_such")
    assert not list(Path(lab.folder).iterdir())


def test_the_periodic_evaluation_asks_the_judge(lab: Lab) -> None:
    with judge_server(lambda _: 0.25) as server:
        options = OPTIONS | {"data__eval_path": lab.assets.dev, "eval_samples": 4, "max_steps": 1}
        tagged(lab.make("a", **options, **judge_flags(server))).train()
        (row,) = [row for row in run_lines(lab.folder / "a", "metrics.jsonl") if "eval/ordered" in row]
        assert (row["eval/ordered"], row["eval/shuffled"], row["eval/skipped"]) == (0.25, 0.25, 0)
        assert row["time/reward_calls"] > 0
        run = tagged(lab.make("b", **options, **judge_flags(server)))
        good = server.respond
        server.respond = lambda body, attempt: good(body, attempt) if run.step == 0 else Reply(500, "down")
        run.train()
        (row,) = [row for row in run_lines(lab.folder / "b", "metrics.jsonl") if "eval/ordered" in row]
        assert (row["eval/samples"], row["eval/skipped"]) == (0, 3)
        assert {line["kind"] for line in run_lines(lab.folder / "b", "skipped.jsonl")} == {"reward"}
