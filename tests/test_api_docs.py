"""The API page is the docstrings', and every public function's docstring says what a caller must know."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import videor1_kernels

ROOT = Path(__file__).resolve().parents[1]
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


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec
    assert spec.loader
    module = sys.modules["make_api"] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


make_api = load()
ENTRIES = {entry.name: entry.thing for entries in make_api.chapters().values() for entry in entries}
FUNCTIONS = {name: thing for name, thing in ENTRIES.items() if isinstance(thing, FunctionType)}


def arguments(function: FunctionType) -> dict[str, str]:
    """What Args says of each parameter."""
    said = {}
    for parameter in make_api.parsed(function).params:
        for name in parameter.arg_name.split(","):
            said[name.strip()] = parameter.description or ""
    return said


def test_the_page_is_that_of_the_docstrings() -> None:
    made = make_api.page()
    assert make_api.PAGE.read_text(encoding="utf-8") == made, "stale: run python docs/make_api.py"
    assert make_api.main(["--check"]) == 0


def test_a_stale_page_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make_api, "PAGE", tmp_path / "api.md")
    assert make_api.main(["--check"]) == 1
    assert make_api.main([]) == 0
    assert make_api.main(["--check"]) == 0
    make_api.PAGE.write_text(make_api.PAGE.read_text(encoding="utf-8").replace("nats", "bits"), encoding="utf-8")
    assert make_api.main(["--check"]) == 1


def test_everything_public_is_on_the_page() -> None:
    assert set(videor1_kernels.__all__) < set(ENTRIES)
    assert {"accuracy_reward", "format_reward", "read_frames", "RolloutEngine", "Sample", "Group"} < set(ENTRIES)
    assert len(FUNCTIONS) >= 20
    page = make_api.page()
    headings = set(re.findall(r"^### (.+)$", page, re.MULTILINE))
    assert headings == set(ENTRIES)


def test_links_lead_somewhere() -> None:
    page = make_api.page()
    anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", page, re.M)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", page):
        assert anchor in anchors
    for path in re.findall(r"\]\(\.\./([^)]+)\)", page):
        assert (ROOT / path).is_file(), path


def test_tables_have_as_many_cells_as_their_head() -> None:
    lines = make_api.page().splitlines()
    wide = 0
    for line in lines:
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if cells and not wide:
            wide = cells
        assert not cells or cells == wide, line
        wide = wide if cells else 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_described(name: str) -> None:
    function = FUNCTIONS[name]
    assert set(arguments(function)) == set(inspect.signature(function).parameters)
    assert make_api.parsed(function).short_description


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_and_dtypes_of_tensors(name: str) -> None:
    function, said = FUNCTIONS[name], arguments(FUNCTIONS[name])
    given = inspect.signature(function)
    for parameter in given.parameters.values():
        if "Tensor" in parameter.annotation and parameter.name != "permutation":  # which takes any sequence of ints
            assert SHAPE.search(said[parameter.name]), f"{parameter.name}: no shape"
            assert DTYPE.search(said[parameter.name]), f"{parameter.name}: no dtype"
    returned = make_api.parsed(function).returns
    assert returned, "no Returns"
    if "Tensor" in given.return_annotation:
        assert SHAPE.search(returned.description), "Returns: no shape"
        assert DTYPE.search(returned.description) or "dtype" in returned.description, "Returns: no dtype"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_units(name: str) -> None:
    function, said = FUNCTIONS[name], arguments(FUNCTIONS[name])
    for parameter, text in said.items():
        assert UNITS.get(parameter, "") in text, f"{parameter}: {UNITS.get(parameter)}"
    if name in IN_NATS:
        assert "nats" in make_api.parsed(function).returns.description


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_and_origin(name: str) -> None:
    docstring = make_api.parsed(FUNCTIONS[name])
    assert docstring.raises, "no Raises"
    assert all(error.type_name and error.description for error in docstring.raises)
    assert ORIGIN.search(make_api.source(docstring)), "no Source"


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - set(FUNCTIONS)))
def test_records_say_what_each_field_is(name: str) -> None:
    thing = ENTRIES[name]
    docstring = make_api.parsed(thing)
    assert docstring.short_description
    told = {name.strip() for p in docstring.params for name in p.arg_name.split(",")}
    for field, kind, meaning in make_api.fields(thing):
        assert kind
        if "Tensor" in kind:
            assert meaning or field in told, field


def test_a_comment_above_or_beside_a_field_is_its_meaning() -> None:
    fields = {name: (kind, meaning) for name, kind, meaning in make_api.fields(videor1_kernels.PrefixLayout)}
    assert fields["total_tokens"] == ("int", "T")
    kind, meaning = fields["predict_index"]
    assert kind == "Tensor"
    assert meaning.startswith("int64 [N]: row position whose hidden state predicts")
    assert meaning.endswith("it appears once per completion.")


def test_text_becomes_markdown() -> None:
    text = make_api._Text({"other": "other"})
    assert text.blocks("See ``x|y`` and p~::\n\n    a = <b>\n\n    c\n\n:func:`~a.other` <here>") == [
        "See `x|y` and p\\~:", "", "```text", "a = <b>", "", "c", "```", "", "[`other`](#other) \\<here>",
    ]  # fmt: skip
    assert text.cell("``int | None``") == "`int \\| None`"
