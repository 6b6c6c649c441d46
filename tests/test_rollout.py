"""The sampler on the tiny model: where answers end, what their log-probs mean, and what a call leaves untouched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_model import hf_inputs
from tiny import make_lm, make_media, make_model, make_prompt
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout import Request, Sampler
from videor1.sampling import SamplingOptions
from videor1.types import Completion, Prompt

VIDEO = make_prompt(make_media("video", (3, 4, 4), seed=1), draw=1)
IMAGE = make_prompt(make_media("image", (1, 4, 8), seed=2), "What is this?", draw=2)
TEXT = make_prompt(None, "Two and two?", draw=3)


def request(model: VideoLM, prompt: Prompt, count: int = 4, seed: int = 0) -> Request:
    with model.inference():
        features = model.vision_features([prompt.media])[0] if prompt.media else None
    return Request(prompt, features, count, seed, ("ordered", prompt.draw))


def rig(model: VideoLM, token: int, gain: float) -> None:
    """Raise a token's logit by about ``gain``, whatever the text before it.

    The last norm's output has a constant component after this: its weight is 0 in one dimension for all tokens but
    ``token``, and a hook sets that dimension to 1.
    """
    head = model.hf.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied from the embeddings
    with torch.no_grad():
        head.weight[:, 0] = 0.0
        head.weight[token, 0] = gain

    def constant(_module: object, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., 0] = 1.0
        return output

    model.hf.model.language_model.norm.register_forward_hook(constant)


def plain_logp(model: VideoLM, prompt: Prompt, ids: Tensor, temperature: float) -> Tensor:
    """Log-probs of ``ids`` from transformers' own forward, nothing truncated."""
    plain = make_model()
    plain.load_state_dict(model.hf.state_dict())
    with torch.no_grad():
        logits = plain(**hf_inputs(model, prompt, ids), use_cache=False).logits[0]
    rows = (logits[len(prompt.input_ids) - 1 : -1].double() / temperature).log_softmax(-1)
    return rows.gather(-1, ids[:, None])[:, 0]


@pytest.mark.parametrize("name", ["eos", "pad"])
def test_an_answer_ends_with_its_first_stop_token(name: str) -> None:
    model = make_lm()
    stop = getattr(model.special, name)
    rig(model, stop, 6.0)
    answers = Sampler(model).generate([request(model, VIDEO, 24), request(model, TEXT, 8)], SamplingOptions(10))
    completions = [c for group in answers for c in group]
    assert [len(group) for group in answers] == [24, 8]
    for completion in completions:
        stopped = torch.isin(completion.token_ids, torch.tensor([model.special.eos, model.special.pad]))
        assert not stopped[:-1].any()
        assert completion.finished == bool(stopped[-1])
        assert completion.finished or len(completion.token_ids) == 10
        assert len(completion.logp) == len(completion.token_ids)
    lengths = {len(c.token_ids) for c in completions if c.finished}
    assert len(lengths) >= 3  # rows end at different steps
    assert any(not c.finished for c in completions)
    assert sum(c.token_ids[-1] == stop for c in completions) >= 16
    # The text leaves the stop token out.
    assert not any("<|" in c.text for c in completions)


def test_a_row_goes_on_as_if_others_had_not_ended() -> None:
    model = make_lm()
    rig(model, model.special.eos, 6.0)
    one = request(model, VIDEO, 12)
    short, long = (Sampler(model).generate([one], SamplingOptions(n))[0] for n in (3, 12))
    for a, b in zip(short, long, strict=True):
        assert a.token_ids.tolist() == b.token_ids[:3].tolist()
        assert a.finished == (b.finished and len(b.token_ids) <= 3)


def test_the_text_is_the_decoded_answer_without_special_tokens() -> None:
    model = make_lm()
    (group,) = Sampler(model).generate([request(model, TEXT)], SamplingOptions(12))
    for c in group:
        assert c.text == model.tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True)


def test_one_new_token() -> None:
    model = make_lm()
    (group,) = Sampler(model).generate([request(model, IMAGE, 5)], SamplingOptions(1))
    assert [len(c.token_ids) for c in group] == [1] * 5
    assert not any(c.finished for c in group)


@pytest.mark.parametrize("prompt", [VIDEO, IMAGE, TEXT], ids=["video", "image", "text"])
def test_logp_is_of_the_untruncated_distribution_at_the_temperature(prompt: Prompt) -> None:
    model = make_lm()
    for temperature, top_p, top_k in ((1.0, 0.5, 0), (0.7, 1.0, 3)):
        options = SamplingOptions(9, temperature=temperature, top_p=top_p, top_k=top_k)
        (group,) = Sampler(model).generate([request(model, prompt, 2)], options)
        for c in group:
            assert c.logp.dtype == torch.float32
            expected = plain_logp(model, prompt, c.token_ids, temperature)
            assert (c.logp - expected).abs().max() <= 1e-5


