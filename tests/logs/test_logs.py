"""Run folder writers: what survives a kill, what a resumed run drops, trackers, progress, the summary table."""

import io
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from videor1.config import TrainConfig
from videor1.errors import ConfigError, DataError
from videor1.logs import trackers
from videor1.logs.jsonl import JsonlWriter, read_jsonl
from videor1.logs.progress import Progress, summary_table
from videor1.logs.trackers import MetricsWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def make(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)


def test_a_line_is_json_with_step_first_and_sorted_keys(path: Path) -> None:
    writer = JsonlWriter(path)
    writer.write(1, {"reward": 0.5, "loss": float("nan"), "kl": float("inf"), "temporal/p": 1, "note": "é\n"})
    text = path.read_text("utf-8")  # before close: every line is flushed
    assert text == '{"step": 1, "kl": null, "loss": null, "note": "é\\n", "reward": 0.5, "temporal/p": 1}\n'
    with pytest.raises(TypeError):
        writer.write(1, {"a": object()})
    assert path.read_text("utf-8") == text  # nothing half-written
    writer.close()


def test_tensors_arrays_and_nested_values(path: Path) -> None:
    values = {
        "a": (torch.tensor(1.5, requires_grad=True), 1.5),
        "b": (torch.tensor([1.0, float("nan")]), [1.0, None]),
        "c": (np.float32(0.5), 0.5),
        "d": (np.int64(7), 7),
        "e": ([(1, float("-inf"))], [[1, None]]),
        "f": ({"x": None, "y": [True]}, {"x": None, "y": [True]}),
        "g": (path, str(path)),
    }
    floats = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values["h"] = (floats, floats.tolist())  # bit for bit
    with MetricsWriter(path.parent) as writer:
        writer.log(3, {key: value for key, (value, _) in values.items()})
    assert read_jsonl(path) == [{"step": 3} | {key: read for key, (_, read) in values.items()}]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)


def test_an_interrupted_and_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    def run(folder: Path, first: int, last: int, resume_step: int | None = None) -> None:
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
def test_a_partial_last_line_is_left_out_and_removed(path: Path, cut: int) -> None:
    make(path, b'{"step": 1}\n{"step": 2}\n'[: 12 + cut])
    kept = [{"step": 1}, {"step": 2}] if cut == 11 else [{"step": 1}]  # all but the newline: the row is whole
    assert read_jsonl(path) == kept
    writer = JsonlWriter(path)
    writer.write(9, {})
    writer.close()
    assert read_jsonl(path) == [*kept, {"step": 9}]
    path.write_bytes('{"step": 1}\n{"step": 2, "text": "é'.encode()[:-1])  # in the middle of a character
    assert read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize("bad", [b"{oops", b"[1]", b"\xff"])
