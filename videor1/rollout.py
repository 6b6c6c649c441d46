"""Answers sampled from the training model's own weights: each prompt prefilled once, its answers decoded together.

Rows of many prompts, from ordered and from shuffled frames, share every decode step. A prompt's keys and values are
stored once; each answer keeps its own suffix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from videor1.model import VideoLM
from videor1.sampling import SamplingOptions, sample_tokens
from videor1.seeding import generator
from videor1.types import Completion, Prompt
from videor1_kernels import (
    DecodeLayout,
    PrefixLayout,
    prefix_attention,
    prefix_decode_attention,
    selective_log_softmax,
)

_REPACK = 0.75  # the batch shrinks to the rows still going once no more than this share of it is


@dataclass(frozen=True)
class Request:
    """``count`` answers to one branch of a prompt. Its rows' random numbers come from (seed, names, row)."""

    prompt: Prompt
    features: Tensor | None  # [tokens, H] of the prompt's media, in the order this branch sees
    count: int
    seed: int
    names: tuple[str | int, ...]


class Sampler:
    """Batched sampling with a KV cache.

    Args:
        model: its weights are used as they are at each call.
        max_rows: answers decoded together at most; one request's are never split.
    """

    def __init__(self, model: VideoLM, *, max_rows: int = 64) -> None:
        self.model = model
        self.max_rows = max_rows

    def generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[list[Completion]]:
        """Completions of each request, in order."""
        answers: list[list[Completion]] = []
        with self.model.inference():
            for batch in _batches(requests, self.max_rows):
                answers += self._generate(batch, options)
        return answers

    def _generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[list[Completion]]:
        model, device, special = self.model, self.model.device, self.model.special
        positions, firsts = zip(*(model.positions(request.prompt) for request in requests), strict=True)
        lengths = [len(request.prompt.input_ids) for request in requests]

        prefill = _Prefill(PrefixLayout(lengths, [[] for _ in lengths], device=device))
        hidden = model.hidden_states(
            torch.cat([request.prompt.input_ids for request in requests]),
            prefill.layout.text_positions(positions, firsts),
            prefill,
            [request.features for request in requests if request.features is not None],
        )
        ends = torch.tensor(lengths, device=device).cumsum(0)
        counts = torch.tensor([request.count for request in requests], device=device)
        row_group = torch.arange(len(requests), device=device).repeat_interleave(counts)  # [R]
        hidden = hidden[ends - 1][row_group]  # [R, H]
        uniform = torch.stack([_row_uniforms(r, i, options.max_new_tokens) for r in requests for i in range(r.count)])
        uniform = uniform.to(device)

        cu_prefix = F.pad(ends, (1, 0)).to(torch.int32)
        cache = _DecodeCache(prefill, DecodeLayout(cu_prefix, row_group), options.max_new_tokens)
        first = torch.tensor(firsts, device=device)[row_group]
        weight, banned = model.head_weight, torch.tensor(special.vision, device=device)
        stops = torch.tensor([special.eos, special.pad], device=device)
        rows = torch.arange(len(row_group), device=device)  # those still in the batch
        ended = torch.zeros_like(rows, dtype=torch.bool)
        sampled = torch.full((len(rows), options.max_new_tokens), special.pad, device=device)
        logps = torch.zeros(sampled.shape, device=device)
        for step in range(options.max_new_tokens):
            logits = F.linear(hidden, weight)
            tokens = sample_tokens(logits, uniform[:, step], options, banned)
            sampled[rows, step] = tokens
            logps[rows, step] = selective_log_softmax(logits, tokens, temperature=options.temperature or 1.0).float()
            ended |= torch.isin(tokens, stops)
            left = len(rows) - int(ended.sum())
            if step + 1 == options.max_new_tokens or not left:
                break
            if left <= _REPACK * len(rows):  # until then what ended rows draw is dropped: moving the cache costs too
                going = ~ended
                rows, tokens, uniform, first = rows[going], tokens[going], uniform[going], first[going]
                ended = ended[going]
                cache.keep(going)
            hidden = model.hidden_states(tokens, (first + step).expand(3, 1, -1), cache.at(step))
        return self._completions(sampled.cpu(), logps.cpu(), requests, stops.cpu())

    def _completions(
        self, tokens: Tensor, logps: Tensor, requests: Sequence[Request], stops: Tensor
    ) -> list[list[Completion]]:
        stopped = torch.isin(tokens, stops)
        finished = stopped.any(1)
        lengths = torch.where(finished, stopped.int().argmax(1) + 1, tokens.shape[1])
        rows = iter(range(len(tokens)))
        answers = []
        for request in requests:
            group = []
            for _, row in zip(range(request.count), rows, strict=False):
                ids = tokens[row, : lengths[row]].clone()
                text = self.model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                group.append(Completion(ids, logps[row, : len(ids)].clone(), bool(finished[row]), text))
            answers.append(group)
        return answers


def _batches(requests: Sequence[Request], max_rows: int) -> Iterator[list[Request]]:
    batch: list[Request] = []
    for request in requests:
        if batch and sum(r.count for r in batch) + request.count > max_rows:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _row_uniforms(request: Request, row: int, count: int) -> Tensor:
    return torch.rand(count, generator=generator(request.seed, *request.names, row))


class _Prefill:
    """Attention context of the prompts, which keeps their keys and values, layer by layer."""

    def __init__(self, layout: PrefixLayout) -> None:
        self.layout = layout
        self.k: list[Tensor] = []  # per layer [Tp, Hkv, D]
        self.v: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        assert layer == len(self.k), (layer, len(self.k))
        self.k.append(k.contiguous())
        self.v.append(v.contiguous())
        return prefix_attention(q, k, v, self.layout, scale=scale)


class _DecodeCache:
    """Attention context of one new token per row."""

    def __init__(self, prefill: _Prefill, layout: DecodeLayout, capacity: int) -> None:
        self.prefill, self.layout, self.capacity = prefill, layout, capacity
        self.suffix: list[tuple[Tensor, Tensor]] = []  # per layer K and V, [R, C, Hkv, D]
        self.step = 0

    def keep(self, going: Tensor) -> None:
        """Go on with the rows of the mask ``going`` [R] alone."""
        self.layout = DecodeLayout(self.layout.cu_prefix, self.layout.row_group[going])
        self.suffix = [(k[going], v[going]) for k, v in self.suffix]

    def at(self, step: int) -> _DecodeCache:
        """The context of decode step ``step``: the new token becomes entry ``step`` of each suffix."""
        self.step = step
        device = self.layout.row_group.device
        self.lengths = torch.full_like(self.layout.row_group, step + 1, device=device)
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if layer == len(self.suffix):
            shape = (len(k), self.capacity, *k.shape[1:])
            self.suffix.append((k.new_empty(shape), v.new_empty(shape)))
        suffix_k, suffix_v = self.suffix[layer]
        suffix_k[:, self.step], suffix_v[:, self.step] = k, v
        return prefix_decode_attention(
            q, self.prefill.k[layer], self.prefill.v[layer], suffix_k, suffix_v,
            suffix_lengths=self.lengths, layout=self.layout, scale=scale,
        )  # fmt: skip
