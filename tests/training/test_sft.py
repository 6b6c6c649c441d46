"""SFT: packing that changes nothing, and a cold start that knows when to stop. Its loss is in test_passes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batches import opened
from runs import entries, last_metrics, metrics, same_weights, sft_flags, sft_trainer, weights, write_data

import videor1.training.sft
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError, DataError
from videor1.sft import main
from videor1.training.checkpoint import checkpoints
from videor1.training.passes import Packed, pack


def test_examples_end_with_the_answer(assets: Assets, tmp_path: Path) -> None:
    run = sft_trainer(assets, tmp_path, data__shuffle=False, max_steps=1)
    with opened(run, 6) as examples:
        tokenizer = run.model.tokenizer
        for example, entry in zip(examples, entries(assets.sft), strict=True):
            assert tokenizer.decode(example.answer) == f"{entry['process']}\n{entry['solution']}<|im_end|>"
            assert example.answer[-1] == run.model.special.eos
            assert tokenizer.decode(example.prompt.input_ids).endswith("<|im_start|>assistant\n")
            assert len(example) == len(example.prompt.input_ids) + len(example.answer)


def test_packing_and_accumulation_do_not_change_the_update(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of four samples, rows under a bound, and four accumulated batches: the same step up to rounding."""
    rows: list[tuple[int, int]] = []  # (prompts, tokens) of each

    def noted(*arguments: Any) -> Packed:
        packed = pack(*arguments)
        rows.append((len(packed.prompts), packed.layout.total_tokens))
        return packed

    monkeypatch.setattr(videor1.training.sft, "pack", noted)
    options = {"max_steps": 2, "data__shuffle": False, "learning_rate": 1e-4}
    variants = {
        "packed": {"per_device_train_batch_size": 4},
        "bounded": {"per_device_train_batch_size": 4, "max_length": 200},
        "accumulated": {"gradient_accumulation_steps": 4},
    }
    finals = {name: sft_trainer(assets, tmp_path / name, **options, **more).train() for name, more in variants.items()}
    whole, cut = rows[:2], rows[2:-8]
    assert [prompts for prompts, _ in whole + rows[-8:]] == [4, 4] + 8 * [1]
    assert sum(prompts for prompts, _ in cut) == 8
    assert max(tokens for _, tokens in cut) <= 200 < min(tokens for _, tokens in whole)
    expected = metrics(tmp_path / "packed")
    for name in ("bounded", "accumulated"):
        for row, packed in zip(metrics(tmp_path / name), expected, strict=True):
            assert row["loss"] == pytest.approx(packed["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(packed["grad_norm"], rel=1e-4)
    assert not same_weights(weights(finals["packed"]), weights(assets.model))


def test_it_learns_and_stops_at_the_accuracy(
    assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few samples that are also the held-out ones: learnt by heart well before the last step."""
    data = write_data(tmp_path / "two.json", entries(assets.sft)[:2])
    options = {"dataset_name": data, "data__eval_path": data, "data__root": "/", "eval_steps": 10, "max_steps": 200}
    options |= {"stop_at_accuracy": 0.9, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 7}
    options |= {"max_completion_length": 32, "lr_scheduler_type": "constant"}
    run = sft_trainer(assets, tmp_path / "run", **options)
    assert run.title() == "sft until accuracy 0.9"
    final = run.train()
    assert f"sft until accuracy 0.9: reached at step {run.step}, {run.accuracy:.3f}" in capsys.readouterr().err
    assert run.accuracy >= 0.9
    assert run.step < 200
    assert run.step % 10 == 0
    assert checkpoints(tmp_path / "run") == [(run.step, final)]
    rows = metrics(tmp_path / "run")
    assert [row for row in rows if "eval/ordered" in row][-1]["eval/ordered"] == run.accuracy
    assert last_metrics(tmp_path / "run")["step"] == run.step  # the steps since the last full line too
    assert last_metrics(tmp_path / "run")["loss"] < rows[0]["loss"] - 1
    # A finished run that is asked to go on sees that it is finished.
    assert sft_trainer(assets, tmp_path / "run", **options, resume="auto").train() == final
    assert metrics(tmp_path / "run") == rows


def test_entries_without_a_thought_are_no_sft_data(assets: Assets, tmp_path: Path) -> None:
    found = [{k: v for k, v in entry.items() if k != "process"} for entry in entries(assets.sft)]
    data = write_data(tmp_path / "data.json", found)
    with pytest.raises(DataError, match="missing field 'process'"):
        sft_trainer(assets, tmp_path / "run", dataset_name=data, data__root="/")
    with pytest.raises(ConfigError, match=r"stop_at_accuracy: needs data.eval_path"):
        sft_trainer(assets, tmp_path / "run", stop_at_accuracy=0.5)


def test_the_command_says_what_comes_next(assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, sft_flags(assets, tmp_path, max_steps=1)) == 0
    final = tmp_path / "checkpoints" / "step-1"
    shown = capfd.readouterr().out
    assert f"Saved {final}. Next: python -m videor1.train --model_name_or_path {final}" in shown
    assert f"Report: {tmp_path / 'report.html'}" in shown
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob("rollouts.jsonl"))
