"""SFT: packing that changes nothing, and a cold start that knows when to stop. Its loss is in test_passes.py."""

from pathlib import Path

import pytest
from batches import opened
from runs import Lab, entries, last_metrics, same_weights, sft_flags, sft_trainer, weights, write_data
from spies import spy

import videor1.training.sft
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError, DataError
from videor1.sft import main
from videor1.training.checkpoint import checkpoints


def test_examples_end_with_the_answer(lab: Lab) -> None:
    run = lab.sft(data__shuffle=False, max_steps=1)
    with opened(run, 6) as examples:
        tokenizer = run.model.tokenizer
        for example, entry in zip(examples, entries(lab.assets.sft), strict=True):
            assert tokenizer.decode(example.answer) == f"{entry['process']}\n{entry['solution']}<|im_end|>"
            assert example.answer[-1] == run.model.special.eos
            assert tokenizer.decode(example.prompt.input_ids).endswith("<|im_start|>assistant\n")
            assert len(example) == len(example.prompt.input_ids) + len(example.answer)


def test_targets_go_on_where_the_template_ends(thinking_assets: Assets, tmp_path: Path) -> None:
    """<think> stands in the prompt, so that it is not learned; a sample that opens it twice is skipped and counted."""
    good = entries(thinking_assets.sft)[:3]
    twice = good[0] | {"process": "<think>No, <think>so.</think>"}
    data = write_data(tmp_path / "cot.json", [twice, *good])
    options = dict.fromkeys(["video__max_pixels", "video__min_pixels", "video__image_max_pixels"], 4096)
    options |= {"dataset_name": data, "data__root": "/", "data__shuffle": False, "max_steps": 1}
    run = sft_trainer(thinking_assets, tmp_path / "run", **options)
    with opened(run, 3) as examples:
        tokenizer = run.model.tokenizer
        for example, entry in zip(examples, good, strict=True):
            assert tokenizer.decode(example.prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n")
            left = entry["process"].removeprefix("<think>")
            assert tokenizer.decode(example.answer) == f"{left}\n{entry['solution']}<|im_end|>"
        assert run.source.skipped == {"process": 1}


def test_packing_and_accumulation_do_not_change_the_update(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of four samples, rows under a bound, and four accumulated batches: the same step up to rounding."""
    note = lambda packed, *_: (len(packed.prompts), packed.layout.total_tokens)  # noqa: E731
    rows = spy(monkeypatch, videor1.training.sft, "pack", note)
    options = {"max_steps": 2, "data__shuffle": False, "learning_rate": 1e-4}
    variants = {
        "packed": {"per_device_train_batch_size": 4},
        "bounded": {"per_device_train_batch_size": 4, "max_length": 200},
        "accumulated": {"gradient_accumulation_steps": 4},
    }
    finals = {name: lab.sft(name, **options, **more).train() for name, more in variants.items()}
    whole, cut = rows[:2], rows[2:-8]
    assert [prompts for prompts, _ in whole + rows[-8:]] == [4, 4] + 8 * [1]
    assert sum(prompts for prompts, _ in cut) == 8
    assert max(tokens for _, tokens in cut) <= 200 < min(tokens for _, tokens in whole)
    expected = lab.rows("packed")
    for name in ("bounded", "accumulated"):
        for row, packed in zip(lab.rows(name), expected, strict=True):
            assert row["loss"] == pytest.approx(packed["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(packed["grad_norm"], rel=1e-4)
    assert not same_weights(weights(finals["packed"]), weights(lab.assets.model))


def test_it_learns_and_stops_at_the_accuracy(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Few samples that are also the held-out ones: learnt by heart well before the last step."""
    data = write_data(lab.folder / "two.json", entries(lab.assets.sft)[:2])
    options = {"dataset_name": data, "data__eval_path": data, "data__root": "/", "eval_steps": 10, "save_steps": 10}
    options |= {"stop_at_accuracy": 0.9, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 7}
    options |= {"max_steps": 200, "max_completion_length": 32, "lr_scheduler_type": "constant"}
    run = lab.sft("run", **options)
    assert run.title() == "sft until accuracy 0.9"
    final = run.train()
    assert f"sft until accuracy 0.9: reached at step {run.step}, {run.accuracy:.3f}" in capsys.readouterr().err
    assert run.accuracy >= 0.9
    assert run.step < 200
    assert run.step % 10 == 0
    assert checkpoints(lab.folder / "run")[-1] == (run.step, final)
    rows = lab.rows("run")
    assert [row for row in rows if "eval/ordered" in row][-1]["eval/ordered"] == run.accuracy
    assert last_metrics(lab.folder / "run")["step"] == run.step  # the steps since the last full line too
    assert last_metrics(lab.folder / "run")["loss"] < rows[0]["loss"] - 1
    # A finished run that is asked to go on sees that it is finished.
    assert lab.sft("run", **options, resume="auto").train() == final
    assert lab.rows("run") == rows


def test_entries_without_a_thought_are_no_sft_data(lab: Lab) -> None:
    found = [{k: v for k, v in entry.items() if k != "process"} for entry in entries(lab.assets.sft)]
    data = write_data(lab.folder / "data.json", found)
    with pytest.raises(DataError, match="missing field 'process'"):
        lab.sft("run", dataset_name=data, data__root="/")
    with pytest.raises(ConfigError, match=r"stop_at_accuracy: needs data.eval_path"):
        lab.sft("run", stop_at_accuracy=0.5)


def test_the_command_says_what_comes_next(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, sft_flags(lab.assets, lab.folder, max_steps=1)) == 0
    final = lab.folder / "checkpoints" / "step-1"
    shown = capfd.readouterr().out
    assert f"Saved {final}. Next: python -m videor1.train --model_name_or_path {final}" in shown
    assert f"Report: {lab.folder / 'report.html'}" in shown
    assert (lab.folder / "report.html").exists()
    assert not list(lab.folder.glob("rollouts.jsonl"))