def test_greedy_logp_is_at_temperature_one() -> None:
    model = make_lm()
    ((c,),) = Sampler(model).generate([request(model, TEXT, 1)], SamplingOptions(6, temperature=0.0))
    assert (c.logp - plain_logp(model, TEXT, c.token_ids, 1.0)).abs().max() <= 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_tokens_are_never_sampled(temperature: float) -> None:
    model = make_lm()
    for token in model.special.vision:
        rigged = make_lm()
        rig(rigged, token, 60.0)
        assert int(plain_argmax(rigged)) == token
        (group,) = Sampler(rigged).generate([request(rigged, VIDEO, 3)], SamplingOptions(4, temperature=temperature))
        drawn = torch.cat([c.token_ids for c in group])
        assert not torch.isin(drawn, torch.tensor(model.special.vision)).any()
        # Banning a token does not change the distribution that log-probs are of.
        assert torch.cat([c.logp for c in group]).max() < -10


def plain_argmax(model: VideoLM) -> Tensor:
    """The token that the model itself likes best after a prompt."""
    seen: list[Tensor] = []
    handle = model.hf.model.language_model.register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
    Sampler(model).generate([request(model, TEXT, 1)], SamplingOptions(1))
    handle.remove()
    return (seen[0][0, -1] @ model.head_weight.T).argmax()


def tokens(answers: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids.tolist() for c in group] for group in answers]


def test_the_size_of_a_batch_does_not_show() -> None:
    model = make_lm()
    requests = [request(model, p, n) for p, n in ((VIDEO, 3), (TEXT, 1), (IMAGE, 4), (VIDEO, 2))]
    requests[3] = dataclasses.replace(requests[3], names=("shuffled", 1))
    options = SamplingOptions(8, top_p=0.95)
    together = Sampler(model, max_rows=64).generate(requests, options)
    assert [len(group) for group in together] == [3, 1, 4, 2]
    for max_rows in (1, 4, 5, 10):
        split = Sampler(model, max_rows=max_rows).generate(requests, options)
        assert tokens(split) == tokens(together), max_rows
        for a, b in zip([c for g in split for c in g], [c for g in together for c in g], strict=True):
            assert (a.logp - b.logp).abs().max() <= 1e-5
    # Another name or another seed is another stream of random numbers.
    assert tokens(together)[3] != tokens(together)[0][:2]
    other = Sampler(model).generate([request(model, VIDEO, 3, seed=1)], options)
    assert tokens(other)[0] != tokens(together)[0]


def test_more_answers_leave_the_first_ones_as_they_were() -> None:
    model = make_lm()
    few, many = (Sampler(model).generate([request(model, IMAGE, n)], SamplingOptions(8))[0] for n in (1, 5))
    assert few[0].token_ids.tolist() == many[0].token_ids.tolist()


def test_batches_are_no_larger_than_max_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = make_lm(), []
    sampler = Sampler(model, max_rows=5)
    generate = sampler._generate

    def noted(batch: list[Request], options: SamplingOptions) -> list[list[Completion]]:
        sizes.append([r.count for r in batch])
        return generate(batch, options)

    monkeypatch.setattr(sampler, "_generate", noted)
    requests = [request(model, TEXT, n) for n in (2, 3, 1, 7, 4, 1)]
    sampler.generate(requests, SamplingOptions(2))
    assert sizes == [[2, 3], [1], [7], [4, 1]]  # a request is never split


def test_no_request_no_answer() -> None:
    assert Sampler(make_lm()).generate([], SamplingOptions(4)) == []


def test_weights_changed_between_calls_take_effect() -> None:
    model = make_lm()
    sampler, one = Sampler(model), request(model, TEXT, 4)
    options = SamplingOptions(6, temperature=0.0)
    before = sampler.generate([one], options)
    weights = {id(p): p for p in model.hf.parameters()}
    with torch.no_grad():
        model.hf.model.language_model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    after = sampler.generate([one], options)
    assert tokens(after) != tokens(before)
    fresh = make_lm()
    fresh.hf.load_state_dict(model.hf.state_dict())
    assert tokens(Sampler(fresh).generate([one], options)) == tokens(after)
    assert {id(p) for p in model.hf.parameters()} == set(weights)


def test_a_call_leaves_the_model_as_it_was() -> None:
    model = make_lm()
    for training in (True, False):
        model.hf.train(training)
        (group,) = Sampler(model).generate([request(model, VIDEO, 2)], SamplingOptions(3))
        assert model.hf.training is training
        assert all(module.training is training for module in model.hf.modules())
        assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())
        assert torch.is_grad_enabled()
        assert not any(c.logp.requires_grad for c in group)


def test_a_call_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lm()
    model.hf.train()
    monkeypatch.setattr("videor1.rollout.sample_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Sampler(model).generate([request(model, TEXT)], SamplingOptions(2))
    assert model.hf.training
    assert torch.is_grad_enabled()


def test_global_random_numbers_are_neither_used_nor_moved() -> None:
    model = make_lm()
    options = SamplingOptions(8)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(tokens(Sampler(model).generate([request(model, TEXT, 3)], options)))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]


def test_features_that_do_not_fit_the_prompt_are_a_bug_found() -> None:
    model = make_lm()
    bad = dataclasses.replace(request(model, VIDEO), features=torch.zeros(3, 64))
    with pytest.raises(AssertionError):
        Sampler(model).generate([bad], SamplingOptions(2))
