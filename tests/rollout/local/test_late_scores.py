"""Scores that arrive later: a branch that may not matter waits for them, once, and without spinning."""

from concurrent.futures import Future
from typing import Any

import pytest
from rollouts import IMAGE, VIDEO, Judge, ask, ending

from videor1.rollout import Branch, LocalEngine, Request, SamplingOptions
from videor1.types import Completion


class Late(Judge):
    """Knows nothing of a completion before it is settled; then it needs the shuffled ones or not."""

    def __init__(self, verdict: bool) -> None:
        super().__init__(None)
        self.verdict, self.unsettled, self.waits, self.at = verdict, [], 0, -1

    def ordered_done(self, answer: Completion) -> None:
        super().ordered_done(answer)
        self.unsettled.append(Future())

    def settle(self, *, wait: bool) -> None:
        assert wait  # an engine without a clock takes no score because it happens to be there
        self.waits, self.at = self.waits + 1, len(self.ordered)
        self.unsettled.clear()
        self.verdicts = (self.verdict,)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("max_rows", [4, 64])
def test_what_waits_and_what_starts(eager: bool, max_rows: int) -> None:
    model = ending()

    def generate(*judges: Any) -> Any:
        requests = []
        for prompt, judge in zip((VIDEO, IMAGE, VIDEO), judges, strict=False):
            asked = ask(model, prompt, 3)
            shuffled = Branch(2, ("shuffled", prompt.draw, len(requests)), asked.ordered.features)
            late = judge if isinstance(judge, Late) else None
            requests.append(Request(prompt, 0, asked.ordered, shuffled, judge, late))
        engine = LocalEngine(model, SamplingOptions(12), max_rows=max_rows, eager=eager)
        return engine.generate(requests)

    judges = [Late(True), Late(False), Judge(True)]
    rollout = generate(*judges)
    everything = generate(Judge(True), Judge(True), Judge(True))
    assert [len(group.ordered) for group in rollout.groups] == [3] * 3
    runs = [len(group.shuffled) for group in rollout.groups]
    if eager:  # they start, and no score stops them
        assert (runs, [judge.waits for judge in judges[:2]]) == ([2, 2, 2], [0, 0])
    else:
        assert runs == [2, 0, 2]
        assert [(judge.waits, judge.at) for judge in judges[:2]] == [(1, 3), (1, 3)]
        assert rollout.stats.shuffled_skipped == 2
        assert not any(judge.unsettled for judge in judges[:1])
    for one, other in zip(rollout.groups, everything.groups, strict=True):
        assert [c.text for c in one.ordered] == [c.text for c in other.ordered]
        assert [c.text for c in one.shuffled] == [c.text for c in other.shuffled][: len(one.shuffled)]
