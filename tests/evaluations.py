"""Evaluations for tests: the command on small benchmarks, and a sampler that says what it is told."""

from __future__ import annotations

import json
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

TINY: dict[str, Any] = {
    "data.workers": 0,
    "video.max_pixels": 3136,
    "video.min_pixels": 3136,
    "video.image_max_pixels": 3136,
    "max_completion_length": 4,
    "disable_tqdm": True,
    "device": "cpu",
}


def write_benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six; read only."""
    folder = tmp_path_factory.mktemp("benchmarks")
    clips = Clips(tmp_path_factory.mktemp("clips"))
    for write in WRITERS.values():
        write(folder, clips)
    return folder


def flags(assets: Assets, output: Path, **options: Any) -> list[str]:
    given = TINY | {"model_name_or_path": assets.model, "output_dir": output}
    for name, value in options.items():
        given[name.replace("__", ".")] = value
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]


def run(assets: Assets, output: Path, **options: Any) -> int:
    return run_main(evaluate.main, flags(assets, output, **options))


def answers(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "answers.jsonl")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["benchmarks"]


class Oracle:
    """Stands in for the sampler: answer i to a question is what ``say`` gives for (question, shuffled, i)."""

    made: list[tuple[SamplingOptions, int]] = []  # noqa: RUF012
    requests: list[Request] = []  # noqa: RUF012

    def __init__(self, model: object, options: SamplingOptions, *, max_rows: int, backend: str) -> None:
        self.made.append((options, max_rows))

    @staticmethod
    def say(solution: str, index: int, shuffled: bool, i: int) -> str:
        return solution

    def generate(self, requests: list[Request]) -> Rollout:
        self.requests.extend(requests)
        return Rollout([self._group(request) for request in requests])

    def _group(self, request: Request) -> Group:
        sample = request.prompt.sample

        def drawn(branch: Any, shuffled: bool) -> tuple[Completion, ...]:
            texts = [self.say(sample.solution, sample.index, shuffled, i) for i in range(branch.count if branch else 0)]
            return tuple(Completion(torch.zeros(1), torch.zeros(1), "cut" not in text, text) for text in texts)

        return Group(request.prompt, drawn(request.ordered, False), drawn(request.shuffled, True))


def install_oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    class Fresh(Oracle):
        made: list[tuple[SamplingOptions, int]] = []  # noqa: RUF012
        requests: list[Request] = []  # noqa: RUF012

    monkeypatch.setattr(evaluator, "LocalEngine", Fresh)
    return Fresh
