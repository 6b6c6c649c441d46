"""``docs/api.md``, made of the docstrings: ``python docs/make_api.py`` writes it, ``--check`` says whether it is stale.

A function's part is its signature, its docstring's text, and its sections Args, Returns, Raises and Source; a record's
part is its fields, whose meaning stands in the comment beside each.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from docstring_parser import Docstring, google
from docstring_parser.google import Section, SectionType

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
sys.path.insert(0, str(ROOT))  # of this checkout, whatever is installed

SECTIONS = [
    Section("Args", "param", SectionType.MULTIPLE),
    Section("Attributes", "attribute", SectionType.MULTIPLE),
    Section("Raises", "raises", SectionType.MULTIPLE),
    Section("Returns", "returns", SectionType.SINGULAR),
    Section("Source", "source", SectionType.SINGULAR),
]
INTRODUCTION = """\
# API

Made from the docstrings by `python docs/make_api.py`: mend those, not this page. Shapes stand in brackets, one letter a
dimension; log-probabilities and entropies are in nats. `backend="auto"` takes the fastest implementation that can run
on the inputs' device; a named backend is that one or an error."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something public: what it is called on the page, and the object."""

    name: str
    thing: Any

    @property
    def anchor(self) -> str:
        """As GitHub makes it of a heading."""
        return re.sub(r"[^\w\- ]", "", self.name.lower()).replace(" ", "-")


def chapters() -> dict[str, list[Entry]]:
    """Every public name, chapter by chapter."""
    kernels = importlib.import_module("videor1_kernels")
    public = [Entry(name, getattr(kernels, name)) for name in kernels.__all__]
    functions = [entry for entry in public if isinstance(entry.thing, FunctionType)]
    about_backends = {"backends", "chosen_backend", "last_backend"}
    return {
        "videor1_kernels: functions": [entry for entry in functions if entry.name not in about_backends],
        "videor1_kernels: records": [entry for entry in public if entry not in functions],
        "videor1_kernels: which backend runs": [entry for entry in functions if entry.name in about_backends],
        "videor1_kernels.integrations": list(_integrations()),
        "videor1: rewards and video": [
            *_named("videor1.rewards", ["accuracy_reward", "format_reward"]),
            *_named("videor1.video", ["read_frames"]),
        ],
        "videor1: rollout engines": _named(
            "videor1.rollout.protocol",
            ["RolloutEngine", "Request", "Branch", "Judge", "Rollout", "RolloutStats", "RolloutError"],
        ),
        "videor1: records": _named("videor1.types", _defined(importlib.import_module("videor1.types"))),
    }


def _integrations() -> Iterator[Entry]:
    yield from _named("videor1_kernels.integrations.transformers", ["register", "PackedRow", "AttentionContext"])
    for host in ("trl", "liger", "verl", "openrlhf"):
        yield Entry(f"{host}.use", importlib.import_module(f"videor1_kernels.integrations.{host}").use)


def _named(module: str, names: Sequence[str]) -> list[Entry]:
    return [Entry(name, getattr(importlib.import_module(module), name)) for name in names]


