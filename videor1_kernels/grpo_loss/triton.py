"""grpo_loss and linear_grpo_loss on Triton kernels.

linear_grpo_loss forms the gradients in the forward pass, a chunk of rows at a time, with 6NHV operations in all:

1. a product gives the logits, and a row kernel their statistics;
2. a small kernel computes the coefficients;
3. a row kernel turns the logits into their gradient, in place;
4. one product gives d_hidden, and another d_weight.

A token's coefficient depends only on its own log-prob, or on those of its completion if ratios are per sequence. So
nothing is computed twice.

N rows, H hidden, V vocabulary, S completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1_kernels.checks import IGNORED
from videor1_kernels.grpo_loss.factors import token_factors
from videor1_kernels.grpo_loss.records import Completions, GrpoLossOptions
from videor1_kernels.grpo_loss.reference import LinearResult, Result, token_weights
from videor1_kernels.grpo_loss.rows import KnownRows, read_rows
from videor1_kernels.grpo_loss.triton_terms import terms, whole_terms
from videor1_kernels.linear_logprob.inputs import HeadInputs
from videor1_kernels.linear_logprob.products import (
    HeadGradients,
    chunk_rows,
    common_dtype,
    logits_buffer,
    most_rows,
    narrow_rows,
    power_of_two,
    product,
)
from videor1_kernels.linear_logprob.triton import inverse, statistics
from videor1_kernels.linear_logprob.triton_rows import row_gradient, row_statistics
from videor1_kernels.transfer import to_device


def grpo_loss(logp: Tensor, completions: Completions, mask: Tensor | None, options: GrpoLossOptions) -> Result:
    """The loss from log-probs [N], and its gradient."""
    return whole_terms(logp, completions, mask, options)


@dataclass(frozen=True)
class _Rows:
    """The n unmasked rows of a call and what the loss needs of each; first the rows that may have a gradient."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H], of the same dtype
    bias: Tensor | None
    labels: Tensor  # [n]
    scale: Tensor  # fp32 [n]: 1 / temperature
    softcap: float
    given: Completions  # with the values of the n rows, and the advantages of all S completions
    bonus: Tensor | None  # fp32 [n]: d loss / d entropy but for factors of tokens; None: no entropy in the loss
    factors: tuple[Tensor | None, Tensor | None]  # of token_factors, [n]; None too where they depend on the log-probs
    advantages: Tensor  # [S]
    tokens: Tensor  # int64 [S]
    whole: Tensor  # int64 scalar: n
    spans: list[tuple[int, int, int]]  # (first row, end, completion), in the order of the rows
    live: int  # rows that may have a gradient
    some_zero: bool  # whether an advantage is 0
    options: GrpoLossOptions

    def segments(self, parts: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return, for each part (first row, end), its pieces of completions, int64 [3, pieces] on the device.

        The three are where in the part a piece begins and ends, and its completion. All are copied there at once.
        """
        pieces = [
            [
                (max(low, first) - first, min(high, stop) - first, s)
                for low, high, s in self.spans
                if max(low, first) < min(high, stop)
            ]
            for first, stop in parts
        ]
        table = torch.tensor([piece for part in pieces for piece in part], dtype=torch.int64).reshape(-1, 3).T
        table = to_device(table.contiguous(), self.hidden.device)
        return list(table.split([len(part) for part in pieces], 1))

    def add_terms(
        self,
        first: int,
        segments: Tensor,
        logp: Tensor,
        entropy: Tensor,
        coefficient: Tensor,
        d_entropy: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Fill in the coefficients of the rows from ``first`` on that have ``segments``; add their loss, KL and clipped
        tokens to ``sums``. All but ``sums`` are of these rows alone."""
        part = slice(first, first + len(logp))
        given = self.given
        old, ref = (None if v is None else v[part] for v in (given.old_logp, given.ref_logp))
        starts, stops, completions = (row.contiguous() for row in segments)
        on_policy, whole = self.factors
        factors = None if on_policy is None else on_policy[part], None if whole is None else whole[part]
        if _factors_wait(self.options, old):
            here = given._replace(
                advantages=self.advantages[completions],
                rollout_logp=None if given.rollout_logp is None else given.rollout_logp[part],
                token_weight=None if given.token_weight is None else given.token_weight[part],
                importance_weight=None if given.importance_weight is None else given.importance_weight[part],
            )
            lengths = stops - starts  # with a correction by completion, all segments are whole ones
            was, new = (logp, None) if old is None else (old.float(), logp)
            factors = token_factors(was, here, None, lengths, lengths, self.options, new)
        sums += terms(
            logp,
            old,
            ref,
            None,
            (starts, stops, completions),
            self.advantages,
            self.tokens,
            self.whole,
            self.options,
            coefficient,
            factors=factors,
            completions=given.counted(),
        ).sum(1)
        if self.bonus is not None and d_entropy is not None:
            d_entropy.copy_(self.bonus[part] if factors[1] is None else self.bonus[part] * factors[1])
            sums[0] += (d_entropy * entropy).sum()


def _factors_wait(options: GrpoLossOptions, old_logp: Tensor | None) -> bool:
    """Whether the factors of tokens depend on the policy's own log-probs."""
    corrected = options.importance_correction != "none"
    if options.loss_type == "vespo":
        return corrected or old_logp is not None
    return corrected and old_logp is None


def linear_grpo_loss(
    inputs: HeadInputs,
    completions: Completions,
    options: GrpoLossOptions,
    needs: Sequence[bool],
    known: KnownRows | None = None,
) -> LinearResult:
    """The loss from hidden states, and those gradients of hidden, weight and bias that ``needs`` asks for.

    The host does not wait for the device after ``known`` (None: read here), except for the size of each chunk's
    products where a ratio may be clipped, or the KL term is all that a completion has.
    """
    hidden, weight, labels, bias, temperature, _, softcap = inputs
    advantages, cu_seqlens, old_logp = completions.advantages, completions.cu_seqlens, completions.old_logp
    if known is None:
        known = read_rows(labels, advantages, cu_seqlens, None, len(weight))
    size, device = len(labels), hidden.device
    head_hidden, head_weight = common_dtype(hidden, weight)
    boundaries = cu_seqlens.long()
    keep = labels != IGNORED
    # Without a KL term and entropy a completion of advantage 0 has no gradient: its rows only need their statistics.
    split = options.beta == 0 and options.entropy_coef == 0 and any(needs)
    spans, live = _spans(known.tokens, [zero and split for zero in known.zero])
    kept = sum(known.tokens)
    as_given = kept == size and live in (0, size)
    order = _order(keep, (advantages.float() == 0) & split, boundaries, kept) if not as_given else None

    def ordered(values: Tensor) -> Tensor:
        return values.contiguous() if order is None else values[order]

    def maybe(values: Tensor | None) -> Tensor | None:
        return None if values is None else ordered(values)

    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    if not _factors_wait(options, old_logp):
        base = torch.zeros(size, device=device, dtype=torch.float32) if old_logp is None else old_logp.float()
        factors = token_factors(base, completions, keep, boundaries.diff(), known.counts, options)
    bonus = None
    if options.entropy_coef > 0:
        weights = token_weights(known.counts, completions.counted(), options, torch.float32)
        bonus = ordered(-options.entropy_coef * weights.repeat_interleave(boundaries.diff(), output_size=size))
    rows = _Rows(
        head_hidden if order is None else head_hidden[order],
        head_weight,
        bias,
        ordered(labels),
        ordered(inverse(temperature, labels)),
        softcap,
        completions._replace(
            old_logp=maybe(old_logp),
            ref_logp=maybe(completions.ref_logp),
            rollout_logp=maybe(completions.rollout_logp),
            token_weight=maybe(completions.token_weight),
            importance_weight=maybe(completions.importance_weight),
        ),
        bonus,
        (maybe(factors[0]), maybe(factors[1])),
        advantages.contiguous(),
        known.counts,
        known.counts.sum(),
        spans,
        live,
        any(known.zero),
        options,
    )
    logp, entropy, coefficient = (torch.zeros(kept, dtype=torch.float32, device=device) for _ in range(3))
    d_entropy = None if bonus is None else torch.zeros_like(coefficient)
    own = inputs.gradient_dtypes[0] == head_hidden.dtype  # else fp32, to be rounded only once it is scaled
    gradients = HeadGradients(rows.hidden, head_weight, needs, head_hidden.dtype if own else torch.float32)
    norm = _norm(rows)
    sums = torch.zeros(3, dtype=torch.float32, device=device)
    if any(needs):
        _gradients(rows, gradients, norm, logp, entropy, coefficient, d_entropy, sums)
    else:
        logp, entropy, _ = statistics(rows.hidden, head_weight, rows.labels, bias, rows.scale, softcap=softcap)
        rows.add_terms(0, rows.segments([(0, kept)])[0], logp, entropy, coefficient, d_entropy, sums)
    with_gradient = _alive(coefficient, d_entropy).sum()
    d_hidden = gradients.d_hidden
    if order is not None:
        logp, entropy = (v.new_zeros(size).index_copy_(0, order, v) for v in (logp, entropy))
        if d_hidden is not None:
            d_hidden = torch.zeros_like(head_hidden, dtype=d_hidden.dtype).index_copy_(0, order, d_hidden)
    share = rows.whole.clamp(min=1)
    return LinearResult(
        sums[0].clone(),
        logp,
        entropy,
        sums[1] / share,
        sums[2] / share,
        size - with_gradient,
        d_hidden,
        gradients.d_weight,
        gradients.d_bias,
        norm,
    )


def _order(keep: Tensor, dead: Tensor, boundaries: Tensor, kept: int) -> Tensor:
    """The kept rows as int64 [kept]: first those that may have a gradient, then those of dead completions."""
    dead_row = dead.repeat_interleave(boundaries.diff(), output_size=len(keep))
    last = torch.where(keep, dead_row.long(), 2)
    return last.sort(stable=True).indices[:kept]  # unlike nonzero, of a size that is known


def _gradients(
    rows: _Rows,
    gradients: HeadGradients,
    norm: Tensor,
    logp: Tensor,
    entropy: Tensor,
    coefficient: Tensor,
    d_entropy: Tensor | None,
    sums: Tensor,
) -> None:
    """Fill in logp, entropy, coefficient and d_entropy [n], and add to sums and gradients."""
    vocabulary, options = len(rows.weight), rows.options
    spare = slice(rows.live, len(logp))
    if len(logp) > rows.live:
        logp[spare], entropy[spare], _ = statistics(
            rows.hidden[spare], rows.weight, rows.labels[spare], rows.bias, rows.scale[spare], softcap=rows.softcap
        )
    chunks = list(_chunks(rows))
    # Else a coefficient is 0 only by chance, and the size of the products need not be read.
    bounds = (options.clip_low, options.clip_high, options.delta, options.clip_dual)
    clipped = rows.given.old_logp is not None and any(bound is not None for bound in bounds)
    masked = options.importance_correction != "none" and options.correction_mode == "mask"
    weighted = masked or rows.given.token_weight is not None or rows.given.importance_weight is not None
    may_vanish = weighted or (d_entropy is None and (clipped or (options.beta > 0 and rows.some_zero)))
    parts = [(low, high) if known is None else known for low, high, known in chunks]
    buffer = logits_buffer(max((high - low for low, high, _ in chunks), default=0), vocabulary, logp.device)
    for (low, high, known), (first, stop), segments in zip(chunks, parts, rows.segments(parts), strict=True):
        part, whole = slice(low, high), slice(first, stop)
        x, y, scale = rows.hidden[part], rows.labels[part, None], rows.scale[part]
        logits = product(x, rows.weight.T, narrow_rows(buffer, high - low, vocabulary, torch.float32))
        chosen, softmax = row_statistics(logits, y, rows.bias, scale, entropy=True, softcap=rows.softcap)
        if known is None:
            logp[part], entropy[part] = chosen[:, 0], softmax.entropy
        elif low == first:  # the first chunk of a completion that no chunk can hold: all of its log-probs first
            logp[whole], entropy[whole], _ = statistics(
                rows.hidden[whole], rows.weight, rows.labels[whole], rows.bias, rows.scale[whole], softcap=rows.softcap
            )
        if low == first:
            own = None if d_entropy is None else d_entropy[whole]
            rows.add_terms(first, segments, logp[whole], entropy[whole], coefficient[whole], own, sums)
        by_entropy = None if d_entropy is None else d_entropy[part]
        source = _live_first(_alive(coefficient[part], by_entropy)) if may_vanish else None
        count = high - low if source is None else len(source)
        d_logits = narrow_rows(buffer, count, vocabulary, x.dtype)
        gradient = (coefficient[part] / norm)[:, None]
        spread = None if by_entropy is None else by_entropy / norm
        row_gradient(
            logits,
            d_logits,
            y,
            rows.bias,
            scale,
            softmax,
            gradient,
            grad_entropy=spread,
            source=source,
            softcap=rows.softcap,
        )
        if count:
            gradients.add(part if source is None else source + low, x if source is None else x[source], d_logits)


def _spans(tokens: list[int], dead: list[bool]) -> tuple[list[tuple[int, int, int]], int]:
    """The spans of :class:`_Rows`, without empty completions, and the number of rows that may have a gradient."""
    spans: list[tuple[int, int, int]] = []
    at = live = 0
    for wanted in (False, True):
        for s, count in enumerate(tokens):
            if dead[s] == wanted and count:
                spans.append((at, at + count, s))
                at += count
        live = live if wanted else at
    return spans, live


def _chunks(rows: _Rows) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
    """The rows that may have a gradient, as (first, stop, completion) with completion None where not said below.

    A sequence ratio depends on the log-probs of a whole completion, so chunks then end where completions end. A
    completion longer than a chunk comes in several, each with the completion's own (first, stop).
    """
    options = rows.options
    ratio = options.importance_level == "sequence" and (rows.given.old_logp is not None or options.kl_by_ratio)
    whole = options.importance_correction == "sequence" or options.loss_type == "vespo"
    correction = whole and _factors_wait(options, rows.given.old_logp)
    if not ratio and not correction:
        size = chunk_rows(rows.live, len(rows.weight))
        yield from ((low, min(low + size, rows.live), None) for low in range(0, rows.live, size))
        return
    most = most_rows(len(rows.weight))
    start = 0
    for low, high, _ in rows.spans:
        if low >= rows.live:
            break
        if high - start > most and low > start:
            yield start, low, None
            start = low
        if high - low > most:
            size = chunk_rows(high - low, len(rows.weight))
            yield from ((at, min(at + size, high), (low, high)) for at in range(low, high, size))
            start = high
    if start < rows.live:
        yield start, rows.live, None


def _alive(coefficient: Tensor, d_entropy: Tensor | None) -> Tensor:
    alive = coefficient != 0
    return alive if d_entropy is None else alive | (d_entropy != 0)


def _live_first(alive: Tensor) -> Tensor:
    """The k rows that are alive, as source [k]: those below k in their own places, the others in the gaps.

    So the gradient of row source[i] can be written over row i while other rows are still being read.
    """
    index = alive.nonzero()[:, 0]
    head = alive[: len(index)]
    gap = (~head).long().cumsum(0) - 1
    moved = (head.sum() + gap).clamp(0, max(len(index) - 1, 0))
    return torch.where(head, torch.arange(len(index), device=index.device), index[moved])


def _norm(rows: _Rows) -> Tensor:
    """The number to divide the coefficients by while they are in fp16, which would lose those below 6e-8."""
    one = torch.ones((), dtype=torch.float32, device=rows.hidden.device)
    if rows.hidden.dtype != torch.float16 or not rows.spans:
        return one
    options, completions = rows.options, rows.given.counted()
    shortest = torch.where(rows.tokens > 0, rows.tokens, rows.whole).min()
    divisor = {  # the smallest by which a token's term is divided
        "completion": shortest * completions,
        "completions": completions,
        "call": rows.whole,
        "length": completions * (options.max_completion_length or 0),
        "num_tokens": options.num_tokens or 0,
    }[options.divisor]
    largest = rows.advantages.float().abs().max().clamp(min=max(1.0, options.entropy_coef))
    if options.importance_correction != "none" and options.correction_max is not None:
        largest = largest * max(options.correction_max, 1.0)
    for weight in (rows.given.token_weight, rows.given.importance_weight):
        if weight is not None:
            largest = largest * weight.float().abs().max()
    return power_of_two(largest / divisor)
