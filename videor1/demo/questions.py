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
# Of 8 video questions of one topic. The cold start lists orders more often: it learns to see, which examples teach
# better than rewards, and leaves the rarer kinds of question to T-GRPO.
SHARES: dict[Kind, int] = {"ordinal": 4, "neighbour": 2, "list": 2}
COLD_START_SHARES: dict[Kind, int] = {"ordinal": 3, "neighbour": 1, "list": 4}


@dataclass(frozen=True)
class Question:
    """What is asked, apart from the clip it is asked about."""

    kind: Kind
    topic: Topic
    text: str
    subject: str = ""  # what the thought names before the answer: "third", in "third red"
    place: int = 0  # of the segment that answers it; unused in a list


def video_questions(topic: Topic) -> dict[Kind, list[Question]]:
    """Every question about a clip, by kind."""
    ordinal = [Question("ordinal", topic, f"Which {topic} comes {word}?", word, i) for i, word in enumerate(ORDINALS)]
    neighbour = []
    for i, word in enumerate(ORDINALS):
        for side, place in (("before", i - 1), ("after", i + 1)):
            if 0 <= place < SEGMENTS:
                text = f"Which {topic} comes just {side} the {word}?"
                neighbour.append(Question("neighbour", topic, text, ORDINALS[place], place))
    orders = [Question("list", topic, f"In which order do the {topic}s appear?")]
    return {"ordinal": ordinal, "neighbour": neighbour, "list": orders}


def still_question(topic: Topic) -> Question:
    """The question about an image."""
    return Question("still", topic, f"Which {topic} is it?")


def draw_questions(
    count: int, rng: Random, *, still: bool = False, shares: dict[Kind, int] = SHARES
) -> list[Question]:
    """``count`` questions in random order: colours and shapes by halves, the kinds by ``shares`` of 8, and the
    questions of a kind equally often, as far as ``count`` allows."""
    cycles: list[Iterator[Question]] = []
    for topic in PALETTES:
        if still:
            cycles.append(itertools.repeat(still_question(topic)))
            continue
        by_kind = video_questions(topic)
        for kind, share in shares.items():
            cycles += [itertools.cycle(rng.sample(by_kind[kind], len(by_kind[kind])))] * share
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
    for topic, palette in PALETTES.items():
        for order in itertools.permutations(palette):
            for question in itertools.chain(*video_questions(topic).values(), [still_question(topic)]):
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
