"""The API pages list everything public, and every public function's docstring says what a caller must know."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from docstring_parser import Docstring, google
from docstring_parser.google import Section, SectionType
from pages import load

import videor1.types
import videor1_kernels

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = (DOCS / "kernels" / "api.md", DOCS / "training" / "api.md")
DTYPE = re.compile(r"\b(?:fp64|fp32|bf16|fp16|float\d*|bfloat16|u?int\d+|bool|uint8)\b")
SHAPE = re.compile(r"\[[\w.,+ *]*\]|scalar|shaped as")
ORIGIN = re.compile(r"arXiv \d{4}\.\d{5}|https?://|[Tt]his library|That of :func:")
# Arguments and results with a unit, and the word for it.
UNITS = {
    "logp": "nats", "old_logp": "nats", "ref_logp": "nats", "kl_clamp": "nats", "entropy": "nats",
    "lengths": "tokens", "length_range": "tokens", "prompt_lengths": "tokens", "completion_lengths": "tokens",
    "max_completion_length": "tokens", "num_tokens": "tokens", "max_tokens_per_row": "tokens",
    "suffix_lengths": "tokens", "cu_prefix": "tokens", "cu_seqlens": "tokens", "size": "pixels",
    "rotation": "degrees", "max_pixels": "pixels", "min_pixels": "pixels", "fps": "frames per second",
    "start": "seconds", "end": "seconds",
}  # fmt: skip
IN_NATS = ("linear_logprob", "selective_log_softmax", "grpo_loss", "linear_grpo_loss", "sample_tokens")
PARTS = {"Args": "param", "Attributes": "attribute", "Raises": "raises"}
SECTIONS = [Section(title, key, SectionType.MULTIPLE) for title, key in PARTS.items()]
SECTIONS += [Section(title, title.lower(), SectionType.SINGULAR) for title in ("Returns", "Source")]
fields = load(DOCS / "field_comments.py").fields


def documented(page: Path) -> dict[str, Any]:
    """What a page's ``:::`` lines name. The name may be that of a function whose folder has the same one."""
    found = {}
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        module, _, last = name.rpartition(".")
        thing = getattr(importlib.import_module(module), last)
        assert not isinstance(thing, ModuleType), f"{name} is a module: the page would show all of it"
        found[name] = thing
    return found


ENTRIES = {name: thing for page in PAGES for name, thing in documented(page).items()}
FUNCTIONS = {name: thing for name, thing in ENTRIES.items() if isinstance(thing, FunctionType)}


def parsed(thing: Any) -> Docstring:
    return google.GoogleParser(SECTIONS).parse(inspect.getdoc(thing) or "")


def source(docstring: Docstring) -> str:
    """What stands under Source; "" without."""
    return " ".join(" ".join(m.description or "" for m in docstring.meta if m.args == ["source"]).split())


def arguments(function: FunctionType) -> dict[str, str]:
    said = {}
    for parameter in parsed(function).params:
        for name in parameter.arg_name.split(","):
            said[name.strip()] = parameter.description or ""
    return said


def test_everything_public_is_on_a_page() -> None:
    kernels = {name.rpartition(".")[2]: thing for name, thing in documented(PAGES[0]).items()}
    for name in videor1_kernels.__all__:
        assert kernels[name] is getattr(videor1_kernels, name)
    for host in ("trl", "liger", "verl", "openrlhf"):
        assert f"videor1_kernels.integrations.{host}.use" in FUNCTIONS
    records = {thing for thing in vars(videor1.types).values() if getattr(thing, "__module__", "") == "videor1.types"}
    assert {thing for thing in records if inspect.isclass(thing)} <= set(ENTRIES.values())
    others = ("rewards.accuracy_reward", "rewards.format_reward", "video.read_frames", "rollout.protocol.RolloutEngine")
    assert {f"videor1.{name}" for name in others} < set(ENTRIES)
    assert len(FUNCTIONS) >= 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_says_what_a_caller_must_know(name: str) -> None:
    """Every parameter, shapes and dtypes of tensors, units, errors, and where the function comes from."""
    function, docstring, said = FUNCTIONS[name], parsed(FUNCTIONS[name]), arguments(FUNCTIONS[name])
    given = inspect.signature(function)
    assert set(said) == set(given.parameters)
    assert docstring.short_description
    for parameter in given.parameters.values():
        if "Tensor" in parameter.annotation and parameter.name != "permutation":  # which takes any sequence of ints
            assert SHAPE.search(said[parameter.name]), f"{parameter.name}: no shape"
            assert DTYPE.search(said[parameter.name]), f"{parameter.name}: no dtype"
        unit = UNITS.get(parameter.name, "")
        assert unit in said[parameter.name], f"{parameter.name}: {unit}"
    returned = docstring.returns
    assert returned, "no Returns"
    if "Tensor" in given.return_annotation:
        assert SHAPE.search(returned.description), "Returns: no shape"
        assert DTYPE.search(returned.description) or "dtype" in returned.description, "Returns: no dtype"
    if name.rpartition(".")[2] in IN_NATS:
        assert "nats" in returned.description
    assert docstring.raises, "no Raises"
    assert all(error.type_name and error.description for error in docstring.raises)
    assert ORIGIN.search(source(docstring)), "no Source"


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - set(FUNCTIONS)))
def test_records_say_what_each_field_is(name: str) -> None:
    thing = ENTRIES[name]
    docstring = parsed(thing)
    assert docstring.short_description
    told = {name.strip() for p in docstring.params for name in p.arg_name.split(",")}
    for field, kind, meaning in fields(inspect.getsource(thing)):
        assert kind
        if "Tensor" in kind:
            assert meaning or field in told, field


def test_a_comment_above_or_beside_a_field_is_its_meaning() -> None:
    found = fields(inspect.getsource(videor1_kernels.PrefixLayout))
    meanings = {name: (kind, meaning) for name, kind, meaning in found}
    assert meanings["total_tokens"] == ("int", "T")
    kind, meaning = meanings["predict_index"]
    assert kind == "Tensor"
    assert meaning.startswith("int64 [N]: row position whose hidden state predicts")
    assert meaning.endswith("it appears once per completion.")


@pytest.mark.skipif(importlib.util.find_spec("griffe") is None, reason="griffe comes with the extra docs")
def test_a_docstring_becomes_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    extension = load(DOCS / "docstrings.py").Docstrings()
    text = (
        "See :func:`~videor1_kernels.grpo_loss` and :mod:`other`, [a | b] [c | d]::\n\n    a = b[0]\n\n"
        "Returns:\n    (logp, entropy), in nats: fp32.\n\nSource:\n    Here: arXiv 2410.10989,\n    and there.\n"
    )
    assert extension._linked(text) == (
        "See [`grpo_loss`][videor1_kernels.grpo_loss.grpo_loss] and `other`, [a | b] \\[c | d]:\n\n    a = b[0]\n\n"
        "Returns:\n    (logp, entropy), in nats&#58; fp32.\n\n"
        "**Source:** Here: [arXiv 2410.10989](https://arxiv.org/abs/2410.10989), and there."
    )
