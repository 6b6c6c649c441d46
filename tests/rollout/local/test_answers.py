"""The in-process engine on the tiny model: where answers end, what log-probs mean, what a call leaves untouched."""

import contextlib
import dataclasses

import pytest
import torch
from rollouts import IMAGE, TEXT, VIDEO, answer, ask, ending, rig, tokens
from tiny import hf_inputs, log_prob_rounding, make_lm, make_model
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout import LocalEngine, SamplingOptions
from videor1.types import Completion, Prompt


def assert_logp(model: VideoLM, prompt: Prompt, answered: Completion, temperature: float) -> None:
    """Log-probs are those of transformers' own forward, nothing truncated."""
    plain = make_model()
    plain.load_state_dict(model.hf.state_dict())
    ids = answered.token_ids
    with torch.no_grad():
        logits = plain(**hf_inputs(model, prompt, ids), use_cache=False).logits[0]
    rows = (logits[len(prompt.input_ids) - 1 : -1].double() / temperature).log_softmax(-1)
    expected = rows.gather(-1, ids[:, None])[:, 0]
    assert answered.logp.dtype == torch.float32
    assert (answered.logp - expected).abs().max() <= log_prob_rounding(expected)


@pytest.mark.parametrize("name", ["eos", "pad"])
def test_an_answer_ends_with_its_first_stop_token(name: str) -> None:
    model = make_lm()
    stop = getattr(model.special, name)
    rig(model, stop, 5.0)
    answers = answer(model, [ask(model, VIDEO, 24), ask(model, TEXT, 8)], SamplingOptions(10))
    assert [len(group) for group in answers] == [24, 8]
    completions = [c for group in answers for c in group]
    for c in completions:
        stopped = torch.isin(c.token_ids, torch.tensor([model.special.eos, model.special.pad]))
        assert not stopped[:-1].any()
        assert c.finished == bool(stopped[-1])
        assert c.finished or len(c.token_ids) == 10
        assert len(c.logp) == len(c.token_ids)
        assert c.text == model.tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True)
        assert "<|" not in c.text
    assert len({len(c.token_ids) for c in completions if c.finished}) >= 3  # rows end at different steps
    assert any(not c.finished for c in completions)
    assert sum(c.token_ids[-1] == stop for c in completions) >= 16


@pytest.mark.parametrize("prompt", [VIDEO, IMAGE, TEXT], ids=["video", "image", "text"])
def test_logp_is_of_the_untruncated_distribution_at_the_temperature(prompt: Prompt) -> None:
    model = make_lm(position_rule="transformers")
    for temperature, top_p, top_k in ((1.0, 0.5, 0), (0.7, 1.0, 3), (0.0, 1.0, 0)):
        options = SamplingOptions(9, temperature=temperature, top_p=top_p, top_k=top_k)
        for answered in answer(model, [ask(model, prompt, 2)], options)[0]:
            assert_logp(model, prompt, answered, temperature or 1.0)  # greedy: at temperature 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_tokens_are_never_sampled(temperature: float) -> None:
    for token in make_lm().special.vision:
        model = rig(make_lm(), token, 60.0)
        assert liked_best(model) == token
        (group,) = answer(model, [ask(model, VIDEO, 3)], SamplingOptions(4, temperature=temperature))
        drawn = torch.cat([c.token_ids for c in group])
        assert not torch.isin(drawn, torch.tensor(model.special.vision)).any()
        # Banning a token does not change the distribution that log-probs are of.
        assert torch.cat([c.logp for c in group]).max() < -10


def liked_best(model: VideoLM) -> int:
    """The token that the model itself would draw after a prompt."""
    seen: list[Tensor] = []
    handle = model.hf.model.language_model.register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
    answer(model, [ask(model, TEXT, 1)], SamplingOptions(1))
    handle.remove()
    return int((seen[0][0, -1] @ model.head_weight.T).argmax())


def test_the_size_of_a_batch_does_not_show() -> None:
    model = make_lm()
    requests = [ask(model, p, n) for p, n in ((VIDEO, 3), (TEXT, 1), (IMAGE, 4))]
    requests.append(ask(model, VIDEO, 2, names=("shuffled", 1)))
    options = SamplingOptions(8, top_p=0.95)
    together = answer(model, requests, options, max_rows=64)
    assert [len(group) for group in together] == [3, 1, 4, 2]
    for max_rows in (1, 4, 5, 10):
        assert tokens(answer(model, requests, options, max_rows=max_rows)) == tokens(together), max_rows
    # More answers leave the first ones as they were.
    assert tokens(answer(model, [ask(model, IMAGE, 1)], options))[0] == tokens(together)[2][:1]
    # Another name or another seed is another stream of random numbers.
    assert tokens(together)[3] != tokens(together)[0][:2]
    assert tokens(answer(model, [ask(model, VIDEO, 3, seed=1)], options))[0] != tokens(together)[0]
    # A row goes on as if others had not ended.
    model = ending(6.0)
    *shorter, long = (answer(model, [ask(model, VIDEO, 12)], SamplingOptions(n))[0] for n in (1, 3, 12))
    for limit, short in zip((1, 3), shorter, strict=True):
        for a, b in zip(short, long, strict=True):
            assert a.token_ids.tolist() == b.token_ids[:limit].tolist()
            assert a.finished == (b.finished and len(b.token_ids) <= limit)


def test_weights_changed_between_calls_take_effect() -> None:
    model = make_lm()
    requests, options = [ask(model, TEXT, 4)], SamplingOptions(6, temperature=0.0)
    engine = LocalEngine(model, options)

    def greedy(engine: LocalEngine) -> list[list[int]]:
        return tokens([group.ordered for group in engine.generate(requests).groups if group])[0]

    before, weights = greedy(engine), {id(p): p for p in model.hf.parameters()}
    with torch.no_grad():
        model.hf.model.language_model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    engine.weights_changed()
    after = greedy(engine)
    assert after != before
    fresh = make_lm()
    fresh.hf.load_state_dict(model.hf.state_dict())
    assert greedy(LocalEngine(fresh, options)) == after
    assert {id(p) for p in model.hf.parameters()} == set(weights)


def test_a_call_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    """Also one that fails."""
    model, results = make_lm(), []
    good = ask(model, VIDEO, 2)
    bad = dataclasses.replace(good, ordered=dataclasses.replace(good.ordered, features=torch.zeros(3, 64)))
    for training in (False, True):
        torch.manual_seed(int(training))
        state = torch.get_rng_state()
        model.hf.train(training)
        (group,) = answer(model, [good], SamplingOptions(8))
        results.append(tokens([group]))
        assert not any(c.logp.requires_grad for c in group)
        for failing in ([], [bad]):  # features that do not fit the prompt are a bug found
            with pytest.raises(AssertionError) if failing else contextlib.nullcontext():
                answer(model, failing, SamplingOptions(2))
            assert all(module.training is training for module in model.hf.modules())
            assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())
            assert torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]