def _defined(module: ModuleType) -> list[str]:
    """Public classes of a module, in the order of its text."""
    classes = [name for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
    return [name for name in classes if getattr(module, name).__module__ == module.__name__]


def parsed(thing: Any) -> Docstring:
    """The docstring of a function or class in its parts."""
    return google.GoogleParser(SECTIONS).parse(inspect.getdoc(thing) or "")


def source(docstring: Docstring) -> str:
    """What stands under Source; "" without."""
    return " ".join(" ".join(m.description or "" for m in docstring.meta if m.args == ["source"]).split())


def page() -> str:
    """The whole page."""
    contents = chapters()
    anchors = {entry.name: entry.anchor for entries in contents.values() for entry in entries}
    lines = [INTRODUCTION, ""]
    for title, entries in contents.items():
        links = ", ".join(f"[`{entry.name}`](#{entry.anchor})" for entry in entries)
        lines.append(f"- **{title}**: {links}")
    for title, entries in contents.items():
        lines += ["", f"## {title}"]
        for entry in entries:
            lines += ["", f"### {entry.name}", "", *_entry(entry, anchors)]
    return "\n".join(lines) + "\n"


def _entry(entry: Entry, anchors: dict[str, str]) -> Iterator[str]:
    text = _Text(anchors)
    is_class = inspect.isclass(entry.thing)
    path = Path(inspect.getsourcefile(entry.thing) or "").resolve().relative_to(ROOT).as_posix()
    yield from _code(_import(entry) + "\n" + (_class_head(entry.thing) if is_class else signature(entry.thing)))
    yield from _documented(parsed(entry.thing), text, fields(entry.thing) if is_class else [])
    if is_class:
        yield from _methods(entry.thing, text)
    yield from ("", f"[`{path}`](../{path})")


def _import(entry: Entry) -> str:
    module, name = entry.thing.__module__, entry.name.rpartition(".")[2]
    package = module.partition(".")[0] if name in vars(sys.modules["videor1_kernels"]) else module.rpartition(".")[0]
    if vars(sys.modules[package]).get(name) is entry.thing:  # it is there that users find it
        module = package
    return f"from {module} import {name}\n"


def _documented(docstring: Docstring, text: _Text, members: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    described = "\n\n".join(filter(None, (docstring.short_description, docstring.long_description)))
    yield from ("", *text.blocks(described))
    arguments = [(p.arg_name, p.description or "") for p in docstring.params if p.args[0] == "param"]
    if arguments:
        yield from ("", *_table(("Argument", "Meaning"), [(_names(n), text.cell(d)) for n, d in arguments]))
    told = {name.strip() for names, _ in arguments for name in names.split(",")}
    rows = [(_names(n), text.cell(f"`{kind}`"), text.cell(note)) for n, kind, note in members if n not in told]
    if rows:
        yield from ("", *_table(("Field", "Type", "Meaning"), rows))
    if docstring.returns:
        yield from ("", "**Returns** " + text.line(docstring.returns.description or ""))
    if docstring.raises:
        rows = [(_names(r.type_name or ""), text.cell(r.description or "")) for r in docstring.raises]
        yield from ("", *_table(("Raises", "When"), rows))
    if where := source(docstring):
        yield from ("", "**Source** " + text.line(_linked(where)))


def _methods(owner: type, text: _Text) -> Iterator[str]:
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        if isinstance(value, FunctionType) and value.__doc__:
            yield from ("", *_code(signature(value)))
            yield from _documented(parsed(value), text, [])
        elif isinstance(value, property) and getattr(owner, "_is_protocol", False) and value.__doc__:
            kind = inspect.signature(value.fget).return_annotation if value.fget else ""
            yield from ("", f"`{name}: {kind}` " + text.line(value.__doc__))


def signature(function: Any) -> str:
    """As it is written: one parameter a line where they do not fit into one."""
    given = inspect.signature(function)
    parts, star = [], False
    for parameter in given.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        parts.append(f"{prefix}{parameter.name}{kind}{default}")
    returned = "" if given.return_annotation is given.empty else f" -> {given.return_annotation}"
    return _called(function.__name__, parts, returned)


def _called(name: str, parts: Sequence[str], returned: str = "") -> str:
    line = f"{name}({', '.join(parts)}){returned}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"


def _class_head(owner: type) -> str:
    if dataclasses.is_dataclass(owner):
        taken = [field for field in dataclasses.fields(owner) if field.init]
        return _called(owner.__name__, [_field(field) for field in taken])
    bases = ", ".join(base.__name__ for base in owner.__bases__ if base is not object)
    return f"class {owner.__name__}" + (f"({bases})" if bases else "")


def _field(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.name}={_default(field.default)}"
    return f"{field.name}=..." if field.default_factory is not dataclasses.MISSING else field.name


def _default(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def fields(owner: type) -> list[tuple[str, str, str]]:
    """(name, type, comment) of each annotated field of a class, from its text."""
    text = textwrap.dedent(inspect.getsource(owner))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = [node.body for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    found = []
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        beside = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
        found.append((node.target.id, ast.unparse(node.annotation), " ".join(above + beside)))
    return found


class _Text:
    """A docstring's text as Markdown."""

    def __init__(self, anchors: dict[str, str]) -> None:
        self.anchors = anchors

    def blocks(self, text: str) -> list[str]:
        """Paragraphs and lists as they are; what is indented by four or more becomes a code block."""
        lines: list[str] = []
        for block in re.split(r"\n\s*\n", text):
            indented = all(line.startswith("    ") for line in block.splitlines())
            if indented and lines and lines[-1] == "```":  # two code blocks, one after the other
                lines[-1] = ""
                lines += [*textwrap.dedent(block).splitlines(), "```"]
            elif indented:
                lines += ["", "```text", *textwrap.dedent(block).splitlines(), "```"]
            else:
                lines += ["", *self._inline(block).splitlines()]
        return lines[1:]

    def line(self, text: str) -> str:
        return " ".join(self._inline(text).split())

    def cell(self, text: str) -> str:
        return self.line(text).replace("|", "\\|")

    def _inline(self, text: str) -> str:
        text = re.sub(r":\w+:`~?([^`]+)`", self._reference, text)
        text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        parts = re.split(r"(`[^`]*`)", text)
        parts[::2] = [re.sub(r"([*<~])", r"\\\1", part) for part in parts[::2]]
        return "".join(parts)

    def _reference(self, match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`](#{self.anchors[name]})" if name in self.anchors else f"`{match[1]}`"


def _linked(text: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _names(names: str) -> str:
    return ", ".join(f"`{name.strip()}`" for name in names.split(","))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _code(text: str) -> list[str]:
    return ["```python", *text.splitlines(), "```"]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make docs/api.md of the docstrings.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1: the page is stale")
    made = page()
    if parser.parse_args(argv).check:
        return 0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made else 1
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
