"""The TRL integration: the numbers of the installed TRL on the same inputs, and a GRPOTrainer run with and without."""

from __future__ import annotations

import inspect
import math
import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import trl.trainer.utils as host
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from videor1_kernels import dispatch
from videor1_kernels.integrations.trl import FusedHead, selective_log_softmax, use
from videor1_kernels.testing import rounding

V = 23
THEIR_SOFTMAX, THEIR_HEAD = host.selective_log_softmax, host._ChunkedLogProbFunction


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_logits(shape, dtype=torch.float32):
    return (3 * torch.randn(*shape, V, generator=torch.Generator().manual_seed(0))).to(dtype)


def softmax_and_gradient(function, logits, index, **options):
    logits = logits.clone().requires_grad_()
    logp = function(logits, index, **options)
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return logp, *torch.autograd.grad((logp * weights).sum(), logits)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("picked", [None, 1, 4])
@pytest.mark.parametrize("rows", [(5,), (3, 4), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_numbers(rows, picked, temperature, dtype):
    logits = make_logits(rows, dtype)
    index = torch.randint(V, rows if picked is None else (*rows, picked))
    for row_mask in (None, torch.rand(index.shape) > 0.4, (torch.rand(index.shape) > 0.4).long()):
        options = {"temperature": temperature, "row_mask": row_mask}
        ours, our_grad = softmax_and_gradient(selective_log_softmax, logits, index, **options)
        theirs, their_grad = softmax_and_gradient(THEIR_SOFTMAX, logits, index, **options)
        assert ours.dtype == theirs.dtype == dtype
        bound = rounding(V, logits.abs().max().item() / temperature, dtype)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
        # A probability errs by as much relative to itself; up to 4 picks of a row add up, weighed by 2 or 3 each.
        torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=4 * 3 / temperature * bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_fp32(dtype):
    logits, index = make_logits((3, 4), dtype), torch.randint(V, (3, 4))
    ours, grad = softmax_and_gradient(selective_log_softmax, logits, index)
    assert (ours.dtype, grad.dtype) == (torch.float32, dtype)
    exact = THEIR_SOFTMAX(logits.float(), index)
    torch.testing.assert_close(ours, exact, rtol=0, atol=rounding(V, logits.abs().max().item()))
    # TRL's own, off a GPU, works in the dtype of the logits: some of its roundings of numbers of up to the largest.
    error = 2 * torch.finfo(dtype).eps * max(logits.abs().max().item(), exact.abs().max().item())
    torch.testing.assert_close(THEIR_SOFTMAX(logits, index), exact.to(dtype), rtol=0, atol=error)


def test_masked_rows_may_hold_any_index_and_get_no_gradient():
    logits, index = make_logits((2, 3)), torch.randint(V, (2, 3))
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    logp, grad = softmax_and_gradient(selective_log_softmax, logits, index.masked_fill(mask == 0, -100), row_mask=mask)
    assert torch.equal(logp == 0, mask == 0)
    assert torch.equal(grad.abs().sum(-1) == 0, mask == 0)


def test_int32_index():
    logits, index = make_logits((4,)), torch.randint(V, (4,))
    assert torch.equal(selective_log_softmax(logits, index.int()), selective_log_softmax(logits, index))


def test_signature_is_that_of_the_installed_trl():
    ours = [p for p in inspect.signature(selective_log_softmax).parameters.values() if p.kind != p.KEYWORD_ONLY]
    theirs = inspect.signature(THEIR_SOFTMAX).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_is_positive_in_both(temperature):
    for function in (selective_log_softmax, THEIR_SOFTMAX):
        with pytest.raises(ValueError, match="temperature"):
            function(make_logits((4,)), torch.randint(V, (4,)), temperature=temperature)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"row_mask: expected shape \[4\], got \[4, 1\]"):
        selective_log_softmax(make_logits((4,)), torch.randint(V, (4,)), row_mask=torch.ones(4, 1))


def make_head(with_bias=True):
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(9, 16, generator=g), torch.randn(V, 16, generator=g)
    return hidden, weight, torch.randn(V, generator=g) if with_bias else None, torch.randint(V, (9,), generator=g)


def head_and_gradients(head, hidden, weight, bias, targets, *args):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    results = head.apply(leaves[0], leaves[1], leaves[2] if bias is not None else None, targets, *args)
    logp, entropy = results[:2]
    total = (logp * torch.linspace(-1, 1, 9)).sum()
    if entropy is not None:
        total = total + (entropy * torch.linspace(2, -1, 9)).sum()
    return results, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 1.0), (0.9, 0.25)])
def test_head_gives_the_same_numbers(temperature, scale, with_bias, outputs):
    inputs = (*make_head(with_bias), temperature, 8, None, scale, outputs)
    (ours, our_grads), (theirs, their_grads) = (head_and_gradients(h, *inputs) for h in (FusedHead(), THEIR_HEAD))
    assert len(ours) == len(theirs) == 5
    hidden, weight, bias = inputs[:3]
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    largest = logits.abs().max().item() / temperature
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            bound = rounding(16 + V, largest)
            torch.testing.assert_close(mine, other, rtol=0, atol=bound)
    for mine, other in zip(our_grads, their_grads, strict=True):
        # The probabilities in it err by the logits' own error relative to themselves.
        bound = rounding(16 + V + 9, max(1.0, largest) * other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=0, atol=bound)


