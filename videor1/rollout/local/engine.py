"""The in-process rollout engine, which samples with the training model's own weights.

Each prompt is prefilled once. The sequences of many prompts, from ordered and from shuffled frames, share every decode
step (continuous batching); the slots of ended sequences go to waiting branches.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from videor1.model import VideoLM
from videor1.model.packing import LEAST_TOKENS, even_batches
from videor1.rollout.local.decode import Prefill
from videor1.rollout.local.graph import GraphedSteps
from videor1.rollout.local.inflight import InFlight
from videor1.rollout.local.kept import Kept, default_room, grown, table_of
from videor1.rollout.local.kv_cache import MIB, Capacity, KVCache, Sizes, cache_budget, plan_capacity
from videor1.rollout.local.scheduler import Job, RunningSequence, Scheduler
from videor1.rollout.local.step import DecodeStep
from videor1.rollout.local.weights import DecodeWeights, Gathered, copied_bytes
from videor1.rollout.protocol import Request, Rollout, RolloutStats, SamplingOptions
from videor1.seeding import generator
from videor1.side_by_side import on_cores, side_by_side
from videor1.types import Completion, Group
from videor1_kernels import PrefixLayout
from videor1_kernels.transfer import to_device

PREFILL_TOKENS = 16384  # most prompt tokens of one prefill pass, which bounds the memory of its activations


class LocalEngine:
    """Batched sampling with a shared-prefix KV cache.

    Args:
        model: the model to sample from; each call uses its current weights.
        options: how completions are sampled.
        max_rows: most sequences in flight; those of a branch always run together, even if they are more.
        kv_bytes: budget of the KV cache; None: a share of a GPU's free memory, or a CPU's memory.
        cuda_graphs: replay decode steps as CUDA graphs where they run on Triton kernels.
        keep_cache: keep graphs and KV cache for the next call (:mod:`videor1.rollout.local.kept`); auto: on a GPU,
            where there is ``room``.
        decode_weights: packed: join the weights of layers with one input
            (:class:`~videor1.rollout.local.projections.Projections`); model: use the model's own; auto: packed, unless
            that takes a second copy of weights for which there is no ``room``.
        gathered: gathers parameters, under ZeRO-3 (:class:`~videor1.rollout.local.weights.DecodeWeights`).
        eager: see :class:`~videor1.rollout.local.scheduler.Scheduler`; None: True on a GPU.
        backend: backend of the kernels.
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
        keep_cache: bool | Literal["auto"] = "auto",
        decode_weights: Literal["auto", "packed", "model"] = "auto",
        gathered: Gathered | None = None,
        eager: bool | None = None,
        backend: str = "auto",
    ) -> None:
        self.model, self.options = model, options
        self.max_rows, self.kv_bytes, self.backend = max_rows, kv_bytes, backend
        self.cuda_graphs, self.keep_cache, self.decode_weights = cuda_graphs, keep_cache, decode_weights
        self.gathered = gathered
        self.room: int | None = None  # bytes that a rollout may keep or copy; None: a share of the device's memory
        self.kept: Kept | None = None
        self.weights: DecodeWeights | None = None
        self.choice = ""  # which decode weights are used, and why
        self.eager = model.device.type == "cuda" if eager is None else eager

    def generate(self, requests: Sequence[Request]) -> Rollout:
        """Sample the completions of all requests with the model's current weights.

        Raises:
            ConfigError: the KV cache's budget is too small; raised before any memory is allocated.
        """
        if not requests:
            return Rollout([])
        # One autocast context around all steps casts fp32 weights once, not once a step.
        with self.model.inference(), self.model.autocast(), _current_device(self.model.device):
            self._take_weights()
            try:
                return Run(self, requests).generate()
            finally:
                if self.kept is None:
                    self.weights = None

    def weights_changed(self) -> None:
        """Copy the model's weights into the decode weights, under ZeRO-3 layer by layer.

        Otherwise every call of :meth:`generate` takes the weights as they are then.
        """
        if self.gathered is not None and self.decode_weights != "model":
            with self.model.inference():
                self._take_weights(self.gathered)

    def held(self) -> dict[nn.Parameter, Tensor]:
        """Return the parameters whose values the decode weights hold, with those: they need not be gathered."""
        return {} if self.weights is None else self.weights.held()

    def close(self) -> None:
        """Give back what was kept for the next call."""
        self.kept = self.weights = None

    def keeps(self, kept: Kept) -> bool:
        """Return whether to keep it."""
        if kept.step.decoder.weights.tensors() is None:
            return False
        if self.keep_cache != "auto":
            return self.keep_cache
        return self.model.device.type == "cuda" and kept.bytes <= self.room_left

    @property
    def room_left(self) -> int:
        return default_room(self.model.device) if self.room is None else self.room

    def _take_weights(self, gathered: Gathered | None = None) -> None:
        """Renew the decode weights, or make them where there are none or what there is does not fit any more."""
        if self.weights is not None and self.weights.renew(gathered):
            return
        self.kept = self.weights = None  # so that their memory is free
        packed = self.decode_weights != "model"
        copied = copied_bytes(self.model) if packed and gathered is None else 0
        if self.decode_weights == "auto":
            packed = copied <= self.room_left
        self.weights = DecodeWeights(self.model, packed=packed, gathered=gathered)
        self.choice = _choice(self.decode_weights, packed, copied, self.room_left, partitioned=gathered is not None)


