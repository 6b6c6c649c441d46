"""A row of rollouts.jsonl as what the page shows of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from videor1.answer import extract_answer
from videor1.report.choose import choose_lines
from videor1.report.run import Run

# Characters that would hide, or turn round, what stands beside them: controls, direction marks, lone surrogates.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_VISION = re.compile(r"<\|vision_start\|>.*?<\|vision_end\|>", re.DOTALL)
_TURN = re.compile(r"<\|im_(?:start|end)\|>")


def visible(text: object) -> str:
    """The text, with hidden characters written out: ``[U+202E]``. Tabs and line ends stay."""
    return _HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(text))


def cards_of(run: Run, count: int, problems: list[str]) -> list[dict[str, Any]]:
    """At most ``count`` rollouts of a run, its ranks in turn; what cannot be shown is added to ``problems``."""
    cards: list[dict[str, Any]] = []
    files = run.rollout_files
    for i, file in enumerate(files):
        share = count * (i + 1) // len(files) - count * i // len(files)
        chosen = choose_lines(file, share)
        bad = chosen.unreadable
        for row in chosen.rows:
            try:
                cards.append(card(row, run))
            except (KeyError, TypeError, ValueError):
                bad += 1
        name = f"{run.name}/{file.relative_to(run.path)}"
        if bad:
            problems.append(f"{name}: {bad} of the lines chosen cannot be read; they are not shown.")
        if chosen.too_long:
            problems.append(f"{name}: {chosen.too_long} of the lines met are too long to be shown.")
    return sorted(cards, key=lambda one: one["step"])


def card(row: dict[str, Any], run: Run) -> dict[str, Any]:
    """What the page needs of a row. Raises KeyError, TypeError or ValueError for a row that is not one."""
    accuracy = [float(value) for value in row["accuracy"]]
    count = len(accuracy)
    above = float(run.option("reward.correct_above") or 0.0)
    right = sum(value > above for value in accuracy)
    texts = _same(row["completions"], count)
    finished = _same(row.get("finished") or [None] * count, count)
    tokens, logps = (_same(row.get(name) or [None] * count, count) for name in ("tokens", "logps"))
    columns = (_numbers(row[name], count) for name in ("format", "lengths", "rewards", "advantages"))
    answers = []
    for i, (form, length, reward, advantage) in enumerate(zip(*columns, strict=True)):
        answer: dict[str, Any] = {
            "accuracy": accuracy[i], "right": accuracy[i] > above, "format": form, "length": length, "reward": reward,
            "advantage": advantage, "cut": finished[i] is False,
        }  # fmt: skip
        if tokens[i] is None:
            answer["text"] = visible(texts[i])
        else:
            answer["tokens"] = [visible(token) for token in tokens[i]]
            answer["logps"] = _numbers(logps[i] or [None] * len(tokens[i]), len(tokens[i]))
        answers.append(answer)
    order = row["permutation"]
    return {
        "step": int(row["step"]),
        "draw": int(row["draw"]),
        "problem": visible(row["problem_id"]),
        "kind": row.get("data_type") or ("image" if "<|image_pad|>" in row["prompt"] else "video"),
        "path": row["path"],
        "question": visible(row["problem"] if "problem" in row else _question(row["prompt"])),
        "options": [visible(option) for option in row.get("options") or []],
        "solution": visible(extract_answer(row["solution"]) or row["solution"]),
        "permutation": None if order is None else [int(i) for i in order],
        "answers": answers,
        "right": "all" if right == count else "some" if right else "none",
        "count": [right, count],
        "above": above,
        "tokens": any(one is not None for one in tokens),
    } | _shuffled(row, accuracy, above)


def _shuffled(row: dict[str, Any], accuracy: Sequence[float], above: float) -> dict[str, Any]:
    """The branch of the shuffled frames, and the bonus."""
    texts, known = row["shuffled_completions"], [a for a in row["shuffled_accuracy"] if a is not None]
    # Older files do not say how many were asked for: of a video as many as there are places.
    asked = row.get("shuffled_asked", len(row["shuffled_accuracy"]) if row["permutation"] is not None else 0)
    whole = asked and len(known) == asked
    return {
        "asked": asked,
        "shuffled": [
            {"text": visible(text), "accuracy": float(value), "right": value > above}
            for text, value in zip(texts, _same(known, len(texts)), strict=True)
        ],
        "p": sum(accuracy) / len(accuracy),
        "p_shuffled": sum(known) / len(known) if whole else None,
        "bonus": None if not asked or row["temporal"] is None else float(row["temporal"]),
    }


def _same(values: Any, count: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"expected a list of {count}, got {values!r:.60}")
    return values


def _numbers(values: Any, count: int) -> list[float | None]:
    return [None if value is None else float(value) for value in _same(values, count)]


def _question(prompt: str) -> str:
    """Of a file that holds the prompt alone: without the marks of the chat and the media."""
    return _TURN.sub("", _VISION.sub("", prompt)).strip().removeprefix("user").removesuffix("assistant").strip()


def media_path(card: dict[str, Any], run: Run) -> Path | None:
    """Where a rollout's media file is, None for a text. Raises ValueError outside of the run's data.root."""
    if card["path"] is None:
        return None
    path, root = Path(card["path"]), run.option("data.root")
    if root is None and (data := run.option("dataset_name")) and Path(data).is_file():
        root = Path(data).parent
    if root is not None and not path.resolve().is_relative_to(Path(root).resolve()):
        raise ValueError(f"outside of data.root ({root})")
    return path
