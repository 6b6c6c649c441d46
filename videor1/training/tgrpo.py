"""T-GRPO: answer from ordered and from shuffled frames, reward order where it helped, update on the ordered answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.data.source import Source
from videor1.errors import ConfigError, TrainingStopped
from videor1.logs.jsonl import JsonlWriter
from videor1.model.features import prompt_features, shuffled_features
from videor1.model.prompts import build_input_ids
from videor1.rewards import load_reward
from videor1.rewards.advantages import Scored, score_groups
from videor1.rewards.judge import TemporalJudge
from videor1.rollout import Branch, Request, Rollout, RolloutEngine, RolloutError, make_engine
from videor1.training.batch import REFILLS, Batch, refill
from videor1.training.loop import Loop
from videor1.training.passes import Packed, completion_logp, tgrpo_loss
from videor1.training.rollout_log import rollout_rows
from videor1.training.rows import TrainingRow, add, totals_of, training_rows
from videor1.training.step_metrics import report_of, step_metrics
from videor1.types import Media, Prompt, Sample, SampleError
from videor1.video.shuffle import draw_permutation
from videor1_kernels import GrpoLoss, chosen_backend

KERNELS = (
    "prefix_attention", "prefix_decode_attention", "sample_tokens", "linear_logprob", "linear_grpo_loss",
    "tgrpo_advantages",
)  # fmt: skip


NO_SIGNAL_STEPS = 5


class Trainer(Loop[TrainConfig]):
    """The T-GRPO trainer; ``Trainer(config).train()`` runs it."""

    name = "train"

    def __init__(self, config: TrainConfig) -> None:
        for function in config.reward.functions:
            load_reward(function)  # a misspelt one must not wait for the first rollout
        if config.rollout.engine == "server" and config.distributed.engine != "none":
            raise ConfigError("rollout.engine: server: not with distributed.engine deepspeed (ranks answer themselves)")
        super().__init__(config)
        needs_copy = config.beta > 0 and not config.lora.rank
        self.frozen = self.model.frozen_copy() if needs_copy else None  # before a resume changes the weights
        self.engine: RolloutEngine = make_engine(config, self.model, self.run_dir)
        self.rollouts: JsonlWriter | None = None  # while the run is open
        self.weights_are_new = True  # to the engine
        self.steps_without_signal = 0  # in a row

    def samples_per_step(self) -> float:
        config = self.config
        return config.per_device_train_batch_size * config.gradient_accumulation_steps / config.num_iterations

    def make_source(self, start: int) -> Source[Prompt]:
        longest = self.config.max_prompt_length
        if self.config.max_tokens_per_row is not None:
            longest = min(longest, self.config.max_tokens_per_row - self.config.max_completion_length)

        def build(sample: Sample, media: Media | None, draw: int) -> Prompt:
            ids = build_input_ids(self.model.tokenizer, sample, media, max_prompt_length=longest)
            return Prompt(sample, ids, media, draw)

        return Source(self.dataset, self.config, build, on_skip=self._on_skip, start=start, shard=self.shard)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with contextlib.closing(self.engine), super()._open():
            if self.model.device.type != "cpu":
                self.progress.write(self._kernels())
            self.rollouts = self.open_lines("rollouts.jsonl")
            yield

    def train_batch(self) -> None:
        """One rollout and its ``num_iterations`` updates."""
        config, clock = self.config, _Clock()
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        with self.ranks.gathered_parameters():
            batch = self._answer(size, clock)
            if config.dynamic_sampling:
                batch = refill(batch, size, config.dynamic_sampling, functools.partial(self._answer, clock=clock))
        groups, features, scored = batch.groups, batch.features, batch.scored
        assert self.rollouts is not None, "the run is open"
        for row in rollout_rows(groups, scored, self.model, log_tokens=config.log_tokens):
            self.rollouts.write(self.step + 1, row)
        clock.lap("time/reward")

        totals = add(self.ranks.gather(totals_of(scored.lengths, config)))
        rows, left_out = training_rows(self.model, groups, scored, config, totals)
        tower = [self._frozen_features([features[i] for i in row.groups]) for row in rows]
        with self._reference_weights():
            reference = [self._reference_logp(row.packed, own) for row, own in zip(rows, tower, strict=True)]
        clock.lap("time/reference")

        old: list[Tensor | None] = [None] * len(rows)
        for _ in range(min(config.num_iterations, self.total_steps - self.step)):
            results: list[GrpoLoss] = []
            losses = self._losses(rows, scored, totals.tokens, old, reference, tower, results)
            metrics = functools.partial(self._metrics, batch, rows, results, left_out, clock)
            self.optimizer_step(losses, metrics, count=len(rows), dummy_loss=self.dummy_loss)
            self.weights_are_new = True
            for i, new in enumerate(results):  # fewer than rows where a loss was not finite: the step was skipped
                if old[i] is None and bool(new.logp.isfinite().all()):
                    old[i] = new.logp

    def _answer(self, count: int, clock: _Clock) -> Batch:
        """The next prompts, answered and scored; fewer groups where some failed."""
        prompts = self.source.take(count)
        clock.lap("time/data")
        rollout, features = self.rollout(prompts)
        answered = [i for i, group in enumerate(rollout.groups) if group is not None]
        groups, features = [g for g in rollout.groups if g is not None], [features[i] for i in answered]
        clock.lap("time/rollout")
        scored = score_groups(groups, self.config, self.model.device)
        clock.lap("time/reward")
        return Batch(groups, features, scored, rollout)

    def rollout(self, prompts: Sequence[Prompt]) -> tuple[Rollout, list[Tensor | None]]:
        """Answers of each prompt from ordered and shuffled frames, and its ordered vision features."""
        features: list[Tensor | None] = [None] * len(prompts)
        try:
            rollout, features = self._ask(prompts)
        except RolloutError as error:
            raise TrainingStopped(f"{error}; {self.last_whole()}") from error
        except torch.OutOfMemoryError as error:
            if self.ranks.world == 1:
                raise
            # The other ranks go on: so must this one, without these prompts.
            reason = f"out of memory: {str(error).splitlines()[0]}"
            rollout = Rollout([None] * len(prompts), failed=dict.fromkeys(range(len(prompts)), reason))
            torch.cuda.empty_cache()
        for i, reason in rollout.failed.items():
            failure = SampleError("rollout", reason, prompts[i].sample.path)
            self.source.skipped[failure.kind] += 1
            self._on_skip(prompts[i].draw, failure)
        return rollout, features

    def _ask(self, prompts: Sequence[Prompt]) -> tuple[Rollout, list[Tensor | None]]:
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
        judges = [self._judge(p) if skip and order else None for p, order in zip(prompts, orders, strict=True)]
        requests = [
            Request(
                p, config.seed, Branch(config.num_generations, ("ordered", p.draw), features),
                None if order is None else Branch(config.num_shuffled, ("shuffled", p.draw), moved, order), judge,
            )
            for p, features, moved, order, judge in zip(prompts, ordered, shuffled, orders, judges, strict=True)
        ]  # fmt: skip
        if self.weights_are_new:
            self.engine.weights_changed()
            self.weights_are_new = False
        rollout = self.engine.generate(requests)
        groups = [
            dataclasses.replace(group, accuracies=judge.accuracies) if group and judge else group
            for group, judge in zip(rollout.groups, judges, strict=True)
        ]
        return dataclasses.replace(rollout, groups=groups), ordered

    def _judge(self, prompt: Prompt) -> TemporalJudge:
        config = self.config
        return TemporalJudge(prompt.sample, config, ordered=config.num_generations, shuffled=config.num_shuffled)

    def _kernels(self) -> str:
        """Who will compute what: on a GPU the reference is slow, and auto takes it where a kernel cannot run."""
        device, dtype = self.model.device, self.model.compute_dtype
        chosen = {op: chosen_backend(op, device, self.config.kernels, dtype) for op in KERNELS}
        return "kernels: " + ", ".join(f"{op} {backend}" for op, backend in chosen.items())

    def shown(self, row: dict[str, Any]) -> dict[str, float | None]:
        labels = {"loss": "loss", "reward": "reward", "p": "temporal/p", "p~": "temporal/p_shuffled"}
        return {label: row.get(key) for label, key in labels.items()} | {"tokens/s": row.get("time/tokens_per_second")}

    def _losses(
        self,
        rows: Sequence[TrainingRow],
        scored: Scored,
        tokens: int,
        old: Sequence[Tensor | None],
        reference: Sequence[Tensor | None],
        tower: Sequence[list[Tensor] | None],
        results: list[GrpoLoss],
    ) -> Iterator[Tensor]:
        """Row by row, so that each one's graph is freed before the next is built."""
        advantages = scored.result.advantages.flatten()
        for row, old_logp, ref_logp, features in zip(rows, old, reference, tower, strict=True):
            result = tgrpo_loss(
                self.model, row.packed, advantages[row.completions], self.config, num_tokens=tokens,
                old_logp=old_logp, ref_logp=ref_logp, features=features,
            )  # fmt: skip
            results.append(dataclasses.replace(result, loss=result.loss.detach()))  # or it would keep the row's graph
            loss = result.loss * row.weight
            has_media = any(p.media is not None for p in row.packed.prompts)
            yield loss if features is not None or has_media else loss + self.dummy_tower_loss()

    def _frozen_features(self, features: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The rollout's vision features serve training too where the tower is not trained."""
        if not self.engine.needs_features or any(p.requires_grad for p in self.model.visual.parameters()):
            return None
        return [f for f in features if f is not None]

    def _reference_weights(self) -> contextlib.AbstractContextManager[None]:
        """Without a copy the reference policy is this model's, its adapters off."""
        own = self.config.beta and self.frozen is None
        return self.ranks.gathered_parameters() if own else contextlib.nullcontext()

    def _metrics(
        self, batch: Batch, rows: Sequence[TrainingRow], results: Sequence[GrpoLoss], left_out: int, clock: _Clock
    ) -> dict[str, Any]:
        reports = self.ranks.gather(report_of(batch, rows, results, left_out))
        metrics = step_metrics(reports, clock.laps, clock.total())
        self._watch_signal(any(bool(r.batch.scored.result.advantages.any()) for r in reports), metrics)
        return metrics if self.config.dynamic_sampling else {k: v for k, v in metrics.items() if k not in REFILLS}

    def _watch_signal(self, signal: bool, metrics: dict[str, Any]) -> None:
        """Say once when nothing is learned: a model that is always wrong looks like one that trains slowly."""
        if "reward" not in metrics:  # no prompt was answered
            return
        self.steps_without_signal = 0 if signal else self.steps_without_signal + 1
        if self.steps_without_signal == NO_SIGNAL_STEPS:
            self.progress.write(
                f"step {self.step}: in the last {NO_SIGNAL_STEPS} steps all answers to a question earned the same "
                f"reward, so their advantages are 0 and nothing is learned from them; accuracy is now "
                f"{metrics['rewards/accuracy/mean']:.2f}. A model that is never right needs an SFT cold "
                "start (python -m videor1.sft) or easier questions, one that always is needs harder ones"
            )

    def _reference_logp(self, row: Packed, features: list[Tensor] | None) -> Tensor | None:
        if not self.config.beta:
            return None
        with self.model.as_reference(self.frozen) as reference:
            return completion_logp(
                reference, row, temperature=self.config.temperature, features=features, backend=self.config.kernels
            )


class _Clock:
    """Seconds of each phase of a batch."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        return time.perf_counter() - self.started
