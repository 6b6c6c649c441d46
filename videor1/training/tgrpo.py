"""T-GRPO: sample completions from ordered and from shuffled frames, reward them, and update on the ordered ones.

The reward has a bonus where ordered frames led to more right answers than shuffled ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.data.source import Source
from videor1.errors import ConfigError, TrainingStopped
from videor1.logs.jsonl import JsonlWriter
from videor1.model.features import prompt_features, shuffled_features
from videor1.model.prompts import build_input_ids
from videor1.rewards.advantages import Scored, divided, score_groups
from videor1.rewards.deviation import TaskDeviations, deviation
from videor1.rewards.judge import Starter, TemporalJudge
from videor1.rewards.slow import GroupScores, RewardFailed
from videor1.rollout import Branch, LocalEngine, Request, Rollout, RolloutEngine, RolloutError, make_engine
from videor1.rollout.local.operations import Operations
from videor1.side_by_side import side_by_side
from videor1.training.batch import REFILLS, Batch, refill
from videor1.training.loop import ChooseLayers, Loop
from videor1.training.mismatch import WeightBounds
from videor1.training.offline import offline_completions
from videor1.training.passes import completion_logp, tgrpo_loss
from videor1.training.rollout_log import rollout_rows
from videor1.training.rows import TrainingRow, batch_totals, counting, sum_totals, training_rows
from videor1.training.step_metrics import SLOW, make_step_report, step_metrics
from videor1.types import Group, Prompt, PromptMedia, Sample, SampleError
from videor1.video.shuffle import draw_permutation
from videor1_kernels import GrpoLoss, chosen_backend
from videor1_kernels.integrations.transformers import LINEAR_KERNELS, linear_backend

KERNELS = (
    "prefix_attention",
    "prefix_decode_attention",
    "add_rms_norm",
    "rotary_append",
    "silu_mul",
    "sample_tokens",
    "linear_logprob",
    "linear_grpo_loss",
    "tgrpo_advantages",
)

# Steps in a row without any nonzero advantage after which the user is told.
NO_SIGNAL_STEPS = 5
# Batches in a row in which all rewards that take time failed, after which the run ends.
FAILED_BATCHES = 3


class Trainer(Loop[TrainConfig]):
    """The T-GRPO trainer; ``Trainer(config).train()`` runs it.

    choose_layers: as :class:`~videor1.training.loop.Loop` takes it, :func:`videor1.plan.layers.choose_layers` for one.
    """

    name = "train"
    calls_functions = True

    def __init__(self, config: TrainConfig, choose_layers: ChooseLayers[TrainConfig] | None = None) -> None:
        if config.rollout.engine == "server" and config.distributed.engine != "none":
            raise ConfigError("rollout.engine: server: not with distributed.engine deepspeed (ranks answer themselves)")
        super().__init__(config, choose_layers)
        needs_copy = config.beta > 0 and not config.lora.rank
        # The reference model is copied before a resume changes the weights.
        self.frozen = self.model.frozen_copy() if needs_copy else None
        self.engine: RolloutEngine = make_engine(
            config, self.model, self.run_dir, self.ranks.gathered if self.ranks.partitioned else None
        )
        self.deviations = TaskDeviations(config.advantage_decay)  # with normalize ema_task
        self.rollouts: JsonlWriter | None = None  # while the run is open
        self.weights_are_new = True  # whether the engine has yet to be told of the current weights
        self._said = ""  # about the engine's weights
        self.steps_without_signal = 0  # steps in a row in which every advantage was 0
        self.batches_without_rewards = 0  # batches in a row in which all rewards that take time failed
        self._failure: RewardFailed | None = None  # the last such reward that failed

    def samples_per_step(self) -> float:
        config = self.config
        return config.per_device_train_batch_size * config.gradient_accumulation_steps / config.num_iterations

    def make_source(self, start: int) -> Source[Prompt]:
        longest = self.config.max_prompt_length
        if self.config.max_tokens_per_row is not None:
            longest = min(longest, self.config.max_tokens_per_row - self.config.max_completion_length)

        def build(sample: Sample, media: PromptMedia, draw: int) -> Prompt:
            ids = build_input_ids(
                self.model.tokenizer, sample, media, max_prompt_length=longest, family=self.model.family
            )
            return Prompt(sample, ids, media, draw, *offline_completions(self.model, sample, self.config))

        return self.source_of(build, start)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with contextlib.closing(self.engine), super()._open():
            if self.model.device.type != "cpu":
                self.progress.write(self._kernels())
            self.rollouts = self.open_jsonl("rollouts.jsonl")
            yield

    def own_state(self) -> dict[str, Any]:
        moments = self.deviations.state()
        return {"reward_moments": moments} if moments else {}

    def restore_own_state(self, state: Mapping[str, Any]) -> None:
        self.deviations = TaskDeviations(self.config.advantage_decay, state.get("reward_moments"))

    def train_batch(self) -> None:
        """Sample and score one batch, then make its ``num_iterations`` updates."""
        config, timer = self.config, _PhaseTimer()
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        with self._rollout_weights():
            batch = self._sample_batch(size, timer)
            if config.dynamic_sampling:
                more = functools.partial(self._sample_batch, timer=timer)
                batch = refill(batch, size, config.dynamic_sampling, more)
        self._check_rewards(batch)
        batch = self._divided(batch)
        groups, features, scored = batch.groups, batch.features, batch.scored
        assert self.rollouts is not None, "the run is open"
        self._say_decode_weights()
        for row in rollout_rows(groups, scored, self.model, log_tokens=config.log_tokens):
            self.rollouts.write(self.step + 1, row)
        timer.mark("time/reward")

        totals = sum_totals(self.ranks.gather(batch_totals(scored.lengths, config, counting(groups, config))))
        rows, left_out = training_rows(self.model, groups, scored, config, totals)
        self._check_sampled(groups)
        row_features = [self._frozen_features([features[i] for i in row.groups]) for row in rows]
        ref_logps = self._reference_logps(rows, row_features)
        timer.mark("time/reference")

        old_logps: list[Tensor | None] = [None] * len(rows)
        for _ in range(min(config.num_iterations, self.total_steps - self.step)):
            results: dict[int, GrpoLoss] = {}
            losses = self._losses(rows, scored, totals.tokens, old_logps, ref_logps, row_features, results)
            metrics = functools.partial(self._metrics, batch, rows, results, left_out, timer)
            self.optimizer_step(losses, metrics, dummy_loss=self.dummy_loss)
            self.weights_are_new = True
            # There may be fewer results than rows where a loss was not finite: the step was skipped.
            for i, result in results.items():
                if old_logps[i] is None and bool(result.logp.isfinite().all()):
                    old_logps[i] = result.logp

    def _sample_batch(self, count: int, timer: _PhaseTimer) -> Batch:
        """Sample and score completions of the next ``count`` prompts; there are fewer groups where prompts failed."""
        prompts = self.source.take(count)
        timer.mark("time/data")
        waited = self.slow.seconds
        rollout, features = self.rollout(prompts)
        succeeded = [i for i, group in enumerate(rollout.groups) if group is not None]
        groups, features = [g for g in rollout.groups if g is not None], [features[i] for i in succeeded]
        timer.mark("time/rollout")
        timer.move("time/rollout", "time/reward", self.slow.seconds - waited)
        scored = score_groups(groups, self.config, self.model.device, opened=self.model.opened_text)
        timer.mark("time/reward")
        return Batch(groups, features, scored, rollout)

    def _divided(self, batch: Batch) -> Batch:
        """Divide the centred rewards where their standard deviation is one of more than a group: of all ranks'."""
        if not self.config.scales_by_batch:
            return batch
        types = [group.prompt.sample.problem_type for group in batch.groups]
        own = list(zip(types, batch.scored.result.rewards.tolist(), strict=True))
        rewards: dict[str, list[float]] = {}  # of all ranks
        for name, values in itertools.chain(*self.ranks.gather(own)):
            rewards.setdefault(name, []).extend(values)
        if self.config.normalize == "batch":
            std = [deviation(list(itertools.chain(*rewards.values())))] * len(types)
        else:
            self.deviations.update(rewards)
            std = [self.deviations.of(name) for name in types]
        wide = torch.tensor(std, dtype=torch.float64)
        return dataclasses.replace(batch, scored=divided(batch.scored, wide, self.config, self.model.device))

    def _rollout_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the weights are whole on this rank for rollouts.

        Those that the engine's decode weights hold are not gathered as well.
        """
        if not (self.ranks.partitioned and isinstance(self.engine, LocalEngine)):
            return self.ranks.gathered_parameters()
        self._hand_over_weights()
        return self.ranks.gathered_parameters(self.engine.held())

    def _hand_over_weights(self) -> None:
        if self.weights_are_new:
            self.engine.weights_changed()
            self.weights_are_new = False

    def rollout(self, prompts: Sequence[Prompt]) -> tuple[Rollout, list[Tensor | None]]:
        """Sample completions of each prompt from ordered and from shuffled frames, and wait for what scores them.

        Failed prompts are counted and recorded as skipped samples, and so are those whose rewards failed.

        Returns:
            The rollout, and the vision features of each prompt's ordered frames (None without media, or where the
            engine needs none).

        Raises:
            TrainingStopped: the engine cannot go on.
        """
        features: list[Tensor | None] = [None] * len(prompts)
        scores = [self.slow.group(p.sample, opened=self.model.opened_text) for p in prompts]
        try:
            rollout, features = self._generate(prompts, scores)
        except RolloutError as error:
            raise TrainingStopped(f"{error}; {self.describe_last_checkpoint()}") from error
        except torch.OutOfMemoryError as error:
            if self.ranks.world == 1:
                raise
            # The other ranks continue and wait for this one, so that it must continue too, without these prompts.
            reason = f"out of memory: {str(error).splitlines()[0]}"
            rollout = Rollout([None] * len(prompts), failed=dict.fromkeys(range(len(prompts)), reason))
            torch.cuda.empty_cache()
        for i, reason in rollout.failed.items():
            self._skip(prompts[i], SampleError("rollout", reason, prompts[i].sample.path))
        return self._rewarded(rollout, prompts, scores), features

    def _rewarded(self, rollout: Rollout, prompts: Sequence[Prompt], scores: Sequence[GroupScores | None]) -> Rollout:
        """Wait for the rewards that take time, and leave out the groups of which one has failed."""
        if not self.slow.some:
            return rollout
        groups = list(rollout.groups)
        for i, (group, score) in enumerate(zip(groups, scores, strict=True)):
            if score is None:
                continue
            try:
                groups[i] = group and score.collect(group)
            except RewardFailed as failure:
                self._failure, groups[i] = failure, None
                self._skip(prompts[i], SampleError("reward", str(failure), prompts[i].sample.path))
            if groups[i] is None:
                score.abandon()
        if (problem := self.slow.take_cache_failure()) is not None:
            self.progress.write(f"{problem}; a resumed run will ask for them again")
        return dataclasses.replace(rollout, groups=groups, slow=self.slow.take_counts())

    def _skip(self, prompt: Prompt, failure: SampleError) -> None:
        self.source.skipped[failure.kind] += 1
        self._on_skip(prompt.draw, failure)

    def _check_rewards(self, batch: Batch) -> None:
        """End the run where no group gets the rewards that take time any more.

        That is at once where what has failed has never given a reward, and after ``FAILED_BATCHES`` batches otherwise:
        a single prompt may be one that a judge cannot take.

        Raises:
            TrainingStopped: on every rank.
        """
        if not self.slow.some:
            return
        failure = self._failure
        unknown = failure is not None and not self.slow.answered[failure.name]
        reports = self.ranks.gather((batch.rollout.slow.groups, batch.rollout.slow.failed, unknown, str(failure)))
        groups, failed = sum(report[0] for report in reports), sum(report[1] for report in reports)
        if not groups:
            return
        self.batches_without_rewards = self.batches_without_rewards + 1 if failed == groups else 0
        never = any(unknown for _, failed, unknown, _ in reports if failed)
        if failed == groups and (never or self.batches_without_rewards >= FAILED_BATCHES):
            reason = next(reason for _, failed, _, reason in reports if failed)
            often = "" if never else f" in {self.batches_without_rewards} batches in a row"
            raise TrainingStopped(
                f"none of {groups} prompts got its rewards{often}. The last: {reason}; "
                f"{self.describe_last_checkpoint()}"
            )

    def _generate(
        self, prompts: Sequence[Prompt], scores: Sequence[GroupScores | None]
    ) -> tuple[Rollout, list[Tensor | None]]:
        config, model = self.config, self.model
        unit = config.temporal.shuffle_unit
        orders = [draw_permutation(p, unit, config.seed) if config.num_shuffled else None for p in prompts]
        ordered: list[Tensor | None] = [None] * len(prompts)
        shuffled = list(ordered)
        if self.engine.needs_features:
            with model.inference():
                ordered = prompt_features(model, prompts)
                shuffled = shuffled_features(model, prompts, orders, unit=unit, ordered=ordered)
        skip = config.temporal.skip_shuffled
        judges = [
            self._judge(p, score) if skip and order else None if score is None else Starter(score, p.offline)
            for p, order, score in zip(prompts, orders, scores, strict=True)
        ]
        requests = [
            Request(
                p,
                config.seed,
                Branch(config.num_generations - len(p.offline), ("ordered", p.draw), features),
                None if order is None else Branch(config.num_shuffled, ("shuffled", p.draw), moved, order),
                judge,
                judge if isinstance(judge, TemporalJudge) else None,
            )
            for p, features, moved, order, judge in zip(prompts, ordered, shuffled, orders, judges, strict=True)
        ]
        self._hand_over_weights()
        rollout = self.engine.generate(requests)
        groups = [
            group
            and dataclasses.replace(
                group,
                ordered=(*group.ordered, *group.prompt.offline),
                accuracies=judge.accuracies if isinstance(judge, TemporalJudge) else group.accuracies,
            )
            for group, judge in zip(rollout.groups, judges, strict=True)
        ]
        return dataclasses.replace(rollout, groups=groups), ordered

    def _say_decode_weights(self) -> None:
        """Print which weights decode steps use, once, where it is not what every run on a CPU does."""
        said = self.engine.choice if isinstance(self.engine, LocalEngine) else ""
        if said != self._said and (self.model.device.type != "cpu" or self.config.rollout.decode_weights != "auto"):
            self.progress.write(said)
        self._said = said

    def _judge(self, prompt: Prompt, scores: GroupScores | None = None) -> TemporalJudge:
        config = self.config
        return TemporalJudge(
            prompt.sample,
            config,
            ordered=config.num_generations - len(prompt.offline),
            shuffled=config.num_shuffled,
            opened=self.model.opened_text,
            offline=prompt.offline,
            scores=scores,
        )

    def _kernels(self) -> str:
        """Return a line that names the backend of each kernel.

        On a GPU the reference implementation is slow, and ``auto`` chooses it where a kernel cannot run.
        """
        device, dtype = self.model.device, self.model.compute_dtype
        named: dict[str, str] = dict.fromkeys((*KERNELS, *Operations.names(self.model)), self.config.kernels)
        if self.model.linear_layers:
            named |= dict.fromkeys(LINEAR_KERNELS, linear_backend(self.config.kernels))
        chosen = {op: chosen_backend(op, device, backend, dtype) for op, backend in named.items()}
        return "kernels: " + ", ".join(f"{op} {backend}" for op, backend in chosen.items())

    def progress_values(self, row: dict[str, Any]) -> dict[str, float | None]:
        labels = {"loss": "loss", "reward": "reward", "p": "temporal/p", "p~": "temporal/p_shuffled"}
        return {label: row.get(key) for label, key in labels.items()} | {"tokens/s": row.get("time/tokens_per_second")}

    def _losses(
        self,
        rows: Sequence[TrainingRow],
        scored: Scored,
        tokens: int,
        old_logps: Sequence[Tensor | None],
        ref_logps: Sequence[Tensor | None],
        row_features: Sequence[list[Tensor] | None],
        results: dict[int, GrpoLoss],
    ) -> list[Callable[[], Tensor]]:
        """Return what computes the weighted loss of each row, and puts its detached result into ``results``."""
        advantages, config = scored.result.advantages.flatten(), self.config
        corrects, masks = config.importance_correction != "none", config.mask_truncated_completions

        def loss_of(i: int) -> Tensor:
            row, features = rows[i], row_features[i]
            result = tgrpo_loss(
                self.model,
                row.packed,
                advantages[row.completions],
                config,
                num_tokens=tokens,
                old_logp=old_logps[i],
                ref_logp=ref_logps[i],
                rollout_logp=row.rollout_logp.to(self.model.device) if corrects else None,
                completion_mask=row.counts.to(self.model.device) if masks else None,
                features=features,
            )
            # Detached, since ``results`` would otherwise keep the row's graph alive.
            results[i] = dataclasses.replace(result, loss=result.loss.detach())
            loss = result.loss * row.weight
            has_media = any(p.media is not None for p in row.packed.prompts)
            return loss if features is not None or has_media else loss + self.dummy_tower_loss()

        return [functools.partial(loss_of, i) for i in range(len(rows))]

    def _check_sampled(self, groups: Sequence[Group]) -> None:
        """Check that there are the log-probs that a correction needs. Raises TrainingStopped."""
        sampled = [c for group in groups for c in group.ordered if c.source is None]
        if self.config.importance_correction != "none" and any(bool(c.logp.isnan().any()) for c in sampled):
            raise TrainingStopped(
                f"importance_correction {self.config.importance_correction}: the server gives no log-probs of what it "
                "sampled; start one that does, or take importance_correction none"
            )

    def _frozen_features(self, features: Sequence[Tensor | None]) -> list[Tensor] | None:
        """Return the rollout's vision features for use in training; None where the tower is trained or has not run."""
        if not self.engine.needs_features or any(p.requires_grad for p in self.model.visual.parameters()):
            return None
        return [f for f in features if f is not None]

    def _reference_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the weights of the reference model are whole on this rank.

        Without a frozen copy the reference model is this model with its adapters off, whose weights must be gathered.
        """
        shared = self.config.beta and self.frozen is None
        return self.ranks.gathered_parameters() if shared else contextlib.nullcontext()

    def _metrics(
        self, batch: Batch, rows: Sequence[TrainingRow], results: dict[int, GrpoLoss], left_out: int, timer: _PhaseTimer
    ) -> dict[str, Any]:
        reports = self.ranks.gather(make_step_report(batch, rows, [results[i] for i in range(len(rows))], left_out))
        metrics = step_metrics(reports, timer.seconds, timer.total(), self._bounds())
        self._warn_without_signal(any(bool(r.batch.scored.result.advantages.any()) for r in reports), metrics)
        left_out_names = REFILLS * (not self.config.dynamic_sampling) + SLOW * (not self.slow.some)
        return {name: value for name, value in metrics.items() if name not in left_out_names}

    def _bounds(self) -> WeightBounds | None:
        """Return the bounds of the correction's weights; None without one."""
        config = self.config
        if config.importance_correction == "none":
            return None
        bounds = config.correction_min, config.correction_max
        return WeightBounds(config.importance_correction, config.correction_mode, *bounds)

    def _warn_without_signal(self, signal: bool, metrics: dict[str, Any]) -> None:
        """Warn once after ``NO_SIGNAL_STEPS`` steps in a row without a nonzero advantage.

        Without the warning a model that is always wrong looks like one that trains slowly.
        """
        if "reward" not in metrics:  # Every prompt of the step failed.
            return
        self.steps_without_signal = 0 if signal else self.steps_without_signal + 1
        if self.steps_without_signal == NO_SIGNAL_STEPS:
            self.progress.write(
                f"step {self.step}: in the last {NO_SIGNAL_STEPS} steps all completions of a question earned the same "
                f"reward, so their advantages are 0 and nothing is learned from them; accuracy is now "
                f"{metrics['rewards/accuracy/mean']:.2f}. A model that is never right needs an SFT cold "
                "start (python -m videor1.sft) or easier questions, one that always is needs harder ones"
            )

    def _reference_logps(
        self, rows: Sequence[TrainingRow], row_features: Sequence[list[Tensor] | None]
    ) -> list[Tensor] | list[None]:
        """Return the reference model's log-probs of each row's tokens; None where there is no KL term."""
        if not self.config.beta:
            return [None] * len(rows)
        with self._reference_weights(), self.model.as_reference(self.frozen) as reference:
            logp = functools.partial(
                completion_logp, reference, temperature=self.config.temperature, backend=self.config.kernels
            )
            calls = [functools.partial(logp, row.packed, features=f) for row, f in zip(rows, row_features, strict=True)]
            return side_by_side(calls, self.model.device)


class _PhaseTimer:
    """Measures the seconds of each phase of a batch."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Add the time since the last mark to the phase ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def move(self, name: str, other: str, seconds: float) -> None:
        """Count seconds of a phase as another's."""
        self.seconds[name] = self.seconds.get(name, 0.0) - seconds
        self.seconds[other] = self.seconds.get(other, 0.0) + seconds

    def total(self) -> float:
        """Return the seconds since the timer was created."""
        return time.perf_counter() - self.started
