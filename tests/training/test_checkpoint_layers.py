"""Where checkpoint_layers leaves open how many layers recompute, a run with a GPU chooses, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
from runs import Lab, same_weights, train_flags, weights

from videor1.config import TrainConfig
from videor1.config.cli import load_run_config, parse
from videor1.training import loop
from videor1.training.distributed.ranks import Ranks
from videor1.training.tgrpo import Trainer

OPTIONS: dict[str, Any] = {"max_steps": 1, "gradient_checkpointing": True, "beta": 0}


class Two(Ranks):
    """The other of which has 3 bytes free."""

    def gather(self, value: Any) -> list[Any]:
        return [value, 3] if value == 5 else [value]


def make(lab: Lab, name: str, asked: list[tuple[Any, int]], **options: Any) -> Trainer:
    def choose(config: TrainConfig, free: int) -> tuple[int, str]:
        asked.append((config.checkpoint_layers, free))
        return 1, "one layer, because"

    flags = train_flags(lab.assets, lab.folder / name, **OPTIONS | options)
    return Trainer(parse(TrainConfig, flags, prog="train", description=""), choose)


def recomputing(run: Trainer) -> list[bool]:
    return [layer.gradient_checkpointing for layer in run.model.hf.model.language_model.layers]


def test_the_least_free_memory_of_all_ranks_decides(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it chose is said and not stored: a resumed run chooses anew. The results are those of all layers."""
    monkeypatch.setattr(loop, "free_memory", lambda device: 5)
    monkeypatch.setattr(loop, "make_ranks", lambda config: Two())
    asked: list[tuple[Any, int]] = []
    run = make(lab, "chosen", asked)
    assert asked == [(None, 3)]
    assert recomputing(run) == [True, False, False, False]
    final = run.train()
    assert "one layer, because" in capsys.readouterr().err
    assert load_run_config(TrainConfig, lab.folder / "chosen" / "config.yaml").checkpoint_layers is None
    assert same_weights(weights(final), weights(lab.make("all", **OPTIONS).train()))
    make(lab, "chosen", asked, resume="auto")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("free", "options", "layers"),
    [
        (None, {}, [True] * 4),  # a CPU
        (5, {"checkpoint_layers": 0}, [False] * 4),
        (5, {"gradient_checkpointing": False}, [False] * 4),
    ],
    ids=["CPU", "given", "off"],
)
def test_nothing_is_chosen(
    free: int | None, options: dict[str, Any], layers: list[bool], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "free_memory", lambda device: free)
    asked: list[tuple[Any, int]] = []
    assert recomputing(make(lab, "", asked, **options)) == layers
    assert not asked


def test_a_cpu_has_no_memory_to_choose_by(lab: Lab) -> None:
    asked: list[tuple[Any, int]] = []
    make(lab, "", asked)
    assert not asked
