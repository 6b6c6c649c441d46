"""Plan the memory of a T-GRPO run: ``python -m videor1.train --plan [options]``. It needs no GPU, weights or data.

The trainer's own passes run on fake tensors of the real sizes (``ledger.py``), so a plan reflects every option that
the passes use. ``python -m videor1.plan --check`` runs the same passes on real tensors and prints both results.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from videor1.config import TrainConfig
from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.plan.ledger import Ledger
from videor1.plan.phases import TrainingStep, first_update, run_step
from videor1.plan.setup import TEXT_TOKENS, Target, Work, build_policy, build_reference, make_fake, make_work, shape_of
from videor1.rollout.local.decode import Decoder
from videor1.rollout.local.engine import PREFILL_TOKENS
from videor1.rollout.local.kept import grown
from videor1.rollout.local.kv_cache import MIB, Capacity, Sizes, plan_capacity
from videor1.rollout.local.weights import DecodeWeights
from videor1.side_by_side import as_on_a_card
from videor1.training.optim import make_optimizer
from videor1_kernels import PrefixLayout
from videor1_kernels.integrations.transformers import PackedRow
from videor1_kernels.linear_logprob.products import product
from videor1_kernels.sampling import reference as sampling

GIB = 2**30
CARDS = (24, 48, 80, 141)  # sizes of GPUs in GB, as they are sold: so many GiB less what the driver keeps
USABLE = 0.98  # usable part of a card's GiB
SLACK = 0.05  # part of the peak that torch's allocator holds in fragments that fit no allocation
CONTEXT = GIB  # bytes of a process for the CUDA context, loaded kernels, cuBLAS's workspaces and CUDA graphs
WORKER_CONTEXT = GIB // 2  # bytes of a decode worker's CUDA context


@dataclass(frozen=True)
class Phase:
    """The peak of a phase's memory."""

    name: str
    parts: dict[str, int]  # bytes by part at the peak
    before: int  # bytes that were live before the phase

    @property
    def bytes(self) -> int:
        """All bytes at the peak."""
        return sum(self.parts.values())

    @property
    def beyond(self) -> int:
        """The bytes that the phase adds to those that were live before it."""
        return self.bytes - self.before


@dataclass(frozen=True)
class Plan:
    """The memory of a run in bytes: of one process, in the steady state.

    Every video and every completion has its full length. Held-out evaluations and the writing of checkpoints are not
    included.
    """

    model: str
    settings: str  # the options with the most effect, in words
    parameters: dict[str, int]  # number of parameters by part of the model
    trainable: int  # number of trainable parameters
    prompts: int  # prompts of a step
    prompt_tokens: int
    media_tokens: int  # the tokens of a prompt that stand for its video
    answers: tuple[int, int]  # completions of a prompt (from frames in order, from shuffled frames)
    answer_tokens: int  # tokens of a completion
    rows: int  # packed rows of a step
    row_tokens: int  # tokens of the longest row
    kv: int  # bytes of the rollout's KV cache
    states: int  # of these, what layers of linear attention hold of the completions, whatever their length
    kept: int  # bytes that a rollout may keep for the next, the KV cache among them; 0: never
    keep_cache: bool | str  # the option
    phases: tuple[Phase, ...]
    slack: float  # part of the peak that is added for the allocator
    context: int  # bytes of the CUDA contexts

    @property
    def binding(self) -> Phase:
        """The phase with the most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """The largest number of allocated bytes."""
        return self.binding.bytes

    @property
    def total(self) -> int:
        """The bytes that the process takes of a GPU's memory."""
        return int(self.peak * (1 + self.slack)) + self.context

    def fits(self, card: int) -> bool:
        """Return whether a GPU of ``card`` GB has enough memory."""
        return self.total <= card * GIB * USABLE

    def room(self, memory: int) -> int:
        """Return the bytes that training leaves free on a GPU that has so many, for what rollouts keep."""
        training = max(phase.bytes for phase in self.phases if phase.name != "rollout")
        if self.keep_cache is True:
            training -= self.kept
        return int(memory - self.context - training * (1 + self.slack))

    def keeps(self, card: int) -> bool:
        """Return whether rollouts keep the cache and the graphs on a GPU of ``card`` GB."""
        return self.kept > 0 and (self.keep_cache is True or self.kept <= self.room(int(card * GIB * USABLE)))

    def to_json(self) -> dict[str, Any]:
        """Return the plan with its derived values, in a form that JSON can hold."""
        derived = {"binding": self.binding.name, "peak": self.peak, "total": self.total}
        cards = {
            name: {str(card): of(card) for card in CARDS} for name, of in (("fits", self.fits), ("keeps", self.keeps))
        }
        return asdict(self) | derived | cards