def test_a_broken_line_in_the_middle_is_an_error(path: Path, bad: bytes) -> None:
    make(path, b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    for read in (read_jsonl, lambda path: JsonlWriter(path, resume_step=1)):
        with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
            read(path)
    assert path.read_bytes().count(b"\n") == 3  # not touched


def test_a_crash_while_truncating_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = b'{"step": 1}\n{"step": 2}\n'
    make(path, old)

    def crash(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        JsonlWriter(path, resume_step=1)
    assert path.read_bytes() == old


def test_a_killed_writer_leaves_at_most_one_partial_line(path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from videor1.logs.jsonl import JsonlWriter
        writer = JsonlWriter(sys.argv[1])
        for step in range(10**9):
            writer.write(step, {"text": "x" * 5000})
            if step == 200:
                print("ready", flush=True)
    """)
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 200
    assert path.read_bytes().count(b"\n") - len(rows) in (0, 1)


def test_short_writes_are_completed(path: Path) -> None:
    writer = JsonlWriter(path)
    real = writer._file
    writer._file = types.SimpleNamespace(write=lambda data: real.write(data[:3]))  # type: ignore[assignment]
    writer.write(1, {"loss": 0.25})
    real.close()
    assert read_jsonl(path) == [{"step": 1, "loss": 0.25}]


def test_tensorboard_gets_the_finite_numbers_and_forgets_later_steps_on_resume(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_service_keeps_its_run_on_resume_and_only_then(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    module: Any = types.ModuleType(tracker)
    module.init = lambda **options: calls.append(options) or module
    module.log = lambda values, step: calls.append((step, values))
    module.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, tracker, module)
    if tracker == "wandb":
        monkeypatch.setenv("WANDB_PROJECT", "mine")
    name = "name" if tracker == "wandb" else None
    options: dict[str, Any] = {"report_to": [tracker], "run_name": name, "config": TrainConfig()}
    (tmp_path / "my-run").mkdir()
    for resume_step in (None, 1, None):
        with MetricsWriter(tmp_path / "my-run", resume_step=resume_step, **options) as writer:
            writer.log(2, {"loss": 0.5, "kl": float("inf")})
    assert calls[1:3] == [(2, {"loss": 0.5}), "finish"]
    first, resumed, fresh = calls[::3]
    assert first["config"]["temporal"]["rule"] == "margin"
    if tracker == "wandb":
        assert first["id"] == resumed["id"] != fresh["id"]
        assert (first["project"], first["name"], first["resume"]) == ("mine", "name", "allow")
    else:
        assert (first["project"], first["name"]) == ("videor1", "my-run")
        assert [call["resume"] for call in (first, resumed, fresh)] == ["never", "allow", "never"]


@pytest.mark.parametrize(
    ("tracker", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_tracker_names_its_extra(
    path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # import fails
    with pytest.raises(ConfigError, match=rf'report_to {tracker}: .*pip install -e "\.\[{tracker}\]"'):
        MetricsWriter(path.parent, report_to=[tracker])
    assert not path.exists()


def test_every_choice_of_report_to_has_a_tracker() -> None:
    (choices,) = get_args(get_type_hints(TrainConfig)["report_to"])
    assert set(get_args(choices)) == set(trackers.TRACKERS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> list[str]:
    """The plain lines up to the clock's part."""
    return [line.split(" [")[0] for line in stream.getvalue().splitlines()]


def test_progress_prints_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(40, initial=20, description="T-GRPO", stream=stream, every=1e9) as progress:
        for step in range(21, 41):
            progress.update({"loss": step / 1000, "p": 0.5, "p~": None, "kl": float("nan"), "tokens/s": 1234.5})
    first, *_, last = stream.getvalue().splitlines()
    assert shown(stream) == [f"T-GRPO: {step}/40" for step in (24, 28, 32, 36, 40)]
    assert "loss=0.024, p=0.5, p~=—, kl=—, tokens/s=1234" in first
    assert "step/s" in last or "s/step" in last
    assert not set("\r\x1b") & set(stream.getvalue())
    often = io.StringIO()
    with Progress(1000, stream=often, every=0.0) as progress:  # enough time has passed
        progress.update({})
        progress.update({})
    assert shown(often) == ["1/1000", "2/1000"]


def test_progress_draws_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(3, initial=1, description="SFT", stream=stream) as progress:
        progress.update({"loss": 0.5})
        progress.write("a sample was skipped")
        progress.update({"loss": 0.25})
    for text in ("\r", "3/3", "loss=0.25", "a sample was skipped\n"):
        assert text in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_counts_in_its_unit_and_shows_only_messages_where_it_is_disabled(stream: type[io.StringIO]) -> None:
    with Progress(2, unit="question", stream=(counted := stream())) as progress:
        progress.update({}, steps=2)
    assert re.search(r"question/s|s/question", counted.getvalue())
    assert "step" not in counted.getvalue()
    with Progress(2, stream=(disabled := stream()), disabled=True, every=0.0) as progress:
        progress.update({"loss": 1.0}, steps=2)
        progress.write("message")
    assert disabled.getvalue() == "message\n"


def test_summary_table() -> None:
    rows = [("", "ordered", "shuffled"), ("before", 0.61, 0.25), ("after", 0.9333, float("nan")), ("steps", 120, None)]
    assert summary_table(rows) == textwrap.dedent("""\
                ordered  shuffled
        ------  -------  --------
        before    0.610     0.250
        after     0.933         —
        steps       120         —""")
    with pytest.raises(ValueError, match=r"shorter|longer"):
        summary_table([("a", "b"), ("c",)])
