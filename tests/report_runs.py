"""Run folders as the trainers leave them, made in a moment, for the tests of the report."""

from __future__ import annotations

import base64
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from media import coded_frames, write_video

from videor1.config import CommonConfig, TrainConfig, VideoConfig
from videor1.config.cli import save_config
from videor1.logs.jsonl import JsonlWriter
from videor1.report import write_report

HOSTILE = (
    "<think></script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'><!-- &lt;b&gt; {{ 7 * 7 }} "
    "\u202eright to left\u202c \x00\x07 \u2028 \udc80 </think>\n<answer>B</answer>"
)
TOKENS = ["<think>", "caf", "", "é", " it", "</think>", "\n", "<answer>", "B", "</answer>", "<|im_end|>"]
LOGPS = [-0.01, -0.3, -1.5, -3.1, -7.25, None, -0.02, 0.0, -0.4, -0.001, -0.0001]


def step_row(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl about a T-GRPO step."""
    return {
        "step": step, "loss": -0.1 + step / 1000, "grad_norm": 1.0 + step % 3, "learning_rate": 1e-6 * step,
        "epoch": step / 100, "num_tokens": 1000 * step, "nonfinite_steps": 0, "failed_checkpoints": 0,
        "reward": 1 + step / 100, "rewards/accuracy/mean": 0.4 + step / 200, "rewards/format/mean": 0.9,
        "sampling/kl_k3": 1e-4 * step, "sampling/chi2": 3e-4 * step, "sampling/ess": 1 - step / 1000,
        "frac_reward_zero_std": 0.3, "kl": step / 1000, "entropy": 1.0 - step / 200,
        "completions/mean_length": 100 + step, "completions/max_length": 200 + step, "completions/clipped_ratio": 0.01,
        "temporal/p": 0.5 + step / 200, "temporal/p_shuffled": None if step % 5 == 0 else 0.3,
        "temporal/bonus": 0.1, "temporal/rewarded": 0.6,
        "rollout/shuffled_asked": 40, "rollout/shuffled_skipped": 10, "rollout/shuffled_stopped": 4,
        "time/data": 0.1, "time/rollout": 2.0, "time/reward": 0.05, "time/reference": 0.5, "time/update": 1.5,
        "time/tokens_per_second": 900.0,
    }  # fmt: skip


def eval_row(step: int) -> dict[str, Any]:
    return {"step": step, "eval/ordered": 0.5 + step / 200, "eval/shuffled": 0.3, "eval/samples": 96, "time/eval": 1.0}


def rollout_row(step: int, path: Path | None, **changes: Any) -> dict[str, Any]:
    """A line of rollouts.jsonl of two answers and two shuffled ones, one of them skipped."""
    kind = "text" if path is None else "image" if path.suffix == ".png" else "video"
    video = kind == "video"
    return {
        "step": step, "draw": step - 1, "problem_id": str(900 + step), "path": path, "data_type": kind,
        "problem": f"What comes first in {step}?", "options": ["A. red", "B. blue"], "solution": "<answer>B</answer>",
        "prompt": f"<|im_start|>user\n<|vision_start|><|{kind}_pad|><|vision_end|>What comes first?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "permutation": [3, 0, 2, 1] if video else None,
        "completions": ["<think>café it</think>\n<answer>B</answer>", HOSTILE], "finished": [True, False],
        "lengths": [len(TOKENS), 7], "accuracy": [1.0, 0.0], "format": [1.0, 0.5], "rewards": [2.2, 0.5],
        "advantages": [0.7071, -0.7071], "temporal": 0.2 if video else 0.0, "p": 0.5, "p_shuffled": None,
        "shuffled_asked": 2 if video else 0, "shuffled_completions": ["<answer>A</answer>"] if video else [],
        "shuffled_accuracy": [0.0 if video else None, None],
        "tokens": [TOKENS, ["x", HOSTILE]], "logps": [LOGPS, [-0.5, -9.0]],
    } | changes  # fmt: skip


def make_run(
    folder: Path,
    *,
    steps: int = 30,
    rollouts: Iterable[dict[str, Any]] = (),
    config: CommonConfig | None = None,
    rows: Iterable[dict[str, Any]] | None = None,
    **options: Any,
) -> Path:
    """A run folder of ``steps`` steps, evaluated at every tenth."""
    video = VideoConfig(max_frames=4)
    save_config(config or TrainConfig(**{"max_steps": steps, "video": video} | options), folder / "config.yaml")
    lines(folder / "metrics.jsonl", _metrics(steps) if rows is None else rows)
    lines(folder / "rollouts.jsonl", rollouts)
    lines(folder / "skipped.jsonl", [])
    return folder


def _metrics(steps: int) -> Iterable[dict[str, Any]]:
    for step in range(1, steps + 1):
        yield step_row(step)
        if step % 10 == 0:
            yield eval_row(step)


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    writer = JsonlWriter(path)
    for row in rows:
        writer.write(row["step"], row)
    writer.close()


def small_video(path: Path) -> Path:
    """Eight frames that tell their number, a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, coded_frames(8, 96, 160), rate=8)


class Page(HTMLParser):
    """A page taken apart: its elements, the text of each, and what a browser would load for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: defaultdict[str, str] = defaultdict(str)  # text, of styles and scripts by their id or tag
        self.size = path.stat().st_size
        self._place = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._place = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._place = ""

    def handle_data(self, data: str) -> None:
        self.parts[self._place] += data if self._place else f" {data}"

    @property
    def text(self) -> str:
        return self.parts[""]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def rollouts(self) -> dict[str, Any]:
        return json.loads(self.parts["rollout-data"])

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        return {one["id"]: one["figure"] for one in json.loads(self.parts["chart-data"])}

    def loads(self) -> list[str]:
        """Addresses that a browser would fetch when it shows the page."""
        names = ("src", "srcset", "poster", "data", "background", "action", "ping", "xlink:href")
        found = [str(value) for _, attributes in self.elements for name, value in attributes.items() if name in names]
        found += [str(a.get("href")) for tag, a in self.elements if tag in ("link", "base", "use", "image")]
        styles = self.parts["style"] + " ".join(str(a.get("style", "")) for _, a in self.elements)
        found += re.findall(r"url\(\s*['\"]?([^)'\"]*)", styles) + re.findall(r"@import[^;]*", styles)
        return found


def report(*runs: Path, **options: Any) -> Page:
    """The page of these runs, beside the first."""
    out = runs[0].parent / "page.html"
    assert write_report(runs, out, **options) == out
    return Page(out)


def decoded(array: dict[str, str]) -> list[float]:
    """A plotly typed array."""
    return np.frombuffer(base64.b64decode(array["bdata"]), {"i4": "<i4", "f4": "<f4"}[array["dtype"]]).tolist()


def drawn(figure: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """The strong line of that name."""
    (trace,) = [t for t in figure["data"] if t["name"] == name and t.get("opacity", 1) == 1 and "width" in t["line"]]
    return decoded(trace["x"]), decoded(trace["y"])