def plan(config: TrainConfig, shape: Any = None, *, text_tokens: int = TEXT_TOKENS) -> Plan:
    """Return the memory plan of a run.

    Args:
        config: the options of the run; ``device: cpu`` plans for a CPU, any other device for a GPU.
        shape: the model's configuration; default: that of ``config.model_name_or_path``.
        text_tokens: text tokens of a prompt, beside its video.

    Raises:
        ConfigError: the model is unknown, the options reject prompts of the planned length, or they distribute the run
            over several processes.
    """
    if config.distributed.engine != "none":
        raise ConfigError(f"--plan: expected distributed.engine none (one process), got {config.distributed.engine}")
    shape = shape_of(config.model_name_or_path, config.demo) if shape is None else shape
    target = Target.of(config)
    ledger = Ledger(cuda=target.cuda)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = build_policy(shape, config, target, "meta")
    frozen = build_reference(shape, config, target, "meta")
    for lm in (model, frozen):
        if lm is not None:
            make_fake(lm, fake)
    ledger.hold("weights", _tensors(model))
    if frozen is not None:
        ledger.hold("reference model", _tensors(frozen))
    for lm in (model, frozen):
        if lm is not None:
            ledger.watch(lm.hf, {"vision tower": lm.visual, "language model": lm.hf.model.language_model})

    def patches(count: int, columns: int) -> Tensor:
        with fake:
            return torch.empty(count, columns, dtype=torch.uint8)

    work = make_work(config, model, patches, text_tokens)
    optimizer = make_optimizer(model.trainable(), config)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = target.cuda, False  # as make_optimizer has it on a GPU: no temporaries
    capacity = _capacity(config, model, work, cuda=target.cuda)
    engine = _FakeEngine(config, model, work, capacity, ledger, fake)
    step = TrainingStep(config, model, frozen, optimizer, work, engine)
    phases: list[Phase] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        ledger.restart()
        before = ledger.total
        with ledger.part({"policy": "backward pass", "optimizer": "update"}.get(name, "other")):
            yield
        phases.append(Phase(name, dict(sorted(ledger.peak.items(), key=lambda part: -part[1])), before))

    with warnings.catch_warnings(), ledger, as_on_a_card():
        warnings.simplefilter("ignore")  # The run itself will give the warnings of autocast and of checkpointing.
        with ledger.part("optimizer states"):
            first_update(step)
        with ledger.part("weights"):  # which a run's first rollout joins, once
            engine.decode_weights()
        run_step(step, phase)
    workers = config.data.workers if target.cuda and config.video.device == "cuda" else 0
    return Plan(
        model=config.model_name_or_path or "demonstration",
        settings=_settings(config, target),
        parameters=count_parameters(model),
        trainable=sum(p.numel() for p in model.trainable().values()),
        prompts=len(work.prompts),
        prompt_tokens=work.prompt_tokens,
        media_tokens=work.media_tokens,
        answers=(config.num_generations, config.num_shuffled),
        answer_tokens=config.max_completion_length,
        rows=work.rows,
        row_tokens=work.row.layout.total_tokens,
        kv=capacity.bytes if config.rollout.engine == "local" else 0,
        states=capacity.all_states if config.rollout.engine == "local" else 0,
        kept=engine.kept_bytes,
        keep_cache=config.rollout.keep_cache,
        phases=tuple(phases),
        slack=SLACK if target.cuda else 0.0,
        context=CONTEXT + workers * WORKER_CONTEXT if target.cuda else 0,
    )


def count_parameters(model: VideoLM) -> dict[str, int]:
    """Count the parameters by part of the model. A head that is tied to the embedding is counted once."""
    hf = model.hf
    adapters = {name for name, _ in hf.named_parameters() if ".lora_" in name}
    head, embedding = hf.lm_head.weight, hf.get_input_embeddings().weight
    counts = {"language model": 0, "embedding": 0, "head": 0, "vision tower": 0, "adapters": 0}
    for name, parameter in hf.named_parameters():  # This yields a shared parameter once.
        if name in adapters:
            part = "adapters"
        elif parameter is embedding:
            part = "embedding"
        elif parameter is head:
            part = "head"
        else:
            part = "vision tower" if ".visual." in f".{name}" else "language model"
        counts[part] += parameter.numel()
    return counts


def _tensors(model: VideoLM) -> Iterator[Tensor]:
    yield from model.hf.parameters()
    yield from model.hf.buffers()


