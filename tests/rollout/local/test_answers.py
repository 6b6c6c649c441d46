"""The in-process engine on the tiny model: where answers end, what log-probs mean, what a call leaves untouched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rollouts import answer, ask
from tiny import hf_inputs, log_prob_rounding, make_lm, make_media, make_model, make_prompt
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout import LocalEngine, Request, SamplingOptions
from videor1.types import Completion, Prompt

VIDEO = make_prompt(make_media("video", (3, 4, 4), seed=1), draw=1)
IMAGE = make_prompt(make_media("image", (1, 4, 8), seed=2), "What is this?", draw=2)
TEXT = make_prompt(None, "Two and two?", draw=3)


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
    rig(model, stop, 5.0)
    answers = answer(model, [ask(model, VIDEO, 24), ask(model, TEXT, 8)], SamplingOptions(10))
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
    one = ask(model, VIDEO, 12)
    short, long = (answer(model, [one], SamplingOptions(n))[0] for n in (3, 12))
    for a, b in zip(short, long, strict=True):
        assert a.token_ids.tolist() == b.token_ids[:3].tolist()
        assert a.finished == (b.finished and len(b.token_ids) <= 3)


def test_the_text_is_the_decoded_answer_without_special_tokens() -> None:
    model = make_lm()
    (group,) = answer(model, [ask(model, TEXT)], SamplingOptions(12))
    for c in group:
        assert c.text == model.tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True)


def test_one_new_token() -> None:
    model = make_lm()
    (group,) = answer(model, [ask(model, IMAGE, 5)], SamplingOptions(1))
    assert [len(c.token_ids) for c in group] == [1] * 5
    assert not any(c.finished for c in group)


@pytest.mark.parametrize("prompt", [VIDEO, IMAGE, TEXT], ids=["video", "image", "text"])
def test_logp_is_of_the_untruncated_distribution_at_the_temperature(prompt: Prompt) -> None:
    model = make_lm(position_rule="transformers")
    for temperature, top_p, top_k in ((1.0, 0.5, 0), (0.7, 1.0, 3)):
        options = SamplingOptions(9, temperature=temperature, top_p=top_p, top_k=top_k)
        (group,) = answer(model, [ask(model, prompt, 2)], options)
        for c in group:
            assert c.logp.dtype == torch.float32
            expected = plain_logp(model, prompt, c.token_ids, temperature)
            assert (c.logp - expected).abs().max() <= log_prob_rounding(expected)


def test_greedy_logp_is_at_temperature_one() -> None:
    model = make_lm(position_rule="transformers")
    ((c,),) = answer(model, [ask(model, TEXT, 1)], SamplingOptions(6, temperature=0.0))
    expected = plain_logp(model, TEXT, c.token_ids, 1.0)
    assert (c.logp - expected).abs().max() <= log_prob_rounding(expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_tokens_are_never_sampled(temperature: float) -> None:
    model = make_lm()
    for token in model.special.vision:
        rigged = make_lm()
        rig(rigged, token, 60.0)
        assert int(plain_argmax(rigged)) == token
        (group,) = answer(rigged, [ask(rigged, VIDEO, 3)], SamplingOptions(4, temperature=temperature))
        drawn = torch.cat([c.token_ids for c in group])
        assert not torch.isin(drawn, torch.tensor(model.special.vision)).any()
        # Banning a token does not change the distribution that log-probs are of.
        assert torch.cat([c.logp for c in group]).max() < -10


def plain_argmax(model: VideoLM) -> Tensor:
    """The token that the model itself likes best after a prompt."""
    seen: list[Tensor] = []
    handle = model.hf.model.language_model.register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
    answer(model, [ask(model, TEXT, 1)], SamplingOptions(1))
    handle.remove()
    return (seen[0][0, -1] @ model.head_weight.T).argmax()


def tokens(answers: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids.tolist() for c in group] for group in answers]


def test_the_size_of_a_batch_does_not_show() -> None:
    model = make_lm()
    requests = [ask(model, p, n) for p, n in ((VIDEO, 3), (TEXT, 1), (IMAGE, 4), (VIDEO, 2))]
    requests[3] = ask(model, VIDEO, 2, names=("shuffled", 1))
    options = SamplingOptions(8, top_p=0.95)
    together = answer(model, requests, options, max_rows=64)
    assert [len(group) for group in together] == [3, 1, 4, 2]
    for max_rows in (1, 4, 5, 10):
        split = answer(model, requests, options, max_rows=max_rows)
        assert tokens(split) == tokens(together), max_rows
        for a, b in zip([c for g in split for c in g], [c for g in together for c in g], strict=True):
            assert (a.logp - b.logp).abs().max() <= log_prob_rounding(a.logp)
    # Another name or another seed is another stream of random numbers.
    assert tokens(together)[3] != tokens(together)[0][:2]
    other = answer(model, [ask(model, VIDEO, 3, seed=1)], options)
    assert tokens(other)[0] != tokens(together)[0]


def test_more_answers_leave_the_first_ones_as_they_were() -> None:
    model = make_lm()
    few, many = (answer(model, [ask(model, IMAGE, n)], SamplingOptions(8))[0] for n in (1, 5))
    assert few[0].token_ids.tolist() == many[0].token_ids.tolist()


def greedy(engine: LocalEngine, request: Request) -> list[list[int]]:
    (group,) = engine.generate([request]).groups
    assert group is not None
    return [c.token_ids.tolist() for c in group.ordered]


def test_weights_changed_between_calls_take_effect() -> None:
    model = make_lm()
    one, options = ask(model, TEXT, 4), SamplingOptions(6, temperature=0.0)
    engine = LocalEngine(model, options)
    before = greedy(engine, one)
    weights = {id(p): p for p in model.hf.parameters()}
    with torch.no_grad():
        model.hf.model.language_model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    engine.weights_changed()
    after = greedy(engine, one)
    assert after != before
    fresh = make_lm()
    fresh.hf.load_state_dict(model.hf.state_dict())
    assert greedy(LocalEngine(fresh, options), one) == after
    assert {id(p) for p in model.hf.parameters()} == set(weights)


def test_a_call_leaves_the_model_as_it_was() -> None:
    model = make_lm()
    for training in (True, False):
        model.hf.train(training)
        (group,) = answer(model, [ask(model, VIDEO, 2)], SamplingOptions(3))
        assert model.hf.training is training
        assert all(module.training is training for module in model.hf.modules())
        assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())
        assert torch.is_grad_enabled()
        assert not any(c.logp.requires_grad for c in group)


def test_a_call_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lm()
    model.hf.train()
    monkeypatch.setattr("videor1.rollout.local.step.DecodeStep.draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(model, [ask(model, TEXT)], SamplingOptions(2))
    assert model.hf.training
    assert torch.is_grad_enabled()


def test_global_random_numbers_are_neither_used_nor_moved() -> None:
    model = make_lm()
    options = SamplingOptions(8)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(tokens(answer(model, [ask(model, TEXT, 3)], options)))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]


def test_features_that_do_not_fit_the_prompt_are_a_bug_found() -> None:
    model = make_lm()
    good = ask(model, VIDEO)
    bad = dataclasses.replace(good, ordered=dataclasses.replace(good.ordered, features=torch.zeros(3, 64)))
    with pytest.raises(AssertionError):
        answer(model, [bad], SamplingOptions(2))
