"""The in-process engine: the training model's own weights, each prompt prefilled once, all sequences decoded
together.

Sequences of many prompts, from ordered and from shuffled frames, share every decode step; one that has ended leaves its
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
from videor1.rollout.local.scheduler import Job, RunningSequence, Scheduler
from videor1.rollout.local.step import DecodeStep
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
        # Per request: the prompt's positions and the one of its answers' first token, which may exceed its length.
        self.positions = [model.positions(request.prompt) for request in requests]
        firsts = [first for _, first in self.positions]
        answers = range(min(firsts), max(firsts) + options.max_new_tokens)
        self.step = DecodeStep(model, self.cache, options, positions=answers, backend=engine.backend)
        self.graphs = GraphedSteps(self.step) if engine.cuda_graphs and self.step.never_waits else None
        self.stops = torch.tensor([special.eos, special.pad], device=device)
        self.in_flight = InFlight(sum(count for _, count in branches), options.max_new_tokens, device)
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
            elif self.in_flight.sequences:
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
        positions, firsts = zip(*(self.positions[job.number] for job in jobs), strict=True)
        layout = PrefixLayout([job.length for job in jobs], [[] for _ in jobs], device=model.device)
        context = Prefill(layout, self.cache, [job.start for job in jobs], self.engine.backend, self.model.flash)
        hidden = model.hidden_states(
            torch.cat([prompt.input_ids for prompt in prompts]),
            layout.text_positions(positions, firsts),
            context,
            [job.branch.features for job in jobs if job.branch.features is not None],
        )
        ends = torch.tensor(layout.prompt_lengths, device=model.device).cumsum(0) - 1
        new, since = [sequence for job in jobs for sequence in job.sequences], len(self.in_flight)
        counts = torch.tensor([len(job.sequences) for job in jobs])
        uniform = torch.stack([*map(self._uniform, new)])
        self.in_flight.enter(new, torch.tensor(firsts).repeat_interleave(counts), uniform)
        # The head sees one position a branch: all its sequences draw from the same logits.
        logits = self.step.logits(hidden[ends]).repeat_interleave(counts.to(model.device), 0)
        self._record(since, *self.step.draw(logits, self.in_flight.uniform[self.in_flight.places[since:], 0]))

    def _decode(self) -> None:
        """One more token of every sequence in flight."""
        rows = len(self.in_flight)
        size = self.graphs.size(rows) if self.graphs else rows
        tokens, logp = (self.graphs or self.step)(self.in_flight.inputs(size))
        self.stats.decode_steps += 1
        self.stats.row_steps += rows
        self._record(0, tokens[:rows], logp[:rows])

    def _record(self, since: int, tokens: Tensor, logp: Tensor) -> None:
        """What the sequences from ``since`` on have drawn; those that have ended leave."""
        in_flight, most = self.in_flight, self.options.max_new_tokens
        in_flight.record(since, tokens, logp)
        self.stats.tokens += len(tokens)
        # One wait for the device a step.
        stopped, lengths = torch.stack([torch.isin(tokens, self.stops).long(), in_flight.counts[since:]]).tolist()
        going = [not stop and length < most for stop, length in zip(stopped, lengths, strict=True)]
        if not all(going):
            ended = [i for i, go in enumerate(going) if not go]
            self._finish(
                [in_flight.sequences[since + i] for i in ended],
                [lengths[i] for i in ended],
                [bool(stopped[i]) for i in ended],
            )
            in_flight.keep([True] * since + going)

    def _finish(self, ended: Sequence[RunningSequence], lengths: Sequence[int], stopped: Sequence[bool]) -> None:
        """The answers of sequences that have ended, told to their groups' judges."""
        places = torch.tensor([sequence.place for sequence in ended], device=self.model.device)
        drawn, logp = self.in_flight.drawn[places].cpu(), self.in_flight.logp[places].cpu()
        for i, sequence in enumerate(ended):
            job, ids = sequence.job, drawn[i, : lengths[i]].clone()
            text = self.model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
            answer = Completion(ids, logp[i, : lengths[i]].clone(), stopped[i], text)
            self.answers[job.number][job.shuffled][sequence.index] = answer
            self.scheduler.leave(sequence)
            if job.request.judge is not None:
                (job.request.judge.shuffled_done if job.shuffled else job.request.judge.ordered_done)(answer)

    def _drop(self) -> None:
        """Shuffled answers that can no longer change the advantages: not started, or stopped."""
        waiting, running = self.scheduler.drop()
        self.stats.shuffled_skipped += sum(job.branch.count for job in waiting)
        if running:
            gone = {id(job) for job in running}
            going = [id(sequence.job) not in gone for sequence in self.in_flight.sequences]
            self.stats.shuffled_stopped += going.count(False)
            self.in_flight.keep(going)

    def _uniform(self, sequence: RunningSequence) -> Tensor:
        job = sequence.job
        source = generator(job.request.seed, *job.branch.names, sequence.index)
        return torch.rand(self.options.max_new_tokens, generator=source)
