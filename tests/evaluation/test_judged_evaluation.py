"""An evaluation whose answers a judge scores: of a data file, not of a benchmark with rules of its own."""

from pathlib import Path

import pytest
from evaluations import Evaluate, install_oracle
from fake_server import Reply
from judging import answer_of, asked, judge_flags, judge_server
from runs import write_data

ENTRY = {"data_type": "text", "problem_type": "free-form", "path": "", "solution": "<answer>a dog</answer>"}


def data(folder: Path) -> Path:
    problems = ["What runs?", "What sleeps?", "Which of them?"]
    kinds = ["free-form", "free-form", "multiple choice"]
    entries = [
        ENTRY | {"problem": problem, "problem_type": kind, "problem_id": i}
        for i, (problem, kind) in enumerate(zip(problems, kinds, strict=True))
    ]
    entries[2] |= {"options": ["A. a dog", "B. a cat"], "solution": "<answer>A</answer>"}
    return write_data(folder / "data.json", entries)


def test_the_judge_scores_a_data_file(evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = install_oracle(monkeypatch)
    oracle.say = staticmethod(lambda solution, index, *_: solution if index == 2 else f"<answer>{index}</answer>")
    with judge_server(lambda body: {"0": 0.75, "1": 0.25}[answer_of(body)]) as server:
        flags = judge_flags(server, problem_types="free-form")
        good = server.respond
        server.respond = lambda body, n: Reply(500, "down") if "sleeps" in asked(body) else good(body, n)
        ended = evaluate(dataset_name=data(tmp_path), **flags)
        assert [(row["index"], row["accuracy"]) for row in ended.answers] == [(0, 0.75), (2, 1.0)]
        (result,) = ended.results.values()
        assert result["unscored"] == {"questions": 1, "videos": 1, "by_kind": {"reward": 1}}
        assert result["unreadable"]["questions"] == result["unaskable"]["questions"] == 0
        assert "1 question got no score of the judge (resume asks again)" in ended.out
        # A resume asks for what is missing alone, also at another address.
        count = len(server.asked)
        server.respond = good
        other = flags | {"reward__judge__url": server.url.replace("127.0.0.1", "localhost")}
        ended = evaluate(dataset_name=data(tmp_path), resume="auto", **other)
        assert [(row["index"], row["accuracy"]) for row in ended.answers] == [(0, 0.75), (2, 1.0), (1, 0.25)]
        assert len(server.asked) == count + 1
        assert next(iter(ended.results.values()))["unscored"]["questions"] == 0
        # Another judge is another evaluation.
        ended = evaluate(dataset_name=data(tmp_path), resume="auto", code=2, **flags | {"reward__judge__model": "x"})
        assert "reward.judge.model: judge -> x" in ended.err


def test_a_solution_that_only_the_judge_can_reward_is_kept(evaluate: Evaluate, tmp_path: Path) -> None:
    entry = ENTRY | {"problem": "What?", "problem_id": 0, "solution": "<answer>犬</answer>"}
    file = write_data(tmp_path / "data.json", [entry])
    assert "none of its 1 samples can be asked" in evaluate("without", dataset_name=file, code=1).err
    with judge_server(lambda _: 1.0) as server:
        evaluate("with", dataset_name=file, **judge_flags(server, problem_types="free-form"))


def test_a_benchmark_keeps_its_own_rules(evaluate: Evaluate) -> None:
    with judge_server() as server:
        types = "multiple choice,free-form,regression,numerical,OCR"
        evaluate(benchmark="videommmu", eval_samples=2, **judge_flags(server, problem_types=types))
    assert server.asked == []
