"""Create the demo's questions as entries of a data file in the Video-R1 JSON format, and score guessing on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from videor1.demo.clips import PALETTES, SEGMENTS, Topic
from videor1.rewards import accuracy_reward

Kind = Literal["ordinal", "neighbour", "list", "still"]

ORDINALS = ("first", "second", "third", "last")
# The numbers are out of 8 questions about videos. There are few kinds, each of them frequent, because so small a model
# can learn only these from rewards within minutes.
SHARES: dict[tuple[Kind, Topic], int] = {("ordinal", "color"): 4, ("neighbour", "color"): 2, ("list", "shape"): 2}


@dataclass(frozen=True)
class Question:
    """A question, independent of the clip that it is asked about."""

    kind: Kind
    topic: Topic
    text: str
    subject: str = ""  # the word before the answer in the reasoning: "third", in "third red"
    place: int = 0  # index of the segment that is the answer; unused by a list


def video_questions(kind: Kind, topic: Topic) -> list[Question]:
    """Return every question of a kind about a clip."""
    if kind == "list":
        return [Question("list", topic, f"In which order do the {topic}s appear?")]
    if kind == "ordinal":
        return [Question(kind, topic, f"Which {topic} comes {word}?", word, i) for i, word in enumerate(ORDINALS)]
    beside = (("after", 0, 1), ("before", SEGMENTS - 1, SEGMENTS - 2))
    return [
        Question(kind, topic, f"Which {topic} comes just {side} the {ORDINALS[anchor]}?", ORDINALS[place], place)
        for side, anchor, place in beside
    ]


def still_question(topic: Topic) -> Question:
    """Return the question about an image."""
    return Question("still", topic, f"Which {topic} is it?")


def draw_questions(count: int, rng: Random, *, still: bool = False) -> list[Question]:
    """Draw ``count`` questions in random order.

    Kinds and topics are drawn in the proportions of ``SHARES`` (for still images, colors and shapes in equal parts),
    and the questions of a kind equally often, as far as ``count`` allows.
    """
    cycles: list[Iterator[Question]] = []
    if still:
        cycles += [itertools.repeat(still_question(topic)) for topic in PALETTES]
    else:
        for (kind, topic), share in SHARES.items():
            questions = video_questions(kind, topic)
            cycles += [itertools.cycle(rng.sample(questions, len(questions)))] * share
    rng.shuffle(cycles)
    drawn = [next(questions) for questions in itertools.islice(itertools.cycle(cycles), count)]
    rng.shuffle(drawn)
    return drawn


def entry(question: Question, order: tuple[str, ...], path: str, problem_id: int) -> dict[str, Any]:
    """Return the entry of a data file for a question about the media at ``path``, which shows ``order``."""
    palette = PALETTES[question.topic]
    fields: dict[str, Any] = {
        "problem_id": problem_id,
        "problem": question.text,
        "data_type": "image" if question.kind == "still" else "video",
        "path": path,
        "data_source": f"demo/{question.kind}/{question.topic}",
    }
    if question.kind == "list":
        answer = thought = " ".join(order)
        fields["problem_type"] = "OCR"
    else:
        word = order[question.place]
        answer = _letter(palette.index(word))
        # The two words are adjacent, because a model then finds "red" right after "third" and learns twice as fast.
        thought = f"{question.subject} {word}".strip()
        fields["problem_type"] = "multiple choice"
        fields["options"] = [f"{_letter(i)}. {option}" for i, option in enumerate(palette)]
    return fields | {"process": f"<think>{thought}</think>", "solution": f"<answer>{answer}</answer>"}


def all_entries() -> Iterator[dict[str, Any]]:
    """Yield an entry for every question and every possible order, so that every answer occurs."""
    videos = [question for kind, topic in SHARES for question in video_questions(kind, topic)]
    for question in [*videos, *map(still_question, PALETTES)]:
        for order in itertools.permutations(PALETTES[question.topic]):
            yield entry(question, order, "-", 0)


def guessing_reward(entries: list[dict[str, Any]]) -> float:
    """Return the expected mean accuracy reward of guessing.

    A guess is a random option, or for a list its words in a random order; all guesses are equally likely.
    """
    return sum(_expected_reward(e["problem_type"], e["solution"], e.get("options", ())) for e in entries) / len(entries)


def _expected_reward(problem_type: str, solution: str, options: tuple[str, ...]) -> float:
    if problem_type == "multiple choice":
        return 1 / len(options)
    words = solution.removeprefix("<answer>").removesuffix("</answer>").split()
    guesses = [f"<answer>{' '.join(guess)}</answer>" for guess in itertools.permutations(words)]
    return sum(accuracy_reward(guess, solution, problem_type) for guess in guesses) / len(guesses)


def _letter(index: int) -> str:
    return "ABCD"[index]