def _choice(asked: str, packed: bool, copied: int, room: int, *, partitioned: bool) -> str:
    """Say which decode weights are used, and why."""
    why = f"a second copy takes {copied / MIB:,.0f} MiB"
    if asked == "model":
        why = "as asked for"
    elif partitioned:
        why = "copied layer by layer, in place of gathered ones"
    elif not copied:
        why = "no second copy: the model's parameters are parts of them"
    elif asked == "auto":
        why += f", and there {'is' if packed else 'is no'} room for it in {room / MIB:,.0f}"
    return f"rollout.decode_weights: {'packed' if packed else 'model'} ({why})"


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one, on which Triton launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Reading:
    """Values on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> list[list[float]]:
        """Wait for them, and for nothing that was launched later."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Run:
    """The state of one call of :meth:`LocalEngine.generate`."""

    step: DecodeStep
    cache: KVCache
    uniform: Tensor  # fp32 [N, C], random numbers of all sequences
    graphs: GraphedSteps | None

    def __init__(self, engine: LocalEngine, requests: Sequence[Request]) -> None:
        self.engine, self.model, self.options, self.requests = engine, engine.model, engine.options, requests
        model, options, device = engine.model, engine.options, engine.model.device
        config = model.hf.config.text_config
        branches = [
            (len(r.prompt.input_ids), branch.count) for r in requests for branch in (r.ordered, r.shuffled) if branch
        ]
        budget = cache_budget(device, engine.kv_bytes)
        capacity = plan_capacity(
            branches,
            options.max_new_tokens,
            Sizes.of(config, model.compute_dtype),
            max_rows=engine.max_rows,
            budget=budget,
            padded=engine.cuda_graphs and not on_cores(device),
        )
        sequences = sum(count for _, count in branches)
        # For each request: the positions of the prompt's tokens and the position of the first completion token.
        self.positions = [model.positions(request.prompt) for request in requests]
        firsts = [first for _, first in self.positions]
        positions = range(min(firsts), max(firsts) + options.max_new_tokens)
        self._make_step(capacity, sequences, positions, budget)
        capacity = self.cache.capacity
        self.scheduler = Scheduler(requests, capacity, eager=engine.eager)
        self.stats = RolloutStats(
            kv_bytes=capacity.bytes, shuffled_asked=sum(r.shuffled.count for r in requests if r.shuffled)
        )
        special = model.special
        # The tokens of steps that were launched and not yet read. On a GPU the next step is launched first, so that the
        # GPU does not wait for the host; a sequence that has ended then runs along once more, for nothing.
        self.unread: deque[tuple[list[RunningSequence], Reading]] = deque()
        self.ahead = 1 if device.type == "cuda" else 0
        self.stops = {special.eos, special.pad}
        self.in_flight = InFlight(self.uniform, self.cache.spare_slot)
        # For each request: the ordered and the shuffled completions; None until they are finished.
        self.completions: list[tuple[list[Completion | None], list[Completion | None]]] = [
            ([None] * r.ordered.count, [None] * (r.shuffled.count if r.shuffled else 0)) for r in requests
        ]

    def _make_step(self, capacity: Capacity, sequences: int, positions: range, budget: int) -> None:
        """Make the cache, the step and, on a GPU, its graphs; or take those that the engine has kept."""
        engine, model, options = self.engine, self.model, self.options
        kept, engine.kept = engine.kept, None
        known = kept.cache.capacity if kept is not None else None
        fits = kept is not None and kept.holds(capacity, sequences, positions)
        graphed = engine.cuda_graphs and engine.keep_cache is not False
        if kept is not None and not fits:
            kept = None  # its memory is free before more is taken
        config = model.hf.config.text_config
        if kept is not None:
            self.cache, positions = kept.cache, kept.positions
        else:
            if graphed and (engine.keep_cache is True or model.device.type == "cuda"):
                capacity, positions = grown(capacity, known, budget), table_of(positions)
            self.cache = KVCache(capacity, config, model.compute_dtype, model.device)
        self.step = DecodeStep(
            model, self.cache, options, positions=positions, backend=engine.backend, weights=engine.weights
        )
        if kept is not None and kept.renew(self.step):
            self.step, self.uniform, self.graphs = kept.step, kept.uniform, kept.graphs
        else:
            self.uniform = torch.empty(sequences, options.max_new_tokens, device=model.device)
            spare = self.cache.spare_slot
            self.graphs = GraphedSteps(self.step, spare=spare) if engine.cuda_graphs and self.step.capturable else None
            kept = None if self.graphs is None else Kept(self.step, self.cache, self.uniform, self.graphs)
        if kept is not None and graphed and engine.keeps(kept):
            engine.kept = kept

    def generate(self) -> Rollout:
        """Prefill and decode until no branch is waiting or in flight."""
        device = self.model.device
        while True:
            self._drop_unneeded()
            if self.scheduler.settle():
                self._drop_unneeded()
            if admitted := self.scheduler.admit():
                batches = even_batches(admitted, lambda job: job.length, PREFILL_TOKENS, device, least=LEAST_TOKENS)
                ends = side_by_side([functools.partial(self._prefill, jobs) for jobs in batches], device)
                for jobs, hidden in zip(batches, ends, strict=True):
                    self._first_tokens(jobs, hidden)
            elif self.in_flight.sequences:
                self._decode()
            elif not self.unread:
                break
            while len(self.unread) > (self.ahead if self.in_flight.sequences else 0):
                self._read()
        assert not self.scheduler.waiting, "nothing is in flight, and still a branch finds no room"
        groups: list[Group | None] = [
            Group(
                request.prompt,
                tuple(completion for completion in ordered if completion is not None),
                tuple(completion for completion in shuffled if completion is not None),
                request.shuffled.permutation if request.shuffled else None,
                len(shuffled),
            )
            for request, (ordered, shuffled) in zip(self.requests, self.completions, strict=True)
        ]
        return Rollout(groups, self.stats)

    def _prefill(self, jobs: Sequence[Job]) -> Tensor:
        """Prefill the prompt of each new branch once; return the hidden states [jobs, H] of their last tokens."""
        model = self.model
        prompts = [job.request.prompt for job in jobs]
        positions, firsts = zip(*(self.positions[job.number] for job in jobs), strict=True)
        layout = PrefixLayout([job.length for job in jobs], [[] for _ in jobs], device=model.device)
        hidden = self.step.decoder.prefill(
            torch.cat([prompt.input_ids for prompt in prompts]),
            layout.text_positions(positions, firsts),
            [job.branch.features for job in jobs if job.branch.features is not None],
            Prefill(
                layout,
                self.cache,
                [job.start for job in jobs],
                [[sequence.slot for sequence in job.sequences] for job in jobs],
                self.engine.backend,
                self.model.flash,
            ),
        )
        return hidden[to_device(torch.tensor(layout.prompt_lengths).cumsum(0) - 1, model.device)]

    def _first_tokens(self, jobs: Sequence[Job], hidden: Tensor) -> None:
        """Sample the first token of each sequence of new branches, from what their prefill has returned."""
        firsts = [self.positions[job.number][1] for job in jobs]
        new = [sequence for job in jobs for sequence in job.sequences]
        counts = torch.tensor([len(job.sequences) for job in jobs])
        uniform = torch.stack([*map(self._uniform, new)])
        first_uniform = self.in_flight.add(new, torch.tensor(firsts).repeat_interleave(counts), uniform)
        # The head computes one position per branch: all its sequences draw their first token from the same logits.
        branch = torch.arange(len(jobs)).repeat_interleave(counts)
        branch = to_device(branch, self.model.device)
        tokens, logp = self.step.draw(self.step.logits(hidden)[branch], first_uniform)
        self.in_flight.first_tokens(tokens)
        self._launched(new, torch.stack([tokens.double(), logp.double()]))

    def _decode(self) -> None:
        """Sample one more token of every sequence in flight."""
        count, in_flight = len(self.in_flight), self.in_flight
        if self.graphs:
            output, batch = self.graphs(in_flight.batch(self.graphs.size(count)))
            in_flight.advanced(batch)
        else:
            output = self.step(in_flight.batch(count))
        self.stats.decode_steps += 1
        self.stats.row_steps += count
        self._launched(in_flight.sequences, output[:, :count])

    def _launched(self, sequences: Sequence[RunningSequence], output: Tensor) -> None:
        """Note that ``output`` will hold one more token of each sequence; those at their limit need no more steps."""
        self.unread.append((list(sequences), Reading(output)))
        for sequence in sequences:
            sequence.launched += 1
        limit = self.options.max_new_tokens
        self.in_flight.keep([sequence.launched < limit for sequence in self.in_flight.sequences])

    def _read(self) -> None:
        """Read the tokens of the oldest step that has not been read, and finish the sequences that end with them."""
        sequences, reading = self.unread.popleft()
        for sequence, token, logp in zip(sequences, *reading.values(), strict=True):
            if sequence.done:  # it ended with the token before, or is not needed
                continue
            sequence.tokens.append(int(token))
            sequence.logp.append(logp)
            self.stats.tokens += 1
            stopped = int(token) in self.stops
            if stopped or len(sequence.tokens) == self.options.max_new_tokens:
                self._finish(sequence, stopped)
        self.in_flight.keep([not sequence.done for sequence in self.in_flight.sequences])

    def _finish(self, sequence: RunningSequence, stopped: bool) -> None:
        """Store the completion of a sequence that has ended, and report it to the judge of its group."""
        job, ids = sequence.job, torch.tensor(sequence.tokens)
        text = self.model.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        completion = Completion(ids, torch.tensor(sequence.logp, dtype=torch.float32), stopped, text)
        self.completions[job.number][job.shuffled][sequence.index] = completion
        self.scheduler.leave(sequence)
        if job.request.judge is not None:
            (job.request.judge.shuffled_done if job.shuffled else job.request.judge.ordered_done)(completion)

    def _drop_unneeded(self) -> None:
        """Skip or stop the shuffled completions that can no longer change the advantages."""
        waiting, running = self.scheduler.drop()
        self.stats.shuffled_skipped += sum(job.branch.count for job in waiting)
        if running:
            dropped = {id(job) for job in running}
            needed = [id(sequence.job) not in dropped for sequence in self.in_flight.sequences]
            self.stats.shuffled_stopped += needed.count(False)
            self.in_flight.keep(needed)

    def _uniform(self, sequence: RunningSequence) -> Tensor:
        """Return all the uniform random numbers that a sequence may need, fp32 [max_new_tokens]."""
        job = sequence.job
        source = generator(job.request.seed, *job.branch.names, sequence.index)
        return torch.rand(self.options.max_new_tokens, generator=source)
