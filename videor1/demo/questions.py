"""The demo's questions, as entries of a data file in the Video-R1 JSON format, and what guessing earns on them."""

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
# Of 8 questions about videos. Few skills, each met often, are what so small a model learns from rewards in minutes.
SHARES: dict[tuple[Kind, Topic], int] = {("ordinal", "color"): 4, ("neighbour", "color"): 2, ("list", "shape"): 2}


@dataclass(frozen=True)
class Question:
    """What is asked, apart from the clip it is asked about."""

    kind: Kind
    topic: Topic
    text: str
    subject: str = ""  # what the thought names before the answer: "third", in "third red"
    place: int = 0  # of the segment that answers it; unused in a list


def video_questions(kind: Kind, topic: Topic) -> list[Question]:
    """Every question of a kind about a clip."""
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
    """The question about an image."""
    return Question("still", topic, f"Which {topic} is it?")


def draw_questions(count: int, rng: Random, *, still: bool = False) -> list[Question]:
    """``count`` questions in random order: kinds and topics by ``SHARES`` (stills: colours and shapes by halves), and
    the questions of a kind equally often, as far as ``count`` allows."""
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
    """The data file's entry for a question about the media at ``path``, which shows ``order``."""
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
        # No word between the two: a model looks up "red" where it has just read "third", and learns it twice as fast.
        thought = f"{question.subject} {word}".strip()
        fields["problem_type"] = "multiple choice"
        fields["options"] = [f"{_letter(i)}. {option}" for i, option in enumerate(palette)]
    return fields | {"process": f"<think>{thought}</think>", "solution": f"<answer>{answer}</answer>"}


def all_entries() -> Iterator[dict[str, Any]]:
    """An entry for every question and every answer to it."""
    videos = [question for kind, topic in SHARES for question in video_questions(kind, topic)]
    for question in [*videos, *map(still_question, PALETTES)]:
        for order in itertools.permutations(PALETTES[question.topic]):
            yield entry(question, order, "-", 0)


def guessing_reward(entries: list[dict[str, Any]]) -> float:
    """Expected mean accuracy reward of answering each with a random option, or each list with its words in a random
    order (all orders equally likely)."""
    return sum(_guessed(e["problem_type"], e["solution"], e.get("options", ())) for e in entries) / len(entries)


def _guessed(problem_type: str, solution: str, options: tuple[str, ...]) -> float:
    if problem_type == "multiple choice":
        return 1 / len(options)
    words = solution.removeprefix("<answer>").removesuffix("</answer>").split()
    guesses = [f"<answer>{' '.join(guess)}</answer>" for guess in itertools.permutations(words)]
    return sum(accuracy_reward(guess, solution, problem_type) for guess in guesses) / len(guesses)


def _letter(index: int) -> str:
    return "ABCD"[index]
