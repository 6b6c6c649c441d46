"""Render the page, with bounds on its size."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import jinja2
import plotly.offline

from videor1.config import VideoConfig
from videor1.report.cards import cards_of, check_inside, media_items, media_root, visible
from videor1.report.charts import charts, points
from videor1.report.overview import compared_options, overview
from videor1.report.run import Run
from videor1.report.thumbnails import Thumbnails
from videor1.types import MediaItem
from videor1.video import FRAME_RULES, QWEN2_RULES, FrameRules

TEXT_BYTES = 4 * 2**20  # most bytes of the rollouts' text
PICTURE_BYTES = 4 * 2**20  # No further frames are added to the page once it holds so many bytes of them.
DECODE_SECONDS = 60.0  # No further media are decoded after so many seconds.


def render(runs: Sequence[Run], count: int) -> str:
    """Return the HTML page of the runs, with at most ``count`` rollouts."""
    problems: list[str] = []
    cards, media = _rollouts(runs, count, problems)
    figures, empty = charts(runs)
    longest = max((len(one) for run in runs for one in run.metrics.series.values()), default=0)
    files = importlib.resources.files("videor1.report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("videor1.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja").render(
        title=visible(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=[overview(run) for run in runs],
        compared=compared_options(runs) if len(runs) > 1 else [],
        charts=figures,
        figures=[{"id": one["id"], "figure": one["figure"]} for one in figures],
        empty=empty,
        smooth=sorted({one.span for run in runs for one in run.metrics.series.values() if one.smooths}),
        thinned=longest if longest > points(len(runs)) else 0,
        points=points(len(runs)),
        problems=[visible(problem) for problem in problems],
        has_rollouts=bool(cards),
        rollouts={"runs": [visible(run.name) for run in runs], "cards": cards, "media": media},
        plotly=plotly.offline.get_plotlyjs(),
        script=files.joinpath("page.js").read_text(encoding="utf-8"),
        style=files.joinpath("page.css").read_text(encoding="utf-8"),
    )


def _rollouts(
    runs: Sequence[Run], count: int, problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (the cards of all runs, the frames that they refer to)."""
    cards: list[dict[str, Any]] = []
    with_rollouts = [(i, run) for i, run in enumerate(runs) if run.rollout_files]
    for k, (i, run) in enumerate(with_rollouts):
        share = count * (k + 1) // len(with_rollouts) - count * k // len(with_rollouts)
        cards += [card | {"run": i} for card in cards_of(run, share, problems)]
    found = len(cards)
    while cards and (size := sum(len(json.dumps(card)) for card in cards)) > TEXT_BYTES:
        keep = min(len(cards) - 1, int(len(cards) * TEXT_BYTES / size))
        cards = [cards[i * len(cards) // keep] for i in range(keep)]
    if len(cards) < found:
        problems.append(f"{len(cards)} of {found} rollouts are shown: more text would make the page too large.")
    thumbnails = Thumbnails(PICTURE_BYTES, DECODE_SECONDS)
    for card in cards:
        run = runs[card["run"]]
        rules = FRAME_RULES.get(card.pop("frames"), QWEN2_RULES)  # Older rows name none.
        shown = [_picture(thumbnails, item, run, rules) for item in media_items(card)]
        # Of several media each has an entry, and an order of its own.
        card["media"] = shown if len(shown) > 1 else shown[0] if shown else None
        card["kinds"] = [item.kind for item in media_items(card)]
        card["unit"] = run.option("temporal.shuffle_unit")
        del card["path"], card["items"]
    return cards, [clip | {"name": visible(clip["name"]), "note": visible(clip["note"])} for clip in thumbnails.media]


def _picture(thumbnails: Thumbnails, item: MediaItem, run: Run, rules: FrameRules) -> int:
    """Return the index of a medium's frames, or of a note that says why there are none."""
    try:
        check_inside(item, run)
        return thumbnails.add(item, _video_options(run), media_root(run), rules)
    except (ValueError, TypeError) as error:
        return thumbnails.note(str(item.named), str(error))


def _video_options(run: Run) -> VideoConfig:
    known = {field.name for field in dataclasses.fields(VideoConfig)}
    given = {name.removeprefix("video."): value for name, value in run.options.items() if name.startswith("video.")}
    return VideoConfig(**{name: value for name, value in given.items() if name in known})
