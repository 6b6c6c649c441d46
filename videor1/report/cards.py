"""Turn rows of rollouts.jsonl into cards: what the page shows of a rollout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from videor1.answer import extract_answer
from videor1.report.choose import choose_lines
from videor1.report.run import Run
from videor1.types import MediaItem

# Characters that hide or reorder the text beside them: control characters, direction marks and lone surrogates.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_VISION = re.compile(r"<\|vision_start\|>.*?<\|vision_end\|>", re.DOTALL)
_TURN = re.compile(r"<\|im_(?:start|end)\|>")


def visible(text: object) -> str:
    """Return the text with hidden characters written out, as in ``[U+202E]``. Tabs and line ends are kept."""
    return _HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(text))


def cards_of(run: Run, count: int, problems: list[str]) -> list[dict[str, Any]]:
    """Return the cards of at most ``count`` rollouts of a run, an equal share from each rank.

    A note about each file with rows that cannot be shown is added to ``problems``.
    """
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
    """Return the card of a row of rollouts.jsonl.

    Raises:
        KeyError, TypeError, ValueError: the row does not have the form of a rollout.
    """
    accuracy = [float(value) for value in row["accuracy"]]
    count = len(accuracy)
    bars = dict(pair.split("=", 1) for pair in run.option("reward.correct_above_for") or ())
    above = float(bars.get(row.get("problem_type", ""), run.option("reward.correct_above") or 0.0))
    right = sum(value > above for value in accuracy)
    texts = _check_list(row["completions"], count)
    finished, sources = (_check_list(row.get(name) or [None] * count, count) for name in ("finished", "sources"))
    tokens, logps = (_check_list(row.get(name) or [None] * count, count) for name in ("tokens", "logps"))
    columns = (_numbers(row[name], count) for name in ("format", "lengths", "rewards", "advantages"))
    completions = []
    for i, (form, length, reward, advantage) in enumerate(zip(*columns, strict=True)):
        completion: dict[str, Any] = {
            "accuracy": accuracy[i],
            "right": accuracy[i] > above,
            "format": form,
            "length": length,
            "reward": reward,
            "advantage": advantage,
            "cut": finished[i] is False,
        }
        if sources[i] is not None:
            completion["source"] = visible(sources[i])
        if tokens[i] is None:
            completion["text"] = visible(texts[i])
        else:
            completion["tokens"] = [visible(token) for token in tokens[i]]
            completion["logps"] = _numbers(logps[i] or [None] * len(tokens[i]), len(tokens[i]))
        completions.append(completion)
    items = row.get("media")
    for item in items or []:
        _item(item)  # This raises for one that is none.
    return {
        "step": int(row["step"]),
        "draw": int(row["draw"]),
        "problem": visible(row["problem_id"]),
        "kind": row.get("data_type") or ("image" if "<|image_pad|>" in row["prompt"] else "video"),
        "path": row["path"],
        "frames": row.get("frames"),
        "question": visible(row["problem"] if "problem" in row else _question(row["prompt"])),
        "options": [visible(option) for option in row.get("options") or []],
        "solution": visible(extract_answer(row["solution"]) or row["solution"]),
        "opened": visible(row.get("opened", "")),  # which older files do not have
        "items": items,
        "permutation": _permutation(row["permutation"], 1 if items is None else len(items)),
        "completions": completions,
        "right": "all" if right == count else "some" if right else "none",
        "count": [right, count],
        "above": above,
        "tokens": any(one is not None for one in tokens),
    } | _shuffled(row, accuracy, above)


def _item(value: Any) -> MediaItem:
    """Return a medium of a row. Raises a ValueError or TypeError for what is none."""
    given = dict(value)
    if given.get("kind") not in ("video", "image") or not (given.get("path") or given.get("frames")):
        raise ValueError(f"expected a video or an image, got {value!r:.60}")
    given |= {"path": Path(given["path"]) if given.get("path") else None}
    given |= {"frames": tuple(Path(one) for one in given.get("frames") or ())}
    return MediaItem(**given | {"timestamps": tuple(float(one) for one in given.get("timestamps") or ())})


def _permutation(order: Any, media: int) -> list[Any] | None:
    """Return the shuffled order of a row: of its clip, or of each of several media, None for an image."""
    if order is None:
        return None
    if media == 1:
        return [int(i) for i in order]
    return [None if one is None else [int(i) for i in one] for one in _check_list(order, media)]


def _shuffled(row: dict[str, Any], accuracy: Sequence[float], above: float) -> dict[str, Any]:
    """Return the part of a card about the completions from shuffled frames, with the temporal bonus."""
    texts, known = row["shuffled_completions"], [a for a in row["shuffled_accuracy"] if a is not None]
    # Older files do not say how many completions were requested. For a video there is one accuracy, known or null, for
    # each of them.
    requested = row.get("shuffled_asked", len(row["shuffled_accuracy"]) if row["permutation"] is not None else 0)
    all_known = requested and len(known) == requested
    return {
        "asked": requested,
        "shuffled": [
            {"text": visible(text), "accuracy": float(value), "right": value > above}
            for text, value in zip(texts, _check_list(known, len(texts)), strict=True)
        ],
        "p": sum(accuracy) / len(accuracy),
        "p_shuffled": sum(known) / len(known) if all_known else None,
        "bonus": None if not requested or row["temporal"] is None else float(row["temporal"]),
    }


def _check_list(values: Any, count: int) -> list[Any]:
    """Return ``values``, and raise a ValueError unless it is a list of ``count`` values."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"expected a list of {count}, got {values!r:.60}")
    return values


def _numbers(values: Any, count: int) -> list[float | None]:
    return [None if value is None else float(value) for value in _check_list(values, count)]


def _question(prompt: str) -> str:
    """Return the question of a prompt, without the tokens of the chat template and the media.

    Older files hold only the prompt and not the question.
    """
    return _TURN.sub("", _VISION.sub("", prompt)).strip().removeprefix("user").removesuffix("assistant").strip()


def media_items(card: dict[str, Any]) -> list[MediaItem]:
    """Return the media of a rollout, in order; none for a question without media."""
    if card["items"] is not None:
        return [_item(item) for item in card["items"]]
    return [] if card["path"] is None else [MediaItem(card["kind"], Path(card["path"]))]


def check_inside(item: MediaItem, run: Run) -> None:
    """Raise a ValueError where a path of a medium lies outside of the run's ``data.root``."""
    root = media_root(run)
    for path in (item.path, *item.frames):
        if root is not None and path is not None and not path.resolve().is_relative_to(root):
            raise ValueError(f"outside of data.root ({root})")


def media_root(run: Run) -> Path | None:
    """Return the folder, with its symlinks resolved, that a run's media files lie in; None where it is not known."""
    root = run.option("data.root")
    if root is None and (data := run.option("dataset_name")) and Path(data).is_file():
        root = Path(data).parent
    return None if root is None else Path(root).resolve()
