"""Evaluations for tests: the command on small benchmarks, and a sampler that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_files import WRITERS, Clips

from videor1 import evaluate
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.evaluation import evaluator
from videor1.logs.jsonl import read_jsonl
from videor1.rollout import Request, Rollout, SamplingOptions
from videor1.types import Completion, Group

TINY: dict[str, Any] = dict.fromkeys(["video.max_pixels", "video.min_pixels", "video.image_max_pixels"], 3136)
TINY |= {"data.workers": 0, "max_completion_length": 4, "disable_tqdm": True, "device": "cpu"}


def write_benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    clips = Clips(tmp_path_factory.mktemp("clips"))
    for write in WRITERS.values():
        write(folder, clips)
    return folder


def flags(assets: Assets, output: Path, **options: Any) -> list[str]:
    """The command line of a tiny evaluation; a double underscore stands for a dot, None for an option left out."""
    given = TINY | {"model_name_or_path": assets.model, "output_dir": output}
    given |= {name.replace("__", "."): value for name, value in options.items()}
    text = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
    return [f"--{name}={value}" for name, value in text.items() if value is not None]


def run(assets: Assets, output: Path, **options: Any) -> int:
    return run_main(evaluate.main, flags(assets, output, **options))


def answers(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "answers.jsonl")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["benchmarks"]


@dataclass(frozen=True)
class Ended:
    out: str
    err: str
    folder: Path

    answers = property(lambda self: answers(self.folder))
    results = property(lambda self: results(self.folder))

    def bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@dataclass(frozen=True)
class Evaluate:
    """Runs the command, on the small benchmarks unless told otherwise, and expects an exit code."""

    assets: Assets
    benchmarks: Path
    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, name: str = "run", *, code: int = 0, **options: Any) -> Ended:
        root = {"data__root": self.benchmarks} if "benchmark" in options else {}
        arguments = flags(self.assets, self.folder / name, **root | options)
        try:
            ended = run_main(evaluate.main, arguments)
        except SystemExit as stopped:  # argparse
            ended = stopped.code
        shown = self.capsys.readouterr()
        assert ended == code, shown.err
        return Ended(shown.out, shown.err, self.folder / name)


class Oracle:
    """Stands in for the sampler: answer i to a question is what ``say`` gives for (solution, index, shuffled, i)."""

    made: list[tuple[SamplingOptions, int]]
    requests: list[Request]
    say: Callable[[str, int, bool, int], str] = staticmethod(lambda solution, *_: solution)

    def __init__(self, model: object, options: SamplingOptions, *, max_rows: int, backend: str) -> None:
        self.made.append((options, max_rows))

    def generate(self, requests: list[Request]) -> Rollout:
        assert len(requests) <= self.made[-1][1]
        self.requests.extend(requests)
        return Rollout([self._group(request) for request in requests])

    def _group(self, request: Request) -> Group:
        sample = request.prompt.sample

        def drawn(branch: Any, shuffled: bool) -> tuple[Completion, ...]:
            texts = [self.say(sample.solution, sample.index, shuffled, i) for i in range(branch.count if branch else 0)]
            return tuple(Completion(torch.zeros(7), torch.zeros(7), "cut" not in text, text) for text in texts)

        return Group(request.prompt, drawn(request.ordered, False), drawn(request.shuffled, True))


def install_oracle(monkeypatch: pytest.MonkeyPatch, owner: Any = evaluator) -> type[Oracle]:
    fresh = type("Fresh", (Oracle,), {"made": [], "requests": []})
    monkeypatch.setattr(owner, "LocalEngine", fresh)
    return fresh