def test_head_under_autocast_takes_its_dtype():
    hidden, weight, bias, targets = make_head()
    rounded = [x.bfloat16() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        (logp, *_), grads = head_and_gradients(FusedHead(), hidden, weight, bias, targets, 1.0, 8)
    (wanted, *_), _ = head_and_gradients(FusedHead(), *rounded, targets, 1.0, 8)
    assert torch.equal(logp, wanted)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((30.0, 1.0, ("log_probs",)), r"final_logit_softcapping: expected None .*got 30\.0"),
        ((None, 1.0, ("log_probs", "is_top1")), r"outputs: expected of log_probs, entropy .*\['is_top1'\]"),
        ((None, 0.0, ("log_probs",)), "logit_scale: expected a finite number above 0, got 0.0"),
    ],
)
def test_head_refuses_what_it_does_not_compute(args, message):
    with pytest.raises(ValueError, match=message):
        FusedHead().apply(*make_head(), 1.0, 8, *args)


def test_head_refuses_a_partitioned_weight():
    hidden, weight, bias, targets = make_head()
    weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 train without use"):
        FusedHead().apply(hidden, weight, bias, targets, 1.0, 8)


def swapped() -> tuple[bool, bool]:
    return host.selective_log_softmax is not THEIR_SOFTMAX, host._ChunkedLogProbFunction is not THEIR_HEAD


def test_use_lasts_for_its_block_or_until_closed():
    with use():
        assert swapped() == (True, True)
    assert swapped() == (False, False)
    handle = use()
    assert swapped() == (True, True)
    handle.close()
    assert swapped() == (False, False)


def test_use_reaches_modules_that_imported_the_name_before_and_during(monkeypatch):
    before, during, outside = (types.ModuleType(name) for name in ("trl.a", "trl.b", "other.c"))
    before.selective_log_softmax = outside.selective_log_softmax = THEIR_SOFTMAX
    for module in (before, during, outside):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with use():
        assert before.selective_log_softmax is host.selective_log_softmax is not THEIR_SOFTMAX
        assert outside.selective_log_softmax is THEIR_SOFTMAX
        during.selective_log_softmax = host.selective_log_softmax
    assert before.selective_log_softmax is during.selective_log_softmax is THEIR_SOFTMAX


def test_use_within_use():
    logits, index = make_logits((4,)), torch.randint(V, (4,))
    with use():
        with use(backend="no-such-backend"), pytest.raises(ValueError, match="no-such-backend"):
            host.selective_log_softmax(logits, index)
        host.selective_log_softmax(logits, index)
    assert swapped() == (False, False)


def test_use_hands_the_backend_on():
    with use(backend="no-such-backend"), pytest.raises(ValueError, match="no-such-backend"):
        host._ChunkedLogProbFunction.apply(*make_head(), 1.0, 8)


def test_use_names_the_version_and_what_it_misses(monkeypatch):
    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", lambda name: "9.8.7")
    monkeypatch.delattr(host, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match=r"trl 9\.8\.7 has no trl\.trainer\.utils\._ChunkedLogProbFunction"):
        use()
    assert host.selective_log_softmax is THEIR_SOFTMAX  # nothing is half done


def test_use_names_the_version_and_its_parameters(monkeypatch):
    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", lambda name: "9.8.7")
    monkeypatch.setattr(host, "selective_log_softmax", lambda logits, index: None)
    with pytest.raises(ImportError, match=r"of trl 9\.8\.7 takes \(logits, index\), expected \(logits, index, temp"):
        use()


def test_use_without_trl(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", missing)
    with pytest.raises(ImportError, match="needs trl, which is not installed: pip install trl"):
        use()


def save_model(folder):
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


def train(folder, tokenizer, **options):
    """Two steps of GRPO; -> what TRL logged, and the trainer."""
    sizes = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 20}
    quiet = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [math.sin(len(set(text.split())) + len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3 w4", "w5 w6", "w7", "w8 w9 w3"]}),
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(folder / "run"),
            **sizes,
            **quiet,
            learning_rate=0.02,
            use_cpu=True,
            bf16=False,
            seed=3,
            optim="sgd",  # Adam would divide rounding differences by gradients near zero
            **options,
        ),
    )
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "kl")
    logs = [[entry[n] for n in names if n in entry] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(logs, dtype=torch.float64), trainer


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "temperature": 0.8, "num_iterations": 2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "entropy_coef": 0.1},
    ],
    ids=["kl", "entropy-bonus"],
)
def test_grpo_trainer_takes_the_same_steps(options, tmp_path):
    tokenizer = save_model(tmp_path)
    theirs, their_trainer = train(tmp_path, tokenizer, **options)
    calls = []
    with use() as handle:
        head = host._ChunkedLogProbFunction
        apply = head.apply
        head.apply = lambda *args: calls.append(1) or apply(*args)
        ours, our_trainer = train(tmp_path, tokenizer, **options)
        handle.close()
    assert len(calls) >= 2
    assert dispatch.last_backend("linear_logprob") is not None
    assert ours.shape[0] == 2
    assert ours[:, 1].min() > 0.01  # there was a gradient
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    for mine, other in zip(our_trainer.model.parameters(), their_trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)
