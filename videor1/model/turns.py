"""Where the assistant's turns stand in a rendered conversation: the parts of its text that SFT learns."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Stands for the content of an assistant's turn where only the text around it is looked for.
STAND_IN = "The answer of this turn."
_OWN_BLOCK = re.compile(r"<think>\s*</think>\s*")


def assistant_spans(
    rendered: str, bare: str, contents: Sequence[str | None], *, eos: str, opened: str = ""
) -> list[tuple[int, int]]:
    """Return where a rendered conversation holds what the assistant wrote: (start, end) in characters, EOS included.

    No text of a conversation may hold ``eos``. Then every turn ends with the only one in it, and what the template
    writes before a turn's content is what it writes before a stand-in.

    Args:
        rendered: the conversation as the chat template gives it, up to its last turn or the next answer's beginning.
        bare: the same with ``STAND_IN`` for the content of each of the assistant's turns.
        contents: of each turn in order: what the assistant wrote; None for the turns of others.
        eos: the text of EOS.
        opened: what the template opens an answer with.

    Raises:
        ValueError: the template does not end each turn with one EOS, or changes what the assistant wrote otherwise than
            :func:`written` knows.
    """
    segments, bare_segments = _segments(rendered, eos), _segments(bare, eos)
    more = len(segments) - len(contents)
    if more not in (0, 1) or len(bare_segments) != len(segments):  # It may begin with a system turn of its own.
        raise ValueError(f"it ends {len(contents)} turns with {len(segments)} times {eos}, expected one each")
    spans = []
    turns = zip(contents, segments[more:], bare_segments[more:], strict=True)
    for content, (start, end), (bare_start, bare_end) in turns:
        if content is None:
            continue
        before, found, _ = bare[bare_start:bare_end].partition(STAND_IN)
        head = before.partition("<think>")[0]
        segment = rendered[start:end]
        if not found or not segment.startswith(head):
            raise ValueError("it changes or leaves out a turn of the assistant")
        body = segment[len(head) :].removesuffix(eos)
        first, last = written(body, content, opened)
        # Blanks that the template adds at the end are its own, but EOS is learned behind what is written.
        spans += [(start + len(head) + first, start + len(head) + last)] if last < len(body) else []
        spans += [(end - len(eos), end)] if last < len(body) else [(start + len(head) + first, end)]
    return spans


def _segments(text: str, eos: str) -> list[tuple[int, int]]:
    """Return where the turns of a rendered conversation stand, each with the EOS that ends it."""
    ends = [match.end() for match in re.finditer(re.escape(eos), text)]
    return list(zip([0, *ends], ends, strict=False))


def written(body: str, content: str, opened: str = "") -> tuple[int, int]:
    """Return which part of a rendered turn, (start, end) in characters, is of its content.

    Chat templates give a content as it is or without the blanks around it. Those of thinking models write its reasoning
    anew between tags and blanks of their own, leave it out of an earlier turn, or put an empty pair of tags before a
    content that has none, which is no part of it. Nor is what the template opens an answer with.

    Raises:
        ValueError: the body is nothing of these.
    """
    begins = len(opened) if opened and body.startswith(opened) else 0
    if body == content:
        return begins, len(body)
    bare, end = content.strip(), len(body.rstrip())
    start = len(body) - len(body.lstrip())
    if body.strip() == bare:
        return max(start, begins), end
    reasoning, thinks, answer = bare.rpartition("</think>")
    answer = answer.strip()
    if not answer or not body.rstrip().endswith(answer):
        raise ValueError("it changes or leaves out what the assistant says")
    own = body[: end - len(answer)]
    if not thinks:
        if _OWN_BLOCK.fullmatch(own.lstrip()):
            return end - len(answer), end
    elif not own.strip():  # The reasoning of an earlier turn is left out.
        return end - len(answer), end
    elif re.fullmatch(r"\s*<think>(.*)</think>\s*", own, re.DOTALL):
        kept = own.strip().removeprefix("<think>").removesuffix("</think>").strip()
        if kept == reasoning.strip().removeprefix("<think>").strip():
            return max(start, begins), end
    raise ValueError("it changes what the assistant thinks or says")