def _capacity(config: TrainConfig, model: VideoLM, work: Work, *, cuda: bool) -> Capacity:
    counts = [count for count in (config.num_generations, config.num_shuffled) if count]
    branches = [(len(prompt.input_ids), count) for prompt in work.prompts for count in counts]
    rollout = config.rollout
    budget = None if rollout.kv_mib is None else rollout.kv_mib * MIB
    capacity = plan_capacity(
        branches,
        config.max_completion_length,
        Sizes.of(model.hf.config.text_config, model.compute_dtype),
        max_rows=config.rollout_batch_size,
        budget=budget,
        padded=rollout.cuda_graphs and cuda,
    )
    larger = rollout.cuda_graphs and (rollout.keep_cache is True or (cuda and rollout.keep_cache == "auto"))
    return grown(capacity, None, sys.maxsize if budget is None else budget) if larger else capacity


@dataclass
class _FakeEngine:
    """Stands for the rollout engine: it allocates the KV cache, the largest prefill and the logits of a decode step."""

    config: TrainConfig
    model: VideoLM
    work: Work
    capacity: Capacity
    ledger: Ledger
    fake: FakeTensorMode
    kept: list[Any] = field(default_factory=list)  # with rollout.keep_cache
    kept_bytes: int = 0  # what a rollout may keep

    def decode_weights(self) -> DecodeWeights:
        """Make the decode weights; the first time, the model's parameters become parts of them."""
        with self.fake, self.ledger, self.model.inference():
            return DecodeWeights(self.model, packed=self.config.rollout.decode_weights != "model")

    def __call__(self, ordered: Sequence[Tensor], shuffled: Sequence[Tensor]) -> None:
        model, ledger, capacity = self.model, self.ledger, self.capacity
        prompt = self.work.prompts[0]
        # The ledger is entered after the fake mode, so that it sees the tensors that the mode makes.
        with self.fake, ledger, ledger.part("KV cache"):
            cache = torch.empty(capacity.bytes, dtype=torch.uint8)
        length = len(prompt.input_ids)
        # The number of branches whose prompts are prefilled together.
        count = max(1, min(capacity.prefix_tokens, PREFILL_TOKENS) // length)
        features = [f for pair in zip(ordered, shuffled or ordered, strict=True) for f in pair][:count]
        count = min(count, len(features))
        layout = PrefixLayout([length] * count, [[] for _ in range(count)], device=model.device)
        positions, first = model.positions(prompt)
        with model.inference(), model.autocast():
            # The decoder allocates its rotary tables and the weights that it joins or casts.
            with ledger.part("decode weights"):
                positions_of_new = range(first, first + self.config.max_completion_length)
                decoder = Decoder(model, None, positions_of_new, weights=self.decode_weights())
            hidden = model.hidden_states(
                prompt.input_ids.repeat(count),
                layout.text_positions([positions] * count, [first] * count),
                PackedRow(layout, self.config.kernels),
                features,
            )
            del hidden
            with ledger.part("decoding"), model.without_autocast():
                self._decode(decoder.weights.head)
        rollout = self.config.rollout
        if rollout.cuda_graphs and rollout.keep_cache is not False:
            self.kept_bytes = capacity.bytes + decoder.weights.bytes() + decoder.cos.nbytes + decoder.sin.nbytes
        if rollout.keep_cache is True:
            self.kept.append((cache, decoder))
        del cache, decoder

    def _decode(self, head: Tensor) -> None:
        sequences, vocabulary = self.capacity.slots, len(head)
        if self.ledger.cuda:
            # The logits are fp32. With CUDA graphs there is a second copy in the graphs' own memory pool.
            self.ledger.workspace(sequences * vocabulary * 4 * (2 if self.config.rollout.cuda_graphs else 1))
            return
        logits = product(head.new_empty(sequences, head.shape[1]), head.T)
        options = sampling.SampleTokensOptions(self.config.temperature, self.config.top_p, 0)
        sampling.sample_tokens(logits, logits.new_empty(sequences), None, options)


def _settings(config: TrainConfig, target: Target) -> str:
    parts = [
        "bf16" if target.bf16 else "fp32",
        f"LoRA rank {config.lora.rank}" if config.lora.rank else "full fine-tuning",
        "gradient checkpointing" if config.gradient_checkpointing else "no gradient checkpointing",
        "vision tower frozen" if config.freeze_vision or config.lora.rank else "vision tower trained",
        f"beta {config.beta:g}",
    ]
    return ", ".join(parts)
