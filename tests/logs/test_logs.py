"""Run folder writers: what survives a kill, what a resumed run drops, trackers, progress, the summary table."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
import torch

from videor1.config import TrainConfig
from videor1.errors import ConfigError, DataError
from videor1.logs import trackers
from videor1.logs.jsonl import JsonlWriter, read_jsonl
from videor1.logs.progress import Progress, summary_table
from videor1.logs.trackers import MetricsWriter


def test_a_line_is_json_with_step_first_and_sorted_keys(tmp_path):
    writer = JsonlWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write(1, {"reward": 0.5, "loss": float("nan"), "kl": float("inf"), "temporal/p": 1, "note": "é\n"})
    text = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8")  # before close: every line is flushed
    assert text == '{"step": 1, "kl": null, "loss": null, "note": "é\\n", "reward": 0.5, "temporal/p": 1}\n'
    writer.close()


def test_tensors_arrays_and_nested_values(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(
            3,
            {
                "a": torch.tensor(1.5, requires_grad=True),
                "b": torch.tensor([1.0, float("nan")]),
                "c": np.float32(0.5),
                "d": np.int64(7),
                "e": [(1, float("-inf"))],
                "f": {"x": None, "y": [True]},
                "g": tmp_path,
            },
        )
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {
            "step": 3,
            "a": 1.5,
            "b": [1.0, None],
            "c": 0.5,
            "d": 7,
            "e": [[1, None]],
            "f": {"x": None, "y": [True]},
            "g": str(tmp_path),
        }
    ]


def test_values_that_are_not_data_are_a_bug(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    with pytest.raises(TypeError):
        writer.write(1, {"a": object()})
    assert (tmp_path / "m.jsonl").read_bytes() == b""  # nothing half-written
    writer.close()


def test_floats_read_back_bit_for_bit(tmp_path):
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for step, value in enumerate(values):
        writer.write(step, {"loss": value})
    writer.close()
    assert [row["loss"] for row in read_jsonl(tmp_path / "m.jsonl")] == values


def test_an_interrupted_and_resumed_run_writes_the_same_bytes(tmp_path):
    def run(folder, first, last, resume_step=None):
        with MetricsWriter(folder, resume_step=resume_step) as writer:
            for step in range(first, last + 1):
                writer.log(step, {"loss": 1 / step, "reward": step})
                if step % 4 == 0:
                    writer.log(step, {"eval/accuracy": step / 10})  # two lines of one step

    run(tmp_path / "whole", 1, 10)
    run(tmp_path / "cut", 1, 7)
    path = tmp_path / "cut" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # killed in the middle of step 7's line
    run(tmp_path / "cut", 5, 10, resume_step=4)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_partial_last_line_is_left_out_and_removed(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole[: 12 + cut])
    kept = [{"step": 1}, {"step": 2}] if cut == 11 else [{"step": 1}]  # all but the newline: the row is whole
    assert read_jsonl(path) == kept
    writer = JsonlWriter(path)
    writer.write(9, {})
    writer.close()
    assert read_jsonl(path) == [*kept, {"step": 9}]


def test_a_partial_multibyte_character_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "text": "é'.encode()[:-1])
    assert read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize("bad", [b"{oops", b"[1]", b"\xff"])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: not a JSON object"):
        read_jsonl(path)
    with pytest.raises(DataError, match=r"m\.jsonl:2: not a JSON object"):
        JsonlWriter(path, resume_step=1)
    assert path.read_bytes().count(b"\n") == 3  # not touched


def test_a_crash_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    old = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(old)

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        JsonlWriter(path, resume_step=1)
    assert path.read_bytes() == old


def test_a_killed_writer_leaves_at_most_one_partial_line(tmp_path):
    script = textwrap.dedent("""
        import sys
        from videor1.logs.jsonl import JsonlWriter
        writer = JsonlWriter(sys.argv[1])
        for step in range(10**9):
            writer.write(step, {"text": "x" * 5000})
            if step == 200:
                print("ready", flush=True)
    """)
    path = tmp_path / "m.jsonl"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 200
    assert path.read_bytes().count(b"\n") - len(rows) in (0, 1)


def test_short_writes_are_completed(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    real = writer._file

    class Slow:
        def write(self, data):
            return real.write(data[:3])

    writer._file = Slow()
    writer.write(1, {"loss": 0.25})
    real.close()
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.25}]


def test_tensorboard_gets_the_finite_numbers_and_forgets_later_steps_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, report_to=["tensorboard"], config=TrainConfig()) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"loss": step / 2, "kl": float("nan"), "text": "none", "time/step": torch.tensor(2.0)})
    with MetricsWriter(tmp_path, report_to=["tensorboard"], config=TrainConfig(), resume_step=1) as writer:
        writer.log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "time/step"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 20.0)]
    assert [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0.5, 20.0]


def fake_module(calls):
    """Return a module in place of wandb or trackio that records the calls made to it."""
    module = types.ModuleType("fake")

    def init(**kwargs):
        calls.append(("init", kwargs))
        return module

    module.init = init  # type: ignore[attr-defined]
    module.log = lambda values, step: calls.append(("log", step, values))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish",))  # type: ignore[attr-defined]
    return module


def test_wandb_keeps_its_run_on_resume_and_only_then(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake_module(calls))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for resume_step in (None, 1, None):
        with MetricsWriter(
            tmp_path, report_to=["wandb"], run_name="name", config=TrainConfig(), resume_step=resume_step
        ) as writer:
            writer.log(2, {"loss": 0.5, "kl": float("inf")})
    first, resumed, fresh = (call[1] for call in calls if call[0] == "init")
    assert first["id"] == resumed["id"] != fresh["id"]
    assert (first["project"], first["name"], first["resume"]) == ("mine", "name", "allow")
    assert first["config"]["temporal"]["rule"] == "margin"
    assert calls[1:3] == [("log", 2, {"loss": 0.5}), ("finish",)]


def test_trackio(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "trackio", fake_module(calls))
    folder = tmp_path / "my-run"
    for resume_step in (None, 1):
        with MetricsWriter(folder, report_to=["trackio"], resume_step=resume_step) as writer:
            writer.log(1, {"reward": 1})
    first, resumed = (call[1] for call in calls if call[0] == "init")
    assert (first["project"], first["name"]) == ("videor1", "my-run")
    assert (first["resume"], resumed["resume"]) == ("never", "allow")
    assert calls[1:3] == [("log", 1, {"reward": 1.0}), ("finish",)]


@pytest.mark.parametrize(
    ("tracker", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_tracker_names_its_extra(tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)  # import fails
    with pytest.raises(ConfigError, match=rf'report_to {tracker}: .*pip install -e "\.\[{tracker}\]"'):
        MetricsWriter(tmp_path, report_to=[tracker])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_every_choice_of_report_to_has_a_tracker():
    from typing import get_args, get_type_hints

    (choices,) = get_args(get_type_hints(TrainConfig)["report_to"])
    assert set(get_args(choices)) == set(trackers.TRACKERS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_prints_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(40, initial=20, description="T-GRPO", stream=stream, every=1e9) as progress:
        for step in range(21, 41):
            progress.update({"loss": step / 1000, "p": 0.5, "p~": None, "kl": float("nan"), "tokens/s": 1234.5})
    lines = stream.getvalue().splitlines()
    assert "step/s" in lines[-1] or "s/step" in lines[-1]
    assert not set("\r\x1b") & set(stream.getvalue())
    assert [line.split(" [")[0] for line in lines] == [f"T-GRPO: {step}/40" for step in (24, 28, 32, 36, 40)]
    assert "loss=0.024, p=0.5, p~=—, kl=—, tokens/s=1234" in lines[0]


def test_progress_prints_a_line_when_enough_time_has_passed():
    stream = io.StringIO()
    with Progress(1000, stream=stream, every=0.0) as progress:
        progress.update({})
        progress.update({})
    assert [line.split(" [")[0] for line in stream.getvalue().splitlines()] == ["1/1000", "2/1000"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_counts_in_its_unit(terminal):
    stream = Terminal() if terminal else io.StringIO()
    with Progress(2, unit="question", stream=stream) as progress:
        progress.update({}, steps=2)
    assert re.search(r"question/s|s/question", stream.getvalue())
    assert "step" not in stream.getvalue()


def test_progress_draws_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress(3, initial=1, description="SFT", stream=stream) as progress:
        progress.update({"loss": 0.5})
        progress.write("a sample was skipped")
        progress.update({"loss": 0.25})
    text = stream.getvalue()
    assert "\r" in text
    assert "3/3" in text
    assert "loss=0.25" in text
    assert "a sample was skipped\n" in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_progress_disabled_shows_nothing_but_messages(stream):
    with Progress(2, stream=stream, disabled=True, every=0.0) as progress:
        progress.update({"loss": 1.0}, steps=2)
        progress.write("message")
    assert stream.getvalue() == "message\n"


def test_summary_table():
    rows = [("", "ordered", "shuffled"), ("before", 0.61, 0.25), ("after", 0.9333, float("nan")), ("steps", 120, None)]
    assert summary_table(rows) == textwrap.dedent("""\
                ordered  shuffled
        ------  -------  --------
        before    0.610     0.250
        after     0.933         —
        steps       120         —""")


def test_summary_table_needs_equal_rows():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        summary_table([("a", "b"), ("c",)])


def test_metrics_file_is_strict_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"grad_norm": float("inf"), "loss": float("nan")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
