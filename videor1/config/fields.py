"""The options as a user sees them: the fields of a config class by dotted name, and messages about them."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml

from videor1.config.options import EvaluateConfig, SFTConfig, TrainConfig
from videor1.config.ranges import Range, field_ranges
from videor1.errors import did_you_mean

COMMANDS = {"videor1.train": TrainConfig, "videor1.sft": SFTConfig, "videor1.evaluate": EvaluateConfig}
SHORTHANDS = {"temporal": "temporal.enabled"}  # the reference code's flag has the name of a section here


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a config class, as a user sees it."""

    name: str  # the dotted name: "temporal.rule"
    type: Any
    default: Any
    help: str
    section: str  # "temporal", or "" for an option outside of any section
    title: str  # the first line of the docstring of the section's class
    range: Range | None  # the allowed range of a number; None: every value is allowed

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) in (list, tuple)

    @property
    def nullable(self) -> bool:
        return type(None) in get_args(self.type)

    @property
    def choices(self) -> list[str]:
        """The names to choose from; empty where every value is allowed."""
        kinds = get_args(self.type) if _is_union(self.type) or self.is_list else (self.type,)
        return [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]

    @property
    def takes_text(self) -> bool:
        return not self.is_list and (bool(self.choices) or str in (self.type, *get_args(self.type)))


def collect_options(config_class: type) -> dict[str, Option]:
    """Return every option of a config class by its dotted name, in the order of the fields."""
    return {option.name: option for option in _walk(config_class, config_class(), "")}


def _walk(config_class: type, defaults: Any, prefix: str) -> Iterator[Option]:
    hints = get_type_hints(config_class)
    title, docs = _docstrings(config_class)
    ranges = field_ranges(config_class)
    for field in dataclasses.fields(config_class):
        default = getattr(defaults, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(default):
            yield from _walk(hints[field.name], default, f"{name}.")
        else:
            doc, allowed = docs.get(field.name, ""), ranges.get(field.name)
            yield Option(name, hints[field.name], default, doc, prefix[:-1], title, allowed)


@functools.cache
def _docstrings(config_class: type) -> tuple[str, dict[str, str]]:
    """Return the first line of a class's docstring, and the docstring of each field, including inherited ones."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            parsed = docstring_parser.parse_from_object(base)
            docs |= {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}
    return parsed.short_description or config_class.__name__, docs


def options_table(config_class: type) -> str:
    """Return the options as a Markdown table of option, default, values (the range or the choices) and meaning."""
    rows = ["| Option | Default | Values | Meaning |", "|---|---|---|---|"]
    for option in collect_options(config_class).values():
        values = option.range.words if option.range else ", ".join(option.choices)
        meaning = re.sub(r"([|<*~])", r"\\\1", option.help)  # escape Markdown's special characters
        rows.append(f"| `{option.name}` | `{value_text(option.default)}` | {values} | {meaning} |")
    return "\n".join(rows) + "\n"


def unknown_option(shown: str, names: Iterable[str]) -> str:
    """Return the error message for an option that this command does not have.

    Args:
        shown: the option as the user wrote it, with or without ``--``.
        names: the names that the command has.
    """
    name = shown.removeprefix("--")
    owners = [command for command, config_class in COMMANDS.items() if name in collect_options(config_class)]
    if owners:
        return f"{shown} is an option of {' and '.join(owners)}, not of this command"
    return f"unknown option {shown}{did_you_mean(name, names, least=0, show=str)}"


def type_error(option: Option, got: str) -> str:
    """Return the error message for a value that is not of the option's type."""
    return f"{option.name}: expected {_describe_type(option.type)}, got {got!r}"


def _describe_type(kind: Any) -> str:
    """Return a type in plain words."""
    if _is_union(kind):
        members = [_describe_type(member) for member in get_args(kind) if member is not type(None)]
        return " or ".join([*members, "null"])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list of " + _describe_type(get_args(kind)[0]).removeprefix("one of ")
    if get_origin(kind) is dict:
        return 'an object, such as {"name": true}'
    if get_origin(kind) is tuple:
        return "[" + ", ".join(map(_describe_type, get_args(kind))) + "]"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def plain(value: Any) -> Any:
    """Return a value with every tuple in it turned into a list, as YAML has no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def value_text(value: Any) -> str:
    """Return a value as one line of YAML."""
    return yaml.safe_dump(plain(value), default_flow_style=True, width=sys.maxsize).removesuffix("...\n").strip()
