"""The training loop that SFT and T-GRPO share: optimizer steps, metrics, checkpoints, exact resume, signals.

Every random number is derived from (seed, name, position), never from a running global generator. The state of a run is
therefore its weights, its optimizer state, its step and its position in the data; a trainer may add what it averages
over steps.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from videor1.config import EvalOptions
from videor1.config.cli import changed_options, load_run_config, resume_command, save_run_config
from videor1.data import Dataset, load_samples
from videor1.data.source import Source
from videor1.data.stream import RowStream, open_dataset
from videor1.errors import ConfigError, TrainingStopped
from videor1.evaluation.evaluator import Evaluator, merge_evaluations
from videor1.logs.jsonl import JsonlWriter
from videor1.logs.lock import FolderLock
from videor1.logs.progress import Progress
from videor1.logs.trackers import MetricsWriter
from videor1.model import VideoLM, load_model
from videor1.model.lm import set_checkpointing
from videor1.model.load import pick_device
from videor1.model.positions import PositionRule
from videor1.model.save import base_digest, sampled_digest
from videor1.rewards.slow import SlowCounts, SlowRewards
from videor1.seeding import derive_seed
from videor1.training.checkpoint import (
    CheckpointError,
    checkpoints,
    delete_old,
    find_resume,
    followed_checkpoint,
    read_trainer,
    resumed_rule,
    save,
)
from videor1.training.distributed import make_ranks
from videor1.training.distributed.ranks import start_position
from videor1.training.journal import Journal, mean_rows, sum_counts
from videor1.training.optim import learning_rate, make_optimizer
from videor1.training.passes import dummy_loss, dummy_tower_loss
from videor1.types import PromptMedia, Sample, SampleError

C = TypeVar("C", bound=EvalOptions)
T = TypeVar("T")
# From the options and the free bytes of a GPU: (how many layers recompute, None for all; a sentence that says why).
ChooseLayers = Callable[[C, int], tuple[int | None, str]]

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# What a resumed run must share with its checkpoint, by the names that messages show.
_MODEL = "model_name_or_path (digest of its weights)"
_DATA = "dataset_name (digest of its samples)"
_EVAL_DATA = "data.eval_path (digest of its samples)"


def free_memory(device: torch.device) -> int | None:
    """The free bytes of a GPU; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Loop(ABC, Generic[C]):
    """One training run; a subclass defines what a batch is and how it updates the model.

    Args:
        config: the options.
        choose_layers: chooses how many layers recompute on a GPU where ``checkpoint_layers`` leaves it open; None: all.

    Attributes:
        step: optimizer steps done, skipped ones included.
        source, metrics, progress, journal: created by :meth:`train`, which also closes them.
    """

    name: str  # the command's name
    calls_functions = False  # whether it calls the functions of ``reward.functions``
    total_steps: int
    source: Source[Any]
    metrics: MetricsWriter
    progress: Progress
    journal: Journal
    _exit_stack: ExitStack
    _resume_step: int | None
    _saved_at: int
    _batch_start: int
    _prune_after_step: bool  # whether checkpoints were kept that the next finite step makes superfluous
    _evaluator: Evaluator | None

    def __init__(self, config: C, choose_layers: ChooseLayers[C] | None = None) -> None:
        if config.eval_steps and not config.data.eval_path:
            raise ConfigError("eval_steps: needs data.eval_path, the held-out data file")
        self.config = config
        self.ranks = make_ranks(config)
        default = f"runs/{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir = Path(self.ranks.broadcast(config.output_dir or default))
        # The main process writes the run's files; every other rank writes into a folder of its own.
        self.folder = self.run_dir if self.ranks.is_main else self.run_dir / f"rank-{self.ranks.rank}"
        # Opened before anything large is loaded, so that a wrong option of the judge fails at once.
        self.slow = SlowRewards(config.reward, self.run_dir / "judge_cache", functions=self.calls_functions)
        self.dataset = self._load_dataset(config.dataset_name)
        self.samples_per_epoch = self.dataset.count() if config.max_steps < 0 else None
        if config.max_steps < 0 and self.samples_per_epoch is None:
            raise ConfigError(
                f"max_steps: needed, since num_train_epochs counts rows, and those of {config.dataset_name} are not "
                "known without reading all of it"
            )
        self.eval_set = self._load_held_out()
        self._notes: list[str] = []  # what is printed once the run is open
        self._lock: FolderLock | None = None  # the main process's, for all ranks
        self.resume_from = self.ranks.on_main(self._resume_point)
        try:
            self.folder.mkdir(exist_ok=True)
            if self.resume_from is not None:
                self._set_position_rule(resumed_rule(self.resume_from, config.model.positions))
            layers = self._recomputing(choose_layers)
            self.model: VideoLM = self.make_model()
            if layers is not None:
                set_checkpointing(self.model.hf, True, layers)
        except BaseException:
            self._leave_folder()
            raise
        self._set_position_rule(self.model.position_rule)  # so that config.yaml names the rule in effect
        self.fixed = self._fixed()
        self.optimizer = make_optimizer(self.model.trainable(), config)
        self.step = 0
        self._stop: str | None = None

    def _recomputing(self, choose_layers: ChooseLayers[C] | None) -> int | None:
        """How many layers recompute where checkpoint_layers leaves it open, alike on all ranks; None: as it says.

        The results do not depend on it, so a resumed run chooses anew.
        """
        config = self.config
        if choose_layers is None or not config.gradient_checkpointing or config.checkpoint_layers is not None:
            return None
        free = [size for size in self.ranks.gather(free_memory(pick_device(config.device))) if size is not None]
        if not free:
            return None
        layers, why = self.ranks.on_main(lambda: choose_layers(config, min(free)))
        self._notes.append(why)
        return layers

    def _leave_folder(self) -> None:
        """Give the run's folder back, and remove it where nothing is in it."""
        if self._lock is not None:
            self._lock.release()
        with suppress(OSError):  # A folder that is not empty was there before this run.
            self.folder.rmdir()

    def _set_position_rule(self, rule: PositionRule) -> None:
        self.config = dataclasses.replace(self.config, model=dataclasses.replace(self.config.model, positions=rule))

    def make_model(self) -> VideoLM:
        """Load the model to train, as the options ask for it."""
        return load_model(self.config)

    @abstractmethod
    def make_source(self, start: Any) -> Source[Any]:
        """Return the source of training records, beginning at ``start``: an earlier ``Source.state``, or 0."""

    def source_of(self, build: Callable[[Sample, PromptMedia, int], T], start: Any) -> Source[T]:
        """Return the source of what ``build`` makes of this rank's samples, as the run asks them, and their media."""
        return Source(
            self.dataset,
            self.config,
            lambda sample, media, draw: build(self.model.asked(sample), media, draw),
            on_skip=self._on_skip,
            start=start,
            shard=self.shard,
            rules=self.model.family.frames,
        )

    @abstractmethod
    def train_batch(self) -> None:
        """Take a batch from the source and make one or more :meth:`optimizer_step` calls."""

    @abstractmethod
    def samples_per_step(self) -> float:
        """Return how many samples of the data set one optimizer step consumes."""

    def own_state(self) -> dict[str, Any]:
        """Return what a subclass keeps in a checkpoint beside the loop's state, as JSON values, alike on all ranks."""
        return {}

    def restore_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over the :meth:`own_state` in a checkpoint's state; {} in a new run."""

    def progress_values(self, row: dict[str, Any]) -> dict[str, float | None]:
        """Return the metrics of a step that the progress bar shows, by label."""
        return {"loss": row["loss"], "tokens/s": row.get("time/tokens_per_second")}

    @property
    def accuracy(self) -> float:
        """Accuracy of the latest evaluation; NaN before the first."""
        return self.journal.accuracy

    def title(self) -> str:
        """Return the text in front of the progress bar."""
        return self.name

    def finished(self) -> bool:
        """Return whether the run ends now, before its last step; a subclass may override this."""
        return False

    def _load_dataset(self, path: str | None) -> Dataset | RowStream:
        if not path:
            raise ConfigError("dataset_name: expected a data file in the Video-R1 JSON format, got nothing")
        return open_dataset(path, self.config.data, reward=self.config.reward)

    def _load_held_out(self) -> Dataset | None:
        data = self.config.data
        if not data.eval_path:
            return None
        return load_samples(
            data.eval_path,
            root=data.root,
            reward=self.config.reward,
            format=data.format,
            problem_type=data.problem_type,
        )

    def train(self) -> Path:
        """Train to the last step.

        Returns:
            The folder of the last checkpoint.

        Raises:
            KeyboardInterrupt: a signal stopped the run after a checkpoint was saved; the message says how to resume.
            TrainingStopped: the run cannot go on.
        """
        with self._disk_errors(), self._open():
            while self.step < self.total_steps and not self._stopping() and not self.finished():
                self.journal.start_batch()
                self.train_batch()
                if self._due(self.config.eval_steps):
                    self._evaluate()
                if self._due(self.config.save_steps):
                    self._save(required=False)
                self._batch_start = self.step
            if not self._stop:
                self._log_steps()
                self._evaluate()
                if self.step < self.total_steps:
                    self.progress.write(f"{self.title()}: reached at step {self.step}, {self.accuracy:.3f}")
            final = self._save(required=True)
        if self._stop:
            launcher = "python" if self.ranks.world == 1 else f"torchrun --nproc_per_node {self.ranks.world} ..."
            raise KeyboardInterrupt(f"saved {final}; go on with: {resume_command(self.name, self.run_dir, launcher)}")
        return final

    def _stopping(self) -> bool:
        """Return whether a signal has reached any rank, so that all ranks stop after the same batch."""
        self._stop = next(filter(None, self.ranks.gather(self._stop)), None)
        return bool(self._stop)

    def optimizer_step(
        self,
        losses: Sequence[Callable[[], Tensor]],
        metrics: Callable[[], dict[str, Any]],
        *,
        dummy_loss: Callable[[], Tensor],
    ) -> None:
        """Update the model once, from the losses of the packed rows.

        If the loss or a gradient is NaN or Inf, the step changes no weight: it is skipped and counted, and the run
        stops after ``max_nonfinite_steps`` such steps in a row.

        Args:
            losses: compute the losses of this rank's rows; their sum over all ranks is the loss of the step.
            metrics: called after the last row; returns the step's metrics. Their ``num_tokens`` are the step's and are
                summed over the run.
            dummy_loss: a loss of 0 that depends on every trained parameter, for ranks with fewer rows than others.

        Raises:
            TrainingStopped: after ``max_nonfinite_steps`` steps in a row that were not finite.
        """
        started = time.perf_counter()
        torch.manual_seed(derive_seed(self.config.seed, "dropout", self.step))
        rate = learning_rate(self.step, self.total_steps, self.config)
        update = self.ranks.update(losses, dummy_loss, self.model.trainable(), rate)
        self.step += 1
        row: dict[str, Any] = {"loss": update.loss, "grad_norm": update.grad_norm, "learning_rate": rate}
        row |= metrics() if math.isfinite(update.loss) else {}
        self.journal.counters["num_tokens"] += row.pop("num_tokens", 0)
        row["epoch"] = self.source.epoch
        row |= {**sum_counts(self.ranks.gather(self.journal.data_counts())), **self.journal.counters}
        row |= {"time/update": time.perf_counter() - started, **self.journal.data_times()}
        self._count_nonfinite(update.finite, row)
        self._report(row)

    def dummy_loss(self) -> Tensor:
        """Return the loss of a pass without a row, see ``passes.dummy_loss``."""
        return dummy_loss(self.model, self.config.kernels)

    def dummy_tower_loss(self) -> Tensor:
        """Return a loss of 0 that runs the vision tower, which a row without media adds to its own loss.

        Ranks wait for each other inside a trained tower, so that the pass of each must run it. Alone it is a plain 0.
        """
        return dummy_tower_loss(self.model) if self.ranks.world > 1 else torch.zeros((), device=self.model.device)

    def _count_nonfinite(self, finite: bool, row: dict[str, Any]) -> None:
        consecutive = self.journal.count_nonfinite(self.step, finite, row)
        if consecutive >= self.config.max_nonfinite_steps:
            self._report(row, last=True)
            raise TrainingStopped(
                f"{consecutive} steps in a row without a finite loss and gradient; {self._describe_good_checkpoint()}. "
                f"Lower learning_rate, or look at the last lines of {self.run_dir / 'rollouts.jsonl'}"
            )
        if finite and self._prune_after_step and self.ranks.is_main:
            # The step shows that the newest checkpoint leads somewhere, so that older ones are no longer needed.
            delete_old(self.run_dir, self.step, self.config.save_total_limit, finite_step=self.step)
        self._prune_after_step = self._prune_after_step and not finite

    def _describe_good_checkpoint(self) -> str:
        """Return a clause for the message about non-finite steps that names where to go on from."""
        existing = checkpoints(self.run_dir)
        good = followed_checkpoint(self.run_dir, self.journal.finite_step(self.step))
        if not existing:
            return "nothing was saved since they began, and there is no checkpoint yet"
        newest = existing[-1][1]
        if good == newest:
            return f"nothing was saved since they began, and the newest checkpoint is {newest}"
        older = f"the newest before it is {good}" if good else "there is no older one"
        return (
            f"nothing was saved since they began; no step after the newest checkpoint, {newest}, was finite, so that "
            f"its weights may be what is wrong; {older}"
        )

    def _report(self, row: dict[str, Any], *, last: bool = False) -> None:
        self.journal.rows.append(row)
        if last or self.step % self.config.logging_steps == 0 or self.step >= self.total_steps:
            self._log_steps()
        self.progress.update(self.progress_values(row))

    def _log_steps(self) -> None:
        """Write one line of metrics: the mean over the steps since the last line."""
        if self.journal.rows:
            self.metrics.log(self.step, mean_rows(self.journal.rows))
            self.journal.rows.clear()
            self._saved_at = -1  # A checkpoint saved earlier at this step still holds these metrics as unwritten.

    def _evaluate(self) -> None:
        """Measure and log the held-out accuracy of the current weights, at most once per step."""
        if self._evaluator is None or self.journal.evaluated_at == self.step:
            return
        started = time.perf_counter()
        with self.ranks.gathered_parameters():
            own = self._evaluator.run(self.model)
        result = merge_evaluations(self.ranks.gather(own))
        self.journal.accuracy, self.journal.evaluated_at = result.ordered, self.step
        times = {"time/eval": time.perf_counter() - started} | self._evaluation_calls()
        self.metrics.log(self.step, result.metrics() | times)
        self._saved_at = -1

    def _evaluation_calls(self) -> dict[str, int]:
        """Return how often the evaluation asked the judge, so that the next step does not count it; {} without one."""
        if not self.slow.some:
            return {}
        counts = sum(self.ranks.gather(self.slow.take_counts()), SlowCounts())
        return {"time/reward_calls": counts.calls, "time/reward_cache_hits": counts.cache_hits}

    def _on_skip(self, draw: int, error: SampleError) -> None:
        self.journal.skip(self.step + 1, error, draw)

    def _on_eval_skip(self, error: SampleError) -> None:
        self.journal.skip_in_evaluation(self.step, error)

    def _due(self, every: int) -> bool:
        """Return whether this batch reached a multiple of ``every`` steps before the run's last step.

        A batch may hold several steps.
        """
        return bool(every) and self.step // every > self._batch_start // every and self.step < self.total_steps

    def _save(self, *, required: bool) -> Path:
        """Write a checkpoint, unless this step has one.

        Args:
            required: whether a failure stops the run. If not, it is reported and counted, and training goes on; and
                nothing is saved after a step that was not finite.

        Returns:
            The checkpoint's folder, or the run's where writing failed.
        """
        existing = dict(checkpoints(self.run_dir))
        if self.ranks.broadcast(self._saved_at == self.step and self.step in existing):
            return existing[self.step]
        finite_step = self.journal.finite_step(self.step)
        if not required and finite_step != self.step:
            self.progress.write(f"step {self.step}: no checkpoint, since the step was not finite")
            return self.run_dir
        optimizer = None if self.config.save_only_model else self.optimizer
        try:
            keep = self.config.save_total_limit
            path = save(
                self.run_dir,
                self.step,
                self.model,
                optimizer,
                self._state(),
                keep=keep,
                finite_step=finite_step,
                ranks=self.ranks,
            )
        except CheckpointError as error:
            if required:
                raise TrainingStopped(f"{error}; {self.describe_last_checkpoint()}") from error
            self.journal.counters["failed_checkpoints"] += 1
            self.progress.write(f"{error}; training goes on")
            return self.run_dir
        self._saved_at = self.step
        self._prune_after_step = True
        return path

    def _state(self) -> dict[str, Any]:
        positions = self.ranks.gather(self.source.state)
        return {
            "position": positions[0] if len(positions) == 1 else positions,
            **self.journal.state(),
            **self.own_state(),
            "fixed": self.fixed,
        }

    def _fixed(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run that wrote the checkpoint."""
        config = self.config
        lora = dataclasses.asdict(config.lora) if config.lora.rank else None
        options = {"lora": lora, "freeze_vision": config.freeze_vision, "bf16": self.model.bf16}
        data = {_DATA: self.dataset.digest()} if isinstance(self.dataset, Dataset) else {}  # A stream has its own.
        data |= {_EVAL_DATA: self.eval_set.digest()} if self.eval_set is not None else {}
        return {_MODEL: base_digest(self.model)} | options | data

    def _resume_point(self) -> Path | None:
        """Take the run's folder for this run, and return the checkpoint to resume from, if there is one."""
        if self.config.resume == "auto" and not self.config.output_dir:
            raise ConfigError("resume: auto needs output_dir, the folder of the run to go on with")
        self._lock = FolderLock(self.run_dir, f"videor1.{self.name}")
        try:
            self._lock.acquire()
            if not self.config.resume:
                check_unused(self.run_dir)
            return find_resume(self.config.resume, self.run_dir, self._notes.append) if self.config.resume else None
        except BaseException:
            self._leave_folder()
            raise

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Restore the checkpoint to resume from, and keep the run's files and workers open; close them in order."""
        with ExitStack() as stack:
            self._exit_stack = stack
            if self._lock is not None:
                self._lock.acquire()  # It is held already, unless an earlier call has given it back.
                stack.callback(self._lock.release)
            stack.callback(self.slow.close)
            state = self._restore()
            stack.push(lambda kind, *_: self.ranks.close(failed=kind is not None))
            config_file = self.folder / "config.yaml"
            resumed = self.resume_from is not None and config_file.exists()
            changed = changed_options(load_run_config(type(self.config), config_file), self.config) if resumed else []
            save_run_config(self.config, self.folder, self.run_dir)
            self.metrics = stack.enter_context(
                MetricsWriter(
                    self.folder,
                    report_to=self.config.report_to if self.ranks.is_main else [],
                    run_name=self.config.run_name,
                    config=self.config,
                    resume_step=self._resume_step,
                )
            )
            skips = self.open_jsonl("skipped.jsonl")
            self.progress = stack.enter_context(
                Progress(
                    self.total_steps,
                    initial=self.step,
                    description=self.title(),
                    disabled=self.config.disable_tqdm or not self.ranks.is_main,
                    silent=not self.ranks.is_main,
                )
            )
            self.journal = Journal(state, skips, self.progress, left_out=self.dataset.error_counts())
            if self.resume_from is not None:
                self.progress.write(f"resumed from {self.resume_from} at step {self.step}")
                # A changed option is allowed (for a longer run, say), but the result differs from an uninterrupted run.
                for change in changed:
                    self.progress.write(f"changed since the run began: {change}")
            for note in self._notes:
                self.progress.write(note)
            self._notes.clear()
            self.restore_own_state(state)
            if isinstance(self.dataset, RowStream) and self.dataset.large_blocks:
                self.progress.write(self.dataset.large_blocks)
            if not skips.path.stat().st_size:
                self.journal.report_bad_entries(self.dataset, self.eval_set)
            self._evaluator = None
            if self.eval_set is not None:
                evaluator = Evaluator(
                    self.eval_set,
                    self.config,
                    on_skip=self._on_eval_skip,
                    shard=self.shard,
                    rules=self.model.family.frames,
                    slow=self.slow,
                )
                self._evaluator = stack.enter_context(evaluator)
            self.source = self.make_source(start_position(state.get("position", 0), self.shard))
            self.source.on_report = self.progress.write
            if self.source.note:
                self.progress.write(self.source.note)
            self.journal.attach(self.source)
            stack.callback(self.source.close)
            stack.callback(self.journal.report_data_problems)
            stack.enter_context(self._handle_signals())
            yield

    def _restore(self) -> dict[str, Any]:
        """Restore weights, optimizer and step from the checkpoint to resume from, and return its state; {} without."""
        state: dict[str, Any] = {}
        if self.resume_from is not None:
            changed_ok = "" if self.config.data.changed_ok else "--data.changed_ok true"
            state, tensors = read_trainer(
                self.resume_from,
                self.model,
                self.fixed,
                earlier={_MODEL: lambda: sampled_digest(self.model)},
                free={_DATA: changed_ok, _EVAL_DATA: changed_ok},
                report=self._notes.append,
            )
            self.step = state["step"]
        self.ranks.prepare(self.model.hf, self.optimizer, self.config.max_grad_norm)
        if self.resume_from is not None:
            self.ranks.load_trainer_tensors(self.model.trainable(), tensors)
        self._saved_at = self._batch_start = self.step
        self._prune_after_step = False
        self.total_steps = self.config.max_steps
        if self.samples_per_epoch is not None:
            epochs = self.config.num_train_epochs * self.samples_per_epoch / self.samples_per_step()
            self.total_steps = math.ceil(epochs)
        # --resume auto without a checkpoint starts anew: the lines of the earlier attempt are deleted, step 0 included.
        self._resume_step = None if not self.config.resume else self.step if self.resume_from else -1
        return state

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, number of ranks), which decides which draws are this process's."""
        return self.ranks.rank, self.ranks.world

    def on_close(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called when the run ends, whether it succeeds or fails."""
        self._exit_stack.callback(callback)

    def open_jsonl(self, name: str) -> JsonlWriter:
        """Open a JSONL file of the run folder for appending; lines after the resumed step are deleted."""
        lines = JsonlWriter(self.folder / name, resume_step=self._resume_step)
        self.on_close(lines.close)
        return lines

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn a full or failing disk into one message.

        It may be met outside of a checkpoint, by a line of metrics.jsonl for instance.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise TrainingStopped(
                f"{self.run_dir} cannot be written to: {error}; {self.describe_last_checkpoint()}"
            ) from error

    def describe_last_checkpoint(self) -> str:
        """Return a clause for error messages that names the last complete checkpoint."""
        existing = checkpoints(self.run_dir)
        return f"the last whole checkpoint is {existing[-1][1]}" if existing else "there is no checkpoint yet"

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM: end the run after this batch, with a checkpoint; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: object) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name
            self.progress.write(f"{self._stop}: saving after this batch; again to stop at once")

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def holds_run(folder: Path) -> bool:
    """Return whether ``folder`` holds a run's metrics.

    A run that failed before its first step leaves an empty file: the corrected command may use the folder again.
    """
    path = folder / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def check_unused(folder: Path) -> None:
    """Check that ``folder`` does not hold another run.

    Raises:
        ConfigError: it does.
    """
    if holds_run(folder):
        raise ConfigError(
            f"output_dir: {folder} holds a run already; go on with it by --resume auto, or name another folder"
        )
