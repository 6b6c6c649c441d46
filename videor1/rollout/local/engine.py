"""The in-process engine: the training model's own weights, each prompt prefilled once, all rows decoded together.

Rows of many prompts, from ordered and from shuffled frames, share every decode step; a row that has ended leaves its
place to a waiting branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from videor1.model import VideoLM
from videor1.model.packing import greedy_batches
from videor1.rollout.local.decode import Prefill
from videor1.rollout.local.graph import GraphedSteps
from videor1.rollout.local.inflight import InFlight
from videor1.rollout.local.kv_cache import KVCache, bytes_per_token, default_budget, plan_capacity
from videor1.rollout.local.scheduler import Job, Row, Scheduler
from videor1.rollout.local.step import Step
from videor1.rollout.protocol import Request, Rollout, RolloutStats, SamplingOptions
from videor1.seeding import generator
from videor1.types import Completion, Group
from videor1_kernels import PrefixLayout

PREFILL_TOKENS = 16384  # of the prompts that go through the model together: bounds their activations


class LocalEngine:
    """Batched sampling with a shared-prefix KV cache.

    Args:
        model: its weights are used as they are at each call.
        options: how answers are drawn.
        max_rows: answers in flight at most; a branch's are never split.
        kv_bytes: budget of the KV cache; None: a share of what a GPU has free, no bound elsewhere.
        cuda_graphs: replay decode steps as CUDA graphs where one runs on Triton kernels.
        eager: see :class:`~videor1.rollout.local.scheduler.Scheduler`; None: where a GPU decodes.
        backend: of the kernels.
    """

    needs_features = True

    def __init__(
        self,
        model: VideoLM,
        options: SamplingOptions,
        *,
        max_rows: int = 64,
        kv_bytes: int | None = None,
        cuda_graphs: bool = True,
        eager: bool | None = None,
        backend: str = "auto",
    ) -> None:
        self.model, self.options = model, options
        self.max_rows, self.kv_bytes, self.backend = max_rows, kv_bytes, backend
        self.cuda_graphs = cuda_graphs
        self.eager = model.device.type == "cuda" if eager is None else eager

    def generate(self, requests: Sequence[Request]) -> Rollout:
        """Answers with the weights as they are. ConfigError, before any memory is taken: the KV budget is too small."""
        if not requests:
            return Rollout([])
        # One autocast context over all steps: it casts fp32 weights once, not once a step.
        with self.model.inference(), self.model.autocast(), _current(self.model.device):
            return Run(self, requests).answer()

    def weights_changed(self) -> None:
        """Nothing to do: the weights are the model's own."""

    def close(self) -> None:
        """Nothing is held between calls."""


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Run:
    """One call of :meth:`LocalEngine.generate`."""

    def __init__(self, engine: LocalEngine, requests: Sequence[Request]) -> None:
        self.engine, self.model, self.options, self.requests = engine, engine.model, engine.options, requests
        model, options, device = engine.model, engine.options, engine.model.device
        config = model.hf.config.text_config
        branches = [
            (len(r.prompt.input_ids), branch.count) for r in requests for branch in (r.ordered, r.shuffled) if branch
        ]
        token_bytes = bytes_per_token(config, model.compute_dtype)
        budget = default_budget(device) if engine.kv_bytes is None else engine.kv_bytes
        capacity = plan_capacity(
            branches, options.max_new_tokens, token_bytes, max_rows=engine.max_rows, budget=budget
        )
        self.cache = KVCache(capacity, config, model.compute_dtype, device)
        self.scheduler = Scheduler(requests, capacity, eager=engine.eager)
        self.stats = RolloutStats(
            kv_bytes=capacity.bytes, shuffled_asked=sum(r.shuffled.count for r in requests if r.shuffled)
        )
        special = model.special
        # A prompt's next position is at most its length.
        longest = max(prompt for prompt, _ in branches) + options.max_new_tokens
        self.step = Step(model, self.cache, options, positions=longest, backend=engine.backend)
        self.graphs = GraphedSteps(self.step) if engine.cuda_graphs and self.step.never_waits else None
        self.stops = torch.tensor([special.eos, special.pad], device=device)
        self.rows = InFlight(sum(count for _, count in branches), options.max_new_tokens, device)
        # Per request: the ordered answers, the shuffled ones; None until they are finished.
        self.answers: list[tuple[list[Completion | None], list[Completion | None]]] = [
            ([None] * r.ordered.count, [None] * (r.shuffled.count if r.shuffled else 0)) for r in requests
        ]

    def answer(self) -> Rollout:
        while True:
            self._drop()
            if admitted := self.scheduler.admit():
                for jobs in greedy_batches(admitted, lambda job: job.length, PREFILL_TOKENS):
                    self._prefill(jobs)
            elif self.rows.rows:
                self._decode()
            else:
                break
        assert not self.scheduler.waiting, "nothing is in flight, and still a branch finds no room"
        groups: list[Group | None] = [
            Group(
                request.prompt,
                tuple(answer for answer in ordered if answer is not None),
                tuple(answer for answer in shuffled if answer is not None),
                request.shuffled.permutation if request.shuffled else None,
                len(shuffled),
            )
            for request, (ordered, shuffled) in zip(self.requests, self.answers, strict=True)
        ]
        return Rollout(groups, self.stats)

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """The prompts of new branches, once each, and the first token of their answers."""
        model = self.model
        prompts = [job.request.prompt for job in jobs]
        positions, firsts = zip(*map(model.positions, prompts), strict=True)
        layout = PrefixLayout([job.length for job in jobs], [[] for _ in jobs], device=model.device)
        context = Prefill(layout, self.cache, [job.start for job in jobs], self.engine.backend, self.model.flash)
        hidden = model.hidden_states(
            torch.cat([prompt.input_ids for prompt in prompts]),
            layout.text_positions(positions, firsts),
            context,
            [job.branch.features for job in jobs if job.branch.features is not None],
        )
        ends = torch.tensor(layout.prompt_lengths, device=model.device).cumsum(0) - 1
        new, since = [row for job in jobs for row in job.rows], len(self.rows)
        counts = torch.tensor([len(job.rows) for job in jobs])
        self.rows.enter(new, torch.tensor(firsts).repeat_interleave(counts), torch.stack([*map(self._uniform, new)]))
        # The head sees one position a branch: all its rows draw from the same logits.
        logits = self.step.logits(hidden[ends]).repeat_interleave(counts.to(model.device), 0)
        self._record(since, *self.step.draw(logits, self.rows.uniform[self.rows.places[since:], 0]))

    def _decode(self) -> None:
        """One more token of every row in flight."""
        rows = len(self.rows)
        size = self.graphs.size(rows) if self.graphs else rows
        tokens, logp = (self.graphs or self.step)(self.rows.inputs(size))
        self.stats.decode_steps += 1
        self.stats.row_steps += rows
        self._record(0, tokens[:rows], logp[:rows])

    def _record(self, since: int, tokens: Tensor, logp: Tensor) -> None:
        """What the rows from ``since`` on have drawn; those that have ended leave."""
        rows, most = self.rows, self.options.max_new_tokens
        rows.record(since, tokens, logp)
        self.stats.tokens += len(tokens)
        # One wait for the device a step.
        stopped, lengths = torch.stack([torch.isin(tokens, self.stops).long(), rows.counts[since:]]).tolist()
        going = [not stop and length < most for stop, length in zip(stopped, lengths, strict=True)]
        if not all(going):
            ended = [i for i, go in enumerate(going) if not go]
            self._finish(
                [rows.rows[since + i] for i in ended], [lengths[i] for i in ended], [bool(stopped[i]) for i in ended]
            )
            rows.keep([True] * since + going)

    def _finish(self, ended: Sequence[Row], lengths: Sequence[int], stopped: Sequence[bool]) -> None:
        """The answers of rows that have ended, told to their groups' judges."""
        places = torch.tensor([row.place for row in ended], device=self.model.device)
        drawn, logp = self.rows.drawn[places].cpu(), self.rows.logp[places].cpu()
        for i, row in enumerate(ended):
            job, ids = row.job, drawn[i, : lengths[i]].clone()
            text = self.model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
            answer = Completion(ids, logp[i, : lengths[i]].clone(), stopped[i], text)
            self.answers[job.number][job.shuffled][row.index] = answer
            self.scheduler.leave(row)
            if job.request.judge is not None:
                (job.request.judge.shuffled_done if job.shuffled else job.request.judge.ordered_done)(answer)

    def _drop(self) -> None:
        """Shuffled answers that can no longer change the advantages: not started, or stopped."""
        waiting, running = self.scheduler.drop()
        self.stats.shuffled_skipped += sum(job.branch.count for job in waiting)
        if running:
            gone = {id(job) for job in running}
            going = [id(row.job) not in gone for row in self.rows.rows]
            self.stats.shuffled_stopped += going.count(False)
            self.rows.keep(going)

    def _uniform(self, row: Row) -> Tensor:
        source = generator(row.job.request.seed, *row.job.branch.names, row.index)
        return torch.rand(self.options.max_new_tokens, generator=source)
