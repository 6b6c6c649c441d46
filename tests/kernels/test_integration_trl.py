"""The TRL integration: the numbers of the installed TRL on the same inputs, and a GRPOTrainer run with and without."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as host
from datasets import Dataset
from hosts import positional, set_version
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from videor1_kernels import dispatch
from videor1_kernels.integrations.trl import FusedHead, selective_log_softmax, use
from videor1_kernels.testing import rounding

V = 23
THEIR_SOFTMAX, THEIR_HEAD = host.selective_log_softmax, host._ChunkedLogProbFunction


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, V, generator=torch.Generator().manual_seed(0))).to(dtype)


def softmax_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, index: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    logp = function(logits, index, **options)
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return logp, torch.autograd.grad((logp * weights).sum(), logits)[0]


@pytest.mark.grid(
    rows=[(5,), (3, 4), (2, 1, 3)],
    picked=[None, 1, 4],
    temperature=[0.3, 1.0, 2.0],
    mask=[None, torch.bool, torch.int64],
    dtype=[torch.float32, torch.float64],
)
def test_same_numbers(
    rows: tuple[int, ...], picked: int | None, temperature: float, mask: torch.dtype | None, dtype: torch.dtype
) -> None:
    logits = make_logits(rows, dtype)
    index = torch.randint(V, rows if picked is None else (*rows, picked))
    row_mask = None if mask is None else (torch.rand(index.shape) > 0.4).to(mask)
    options = {"temperature": temperature, "row_mask": row_mask}
    ours, our_grad = softmax_and_gradient(selective_log_softmax, logits, index, **options)
    theirs, their_grad = softmax_and_gradient(THEIR_SOFTMAX, logits, index, **options)
    assert ours.dtype == theirs.dtype == dtype
    bound = rounding(V, logits.abs().max().item() / temperature, dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
    # A probability errs by as much relative to itself; up to 4 picks of a row add up, weighed by 2 or 3 each.
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=4 * 3 / temperature * bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_fp32(dtype: torch.dtype) -> None:
    logits, index = make_logits((3, 4), dtype), torch.randint(V, (3, 4))
    ours, grad = softmax_and_gradient(selective_log_softmax, logits, index)
    assert (ours.dtype, grad.dtype) == (torch.float32, dtype)
    exact = THEIR_SOFTMAX(logits.float(), index)
    torch.testing.assert_close(ours, exact, rtol=0, atol=rounding(V, logits.abs().max().item()))
    with use(match_dtype=True):
        for row_mask in (None, torch.ones(3, 4)):
            matched, theirs = (f(logits, index, 0.7, row_mask) for f in (host.selective_log_softmax, THEIR_SOFTMAX))
            assert matched.dtype == theirs.dtype == dtype
            wide = selective_log_softmax(logits, index, 0.7, row_mask)
            assert torch.equal(matched, wide.to(dtype))


def test_what_an_index_may_be() -> None:
    """int32, and anything where it is masked: no gradient flows there."""
    logits, index = make_logits((2, 3)), torch.randint(V, (2, 3))
    assert torch.equal(selective_log_softmax(logits, index.int()), selective_log_softmax(logits, index))
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    logp, grad = softmax_and_gradient(selective_log_softmax, logits, index.masked_fill(mask == 0, -100), row_mask=mask)
    assert torch.equal(logp == 0, mask == 0)
    assert torch.equal(grad.abs().sum(-1) == 0, mask == 0)
    with pytest.raises(ValueError, match=r"row_mask: expected shape \[2, 3\], got \[2, 3, 1\]"):
        selective_log_softmax(logits, index, row_mask=torch.ones(2, 3, 1))


def test_what_a_call_takes_is_that_of_the_installed_trl() -> None:
    assert positional(selective_log_softmax) == positional(THEIR_SOFTMAX)
    for function in (selective_log_softmax, THEIR_SOFTMAX):
        for temperature in (0.0, -1.0):
            with pytest.raises(ValueError, match="temperature"):
                function(make_logits((4,)), torch.randint(V, (4,)), temperature=temperature)


def make_head(with_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(9, 16, generator=g), torch.randn(V, 16, generator=g)
    return hidden, weight, torch.randn(V, generator=g) if with_bias else None, torch.randint(V, (9,), generator=g)


def head_and_gradients(
    head: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *args: Any
) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    results = head.apply(leaves[0], leaves[1], leaves[2] if bias is not None else None, targets, *args)
    logp, entropy = results[:2]
    total = (logp * torch.linspace(-1, 1, 9)).sum()
    if entropy is not None:
        total = total + (entropy * torch.linspace(2, -1, 9)).sum()
    return results, torch.autograd.grad(total, leaves)


@pytest.mark.grid(
    scaled=[(1.0, 1.0), (0.7, 1.0), (0.9, 0.25)],
    with_bias=[True, False],
    softcap=[None, 2.5],
    outputs=[("log_probs",), ("log_probs", "entropy")],
)
def test_head_gives_the_same_numbers(
    scaled: tuple[float, float], with_bias: bool, softcap: float | None, outputs: tuple[str, ...]
) -> None:
    temperature, scale = scaled
    inputs = (*make_head(with_bias), temperature, 8, softcap, scale, outputs)
    (ours, our_grads), (theirs, their_grads) = (head_and_gradients(h, *inputs) for h in (FusedHead(), THEIR_HEAD))
    assert len(ours) == len(theirs) == 5
    hidden, weight, bias = inputs[:3]
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    largest = logits.abs().max().item() / temperature
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=rounding(16 + V, largest))
    for mine, other in zip(our_grads, their_grads, strict=True):
        # The probabilities in it err by the logits' own error relative to themselves.
        bound = rounding(16 + V + 9, max(1.0, largest) * other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=0, atol=bound)


def test_head_under_autocast_takes_its_dtype() -> None:
    hidden, weight, bias, targets = make_head()
    rounded = [x.bfloat16() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        (logp, *_), grads = head_and_gradients(FusedHead(), hidden, weight, bias, targets, 1.0, 8)
    (wanted, *_), _ = head_and_gradients(FusedHead(), *rounded, targets, 1.0, 8)
    assert torch.equal(logp, wanted)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_head_refuses_what_it_does_not_compute() -> None:
    hidden, weight, bias, targets = make_head()
    for args, message in (
        ((-3.0, 1.0, ("log_probs",)), r"softcap: expected a finite number above 0.*got -3\.0"),
        ((None, 1.0, ("log_probs", "is_top1")), r"outputs: expected of log_probs, entropy .*\['is_top1'\]"),
        ((None, 0.0, ("log_probs",)), "logit_scale: expected a finite number above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedHead().apply(hidden, weight, bias, targets, 1.0, 8, *args)
    weight.ds_id = 0  # as DeepSpeed marks a partitioned weight
    with pytest.raises(ValueError, match="ZeRO-3 train without use"):
        FusedHead().apply(hidden, weight, bias, targets, 1.0, 8)


def swapped() -> tuple[bool, bool]:
    return host.selective_log_softmax is not THEIR_SOFTMAX, host._ChunkedLogProbFunction is not THEIR_HEAD


def test_use_lasts_for_its_block_or_until_closed() -> None:
    with use():
        assert swapped() == (True, True)
    assert swapped() == (False, False)
    handle = use()
    assert swapped() == (True, True)
    handle.close()
    assert swapped() == (False, False)


def test_use_reaches_modules_that_imported_the_name_before_and_during(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during, outside = (types.ModuleType(name) for name in ("trl.a", "trl.b", "other.c"))
    before.selective_log_softmax = outside.selective_log_softmax = THEIR_SOFTMAX
    for module in (before, during, outside):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with use():
        assert before.selective_log_softmax is host.selective_log_softmax is not THEIR_SOFTMAX
        assert outside.selective_log_softmax is THEIR_SOFTMAX
        during.selective_log_softmax = host.selective_log_softmax
    assert before.selective_log_softmax is during.selective_log_softmax is THEIR_SOFTMAX


def test_use_within_use_hands_its_backend_on() -> None:
    logits, index = make_logits((4,)), torch.randint(V, (4,))
    with use():
        with use(backend="no-such-backend"):
            with pytest.raises(ValueError, match="no-such-backend"):
                host.selective_log_softmax(logits, index)
            with pytest.raises(ValueError, match="no-such-backend"):
                host._ChunkedLogProbFunction.apply(*make_head(), 1.0, 8)
        host.selective_log_softmax(logits, index)
    assert swapped() == (False, False)


def test_use_names_the_version_and_what_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    set_version(monkeypatch, "9.8.7")
    monkeypatch.delattr(host, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match=r"trl 9\.8\.7 has no trl\.trainer\.utils\._ChunkedLogProbFunction"):
        use()
    assert host.selective_log_softmax is THEIR_SOFTMAX  # nothing is half done
    monkeypatch.setattr(host, "selective_log_softmax", lambda logits, index: None)
    with pytest.raises(ImportError, match=r"of trl 9\.8\.7 takes \(logits, index\), expected \(logits, index, temp"):
        use()


def test_use_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", missing)
    with pytest.raises(ImportError, match="needs trl, which is not installed: pip install trl"):
        use()


def save_model(folder: Path) -> PreTrainedTokenizerFast:
    """A tiny model in ``folder``; -> its tokenizer."""
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = Qwen2Config(**sizes, **heads, **special, initializer_range=0.3)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, V)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def train(folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, GRPOTrainer]:
    """Two steps of GRPO with a KL term and an entropy bonus; -> what TRL logged, and the trainer."""
    options = {"beta": 0.1, "temperature": 0.8, "num_iterations": 2, "entropy_coef": 0.1, "loss_type": "grpo"}
    options |= {"importance_sampling_level": "sequence", "learning_rate": 0.02, "max_steps": 2, "num_generations": 4}
    options |= {
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
    }
    options |= {"optim": "sgd"}  # Adam would divide rounding differences by gradients near zero
    quiet = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [math.sin(len(set(text.split())) + len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3 w4", "w5 w6", "w7", "w8 w9 w3"]}),
        processing_class=tokenizer,
        args=GRPOConfig(output_dir=str(folder / "run"), **options, **quiet),
    )
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "kl")
    logs = [[entry[n] for n in names if n in entry] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(logs, dtype=torch.float64), trainer


def test_grpo_trainer_takes_the_same_steps(tmp_path: Path) -> None:
    tokenizer = save_model(tmp_path)
    theirs, their_trainer = train(tmp_path, tokenizer)
    calls = []
    with use() as handle:
        head = host._ChunkedLogProbFunction
        apply = head.apply
        head.apply = lambda *args: calls.append(1) or apply(*args)
        ours, our_trainer = train(tmp_path, tokenizer)
        handle.close()
    assert len(calls) >= 2
    assert dispatch.last_backend("linear_logprob") is not None
    assert ours.shape[0] == 2
    assert ours[:, 1].min() > 0.01  # there was a gradient
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    for mine, other in zip(our_trainer.model.parameters(), their_trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)
