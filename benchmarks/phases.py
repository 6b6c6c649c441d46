"""Where the time and the memory of a step go: seconds and peaks by named phase."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

OTHER = "other"
PHASES = ("decode", "prefill", "rollout", "rewards", "reference", "policy", "optimizer", OTHER)
_MARK = "videor1 phase: "


class Phases:
    """Seconds of each phase; what runs in a phase inside another counts in the inner one alone.

    With ``memory`` also the most that was allocated at once in each phase, beyond what was there when the watch began:
    on a GPU by the allocator's own count, on a CPU by torch's profiler, which slows what it watches: time and memory
    are then measured in different rounds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.peaks: dict[str, int] = {}  # bytes
        self.current = OTHER
        self._memory, self._before = False, 0
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer = self.current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    @contextmanager
    def watched(self, *, memory: bool) -> Iterator[None]:
        """What is measured; everything before is forgotten."""
        self.seconds, self.peaks = Counter(), {}
        self._memory = memory
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        on_card = self.device.type == "cuda"
        if memory and on_card:
            self._before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        if memory and not on_card:
            profile.__enter__()
        self._since = self._now()
        self._mark()
        try:
            yield
        finally:
            self._switch(OTHER)
            if memory and not on_card:
                profile.__exit__(None, None, None)
                self.peaks = _peaks(profile)
            self._memory = False

    def become(self, name: str) -> None:
        """The rest of the innermost phase is another one's."""
        self._switch(name)

    def watch(self, owner: Any, name: str, phase: str, *, inside: str | None = None) -> None:
        """Calls of ``owner.name`` are a phase from now on; ``inside``: only those made in that other phase."""
        call: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if inside is not None and self.current != inside:
                return call(*args, **kwargs)
            with self(phase):
                return call(*args, **kwargs)

        setattr(owner, name, timed)

    def _switch(self, name: str) -> None:
        now = self._now()
        self.seconds[self.current] += now - self._since
        if self._memory and self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - self._before
            self.peaks[self.current] = max(self.peaks.get(self.current, 0), peak)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since, self.current = now, name
        self._mark()

    def _mark(self) -> None:
        if self._memory and self.device.type == "cpu":
            with torch.profiler.record_function(_MARK + self.current):
                pass

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def draw_phases(record: Mapping[str, Any], path: Path) -> None:
    """A bar for each way to make a step, cut into its phases; a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if row["seconds"] is not None]
    cases = {str(row["size"]): row["size"] | {"title": row["title"]} for row in rows}
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, 1.7 * len(cases) + 0.6), layout="constrained", squeeze=False)
    for axis, (key, size) in zip(axes.flat, cases.items(), strict=True):
        own = [row for row in rows if str(row["size"]) == key][::-1]
        left = [0.0] * len(own)
        for phase, color in zip(PHASES, plt.get_cmap("tab10").colors, strict=False):
            seconds = [row["phases"].get(phase, {}).get("seconds", 0.0) for row in own]
            axis.barh([row["implementation"] for row in own], seconds, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        for row, end in zip(own, left, strict=True):
            axis.text(
                end, row["implementation"], f" {row['prompts_per_hour']:.0f} prompts / hour", va="center", fontsize=8
            )
        shown = ", ".join(f"{name} {value}" for name, value in size.items() if name != "title")
        axis.set_title(f"{size['title']}: {shown}", loc="left", fontsize=9)
        axis.set_xlim(0, 1.25 * max(left))
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].set_xlabel("seconds a step", fontsize=8)
    axes.flat[0].legend(ncols=len(PHASES), fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.12))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _peaks(profile: Any) -> dict[str, int]:
    """Highest sum of allocations and releases since the beginning, by the phase that the last mark before it names."""
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live, phase, peaks = 0, OTHER, dict[str, int]()
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
        elif event.name().startswith(_MARK):
            phase = event.name().removeprefix(_MARK)
        else:
            continue
        peaks[phase] = max(peaks.get(phase, 0), live)
    return peaks
