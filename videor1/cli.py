"""Command line: YAML files and ``--any.option value`` in, a checked config dataclass out.

Everything is derived from the dataclasses of ``config.py``: a field is an option, its docstring the help text.
Precedence, lowest first: the class defaults, ``compat``, the config.yaml of a run that is gone on with, the YAML files
in order, the command line.
``python -m videor1.cli --table train`` prints the options as a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import os
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from videor1.config import COMPAT, EvaluateConfig, SFTConfig, TrainConfig
from videor1.errors import ConfigError, DataError, TrainingStopped

RECIPES = Path(__file__).parent / "configs"
COMMANDS = {"videor1.train": TrainConfig, "videor1.sft": SFTConfig, "videor1.evaluate": EvaluateConfig}
SHORTHANDS = {"temporal": "temporal.enabled"}  # the reference's flag is our section
# What a run did whose config.yaml is older than the option, where that is not the default.
EARLIER: dict[str, Any] = {"model.positions": "transformers"}

ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a config class, as a user sees it."""

    name: str  # dotted: "temporal.rule"
    type: Any
    default: Any
    help: str
    section: str  # "temporal", or "" at the top
    title: str  # the section's docstring

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) in (list, tuple)

    @property
    def nullable(self) -> bool:
        return type(None) in get_args(self.type)

    @property
    def choices(self) -> list[str]:
        """Names to choose from; empty where any value goes."""
        kinds = get_args(self.type) if _is_union(self.type) or self.is_list else (self.type,)
        return [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]

    @property
    def takes_text(self) -> bool:
        return not self.is_list and (bool(self.choices) or str in (self.type, *get_args(self.type)))


def collect_options(config_class: type) -> dict[str, Option]:
    """Every option of a config class by its dotted name, in the order of the fields."""
    return {option.name: option for option in _walk(config_class, config_class(), "")}


def _walk(config_class: type, defaults: Any, prefix: str) -> Iterator[Option]:
    hints = get_type_hints(config_class)
    title, docs = _docstrings(config_class)
    for field in dataclasses.fields(config_class):
        default = getattr(defaults, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(default):
            yield from _walk(hints[field.name], default, f"{name}.")
        else:
            yield Option(name, hints[field.name], default, docs.get(field.name, ""), prefix[:-1], title)


@functools.cache
def _docstrings(config_class: type) -> tuple[str, dict[str, str]]:
    """The first line of the class's docstring, and the docstring of each field, inherited ones too."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            parsed = docstring_parser.parse_from_object(base)
            docs |= {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}
    return parsed.short_description or config_class.__name__, docs


def parse(config_class: type[ConfigT], argv: Sequence[str] | None, *, prog: str, description: str) -> ConfigT:
    """Read the command line into an instance of ``config_class``.

    Args:
        config_class: a dataclass whose fields have docstrings; sections are fields that are dataclasses.
        argv: the arguments without the program's name; None takes ``sys.argv[1:]``.
        prog: how the command is called, e.g. ``python -m videor1.train``.
        description: one sentence for ``--help``.

    ``--help`` and ``--print_config`` print and exit with 0. A mistake prints one line to stderr and exits with 2.
    """
    options = collect_options(config_class)
    parser = _build_parser(options, prog, description)
    try:
        config, print_config = _resolve(config_class, parser, options, sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        parser.exit(2, f"{prog}: error: {error}\n")
    if print_config:
        sys.stdout.write(dump_config(config))
        parser.exit(0)
    return config


def load_config(config_class: type[ConfigT], path: str | Path) -> ConfigT:
    """Read one YAML file (or shipped recipe) as ``--config`` does. Raises ConfigError."""
    options = collect_options(config_class)
    return _resolve(config_class, _build_parser(options, "videor1", ""), options, [f"--config={path}"])[0]


def load_run_config(config_class: type[ConfigT], path: str | Path) -> ConfigT:
    """Read the config.yaml of a run folder. Raises ConfigError."""
    options = collect_options(config_class)
    values = _read_run(Path(path), _build_parser(options, "videor1", ""), options)
    return _build(config_class, {name: values.get(name, option.default) for name, option in options.items()}, "")


def dump_config(config: Any) -> str:
    """The config as YAML that ``--config`` reads back in equal."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def save_config(config: Any, path: str | Path) -> None:
    """Write ``dump_config`` to a file, through a temporary one, so that no half-written config is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(dump_config(config), encoding="utf-8")
    os.replace(temporary, path)


def changed_options(before: Any, after: Any) -> list[str]:
    """``name: old -> new`` of each option that differs, apart from where the run is and how it is resumed."""
    changes = []
    for name, old in flat_options(before).items():
        new = flat_options(after)[name]
        if old != new and name not in ("output_dir", "resume", "disable_tqdm"):
            changes.append(f"{name}: {_shown(old)} -> {_shown(new)}")
    return changes


def flat_options(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        values |= flat_options(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: _plain(value)}
    return values


def flat_tree(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What a YAML file of options holds, by dotted names; unchecked."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_tree(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def resume_command(command: str, folder: str | Path, launcher: str = "python") -> str:
    """How a run goes on; its folder's config.yaml holds its other options."""
    return f"{launcher} -m videor1.{command} --resume auto --output_dir {shlex.quote(str(folder))}"


def run_main(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Call a command; turn the errors that are the user's to mend into one message on stderr.

    Returns the exit code: main's own, 2 for ConfigError, 1 for DataError and TrainingStopped, 130 for Ctrl-C.
    Any other exception is a bug and keeps its traceback.
    """
    try:
        return main(argv)
    except (ConfigError, DataError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130


def options_table(config_class: type) -> str:
    """The options as a Markdown table: option, default, meaning."""
    rows = ["| Option | Default | Meaning |", "|---|---|---|"]
    for option in collect_options(config_class).values():
        missing = [choice for choice in option.choices if choice not in option.help]
        meaning = option.help + (f" One of: {', '.join(option.choices)}." if missing else "")
        meaning = re.sub(r"([|<*~])", r"\\\1", meaning)  # Markdown's own characters
        rows.append(f"| `{option.name}` | `{_shown(option.default)}` | {meaning} |")
    return "\n".join(rows) + "\n"


def _build_parser(options: dict[str, Option], prog: str, description: str) -> ArgumentParser:
    recipes = ", ".join(_recipes(options))
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE.yaml ...] [--any.option value ...]",
        description=description,
        epilog=f"Recipes that --config takes by name: {recipes}." if recipes else None,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="append", type=str, metavar="FILE",
        help="YAML file of options, or the name of a recipe; may be repeated, later files win",
    )  # fmt: skip
    parser.add_argument("--print_config", action="store_true", help="print the resulting options as YAML and exit")
    groups: dict[str, Any] = {}
    for option in options.values():
        if option.section not in groups:
            full = SHORTHANDS.get(option.section)
            note = f"--{option.section} true|false is short for --{full}." if full else None
            title = f"{option.section}: {option.title}" if option.section else option.title
            title = title.removesuffix(".")
            groups[option.section] = parser.add_argument_group(title, note)
        extra: dict[str, Any] = {}
        if bool in (option.type, *get_args(option.type)):
            extra = {"nargs": "?", "const": True}  # a bare --bf16 means true, as in Hugging Face's commands
        elif option.choices and not option.is_list:
            extra["metavar"] = "{" + ",".join([*option.choices, *["null"] * option.nullable]) + "}"
        elif not option.is_list:
            kinds = (option.type, *get_args(option.type))
            extra["metavar"] = "INT" if int in kinds else "FLOAT" if float in kinds else "TEXT"
        groups[option.section].add_argument(
            f"--{option.name}", type=option.type, default=option.default, help=option.help, **extra
        )
    return parser


def _resolve(
    config_class: type[ConfigT], parser: ArgumentParser, options: dict[str, Option], argv: Sequence[str]
) -> tuple[ConfigT, bool]:
    print_config = "--print_config" in argv
    tokens = _normalise([token for token in argv if token != "--print_config"], options)
    given = _parse_tokens(parser, options, tokens, defaults=False)
    values: dict[str, Any] = {}
    for name in given.get("config") or []:
        values |= _read_yaml(_find_config(name, options), parser, options)
    folder = given["output_dir"] if "output_dir" in given else values.get("output_dir")
    # A command that names these is whole, as that of a new run.
    named = any(name in given or name in values for name in ("model_name_or_path", "dataset_name"))
    if given.get("resume") and folder and not named and (of_the_run := Path(folder) / "config.yaml").is_file():
        values = _read_run(of_the_run, parser, options) | values  # what is not given again is as it was
    compat = given["compat"] if "compat" in given else values.get("compat")
    if compat is not None:
        values = {**COMPAT[compat], **values}
    parser.set_defaults({name: value for name, value in values.items() if options[name].is_list})  # --list+ adds to it
    explicit = _parse_tokens(parser, options, tokens, defaults=True)
    for name, option in options.items():
        values[name] = explicit[name] if name in given else values.get(name, option.default)
    return _build(config_class, values, ""), print_config


def _parse_tokens(parser: ArgumentParser, options: dict[str, Option], tokens: list[str], *, defaults: bool) -> Any:
    try:
        return parser.parse_args(tokens, defaults=defaults)
    except argparse.ArgumentError as error:
        text = str(error)
        key = re.search(r'Parser key "([^"]+)"', text)
        value = re.search(r"(?:Got|Given) value: (.*)", text)
        if key and value and key[1] in options:
            raise ConfigError(_type_error(options[key[1]], value[1])) from None
        raise ConfigError(" ".join(text.split())) from None


def _normalise(argv: Sequence[str], options: dict[str, Option]) -> list[str]:
    """Check the option names, expand shorthands, turn ``--list a b`` and ``--list a,b`` into ``--list=["a", "b"]``."""
    tokens: list[str] = []
    index = 0
    while index < len(argv):
        token = str(argv[index])
        index += 1
        if not token.startswith("--"):
            tokens.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = SHORTHANDS[name] if SHORTHANDS.get(name) in options else name
        option = options.get(name.removesuffix("+"))  # --list+ appends
        known = option is not None and (option.is_list or not name.endswith("+"))
        if not known and name not in ("help", "config"):
            raise ConfigError(_unknown(f"--{name}", ["config", "print_config", *options]))
        values = [value] if equals else []
        while not equals and index < len(argv) and not str(argv[index]).startswith("--"):
            values.append(str(argv[index]))
            index += 1
        if option is not None and option.is_list and values and not values[0].startswith("["):
            values = [json.dumps([part.strip() for text in values for part in text.split(",") if part.strip()])]
        if values:
            tokens += [f"--{name}={values[0]}", *values[1:]]
        else:
            tokens.append(f"--{name}")
    return tokens


def _find_config(name: str, options: dict[str, Option]) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    recipe = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and recipe.is_file():
        return recipe
    reason = "it is a folder" if path.is_dir() else "no such file"
    recipes = _recipes(options)
    names = f" or a recipe's name ({', '.join(recipes)})" if recipes else ""
    raise ConfigError(f"--config {name}: {reason}; give a YAML file{names}")


def _recipes(options: Iterable[str]) -> list[str]:
    """Names of the shipped files that hold nothing but these options."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if _recipe_options(path) <= set(options))


@functools.cache
def _recipe_options(path: Path) -> set[str]:
    return {name for name, _ in flat_tree(yaml.safe_load(path.read_text(encoding="utf-8")))}


def _read_yaml(path: Path, parser: ArgumentParser, options: dict[str, Option]) -> dict[str, Any]:
    """A YAML file as checked values by dotted option name."""
    values: dict[str, Any] = {}
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None or _is_null(root):
        return values
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected options as name: value lines, got {_source(loader, root)!r:.60}")
    sections = {option.section for option in options.values()} - {""}
    for name, node in _leaves(loader, root, "", sections):
        where = f"{path}:{node.start_mark.line + 1}"
        name = SHORTHANDS[name] if SHORTHANDS.get(name) in options else name
        if name in sections:
            raise ConfigError(f"{where}: {name}: expected a mapping of its options, got {_source(loader, node)}")
        if name not in options:
            raise ConfigError(f"{where}: {_unknown(name, options)}")
        if name in values:
            raise ConfigError(f"{where}: {name} is given twice")
        try:
            values[name] = _yaml_value(loader, node, options[name], parser)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return values


def _read_run(path: Path, parser: ArgumentParser, options: dict[str, Option]) -> dict[str, Any]:
    """A run's own config.yaml, which holds every option that its version had."""
    return {name: value for name, value in EARLIER.items() if name in options} | _read_yaml(path, parser, options)


def _leaves(
    loader: yaml.SafeLoader, mapping: yaml.MappingNode, prefix: str, sections: set[str]
) -> Iterator[tuple[str, yaml.Node]]:
    loader.flatten_mapping(mapping)  # YAML's << merge keys
    for key, value in mapping.value:
        name = prefix + str(key.value)
        if name in sections and isinstance(value, yaml.MappingNode):
            yield from _leaves(loader, value, f"{name}.", sections)
        elif not (name in sections and _is_null(value)):  # "data:" with every line under it commented out
            yield name, value


def _yaml_value(loader: yaml.SafeLoader, node: yaml.Node, option: Option, parser: ArgumentParser) -> Any:
    if _is_null(node):
        if not option.nullable:
            raise ConfigError(_type_error(option, "null"))
        return None
    if isinstance(node, yaml.ScalarNode) and option.takes_text and not option.choices:
        return node.value  # as written: run_name: 2024 is text
    value = node.value if isinstance(node, yaml.ScalarNode) and option.choices else _construct(loader, node)
    if isinstance(node, yaml.ScalarNode) and option.is_list:
        value = [part.strip() for part in node.value.split(",") if part.strip()]
    try:
        return parser.parse_object({option.name: value}, defaults=False)[option.name]
    except argparse.ArgumentError:
        raise ConfigError(_type_error(option, _source(loader, node))) from None


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _source(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else str(_construct(loader, node))


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _build(config_class: type[ConfigT], values: dict[str, Any], prefix: str) -> ConfigT:
    hints = get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        name, hint = prefix + field.name, hints[field.name]
        section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        arguments[field.name] = _build(hint, values, f"{name}.") if section else values[name]
    return config_class(**arguments)


def _unknown(shown: str, names: Iterable[str]) -> str:
    """What to say of an option that is none of this command's."""
    name = shown.removeprefix("--")
    owners = [command for command, config_class in COMMANDS.items() if name in collect_options(config_class)]
    if owners:
        return f"{shown} is an option of {' and '.join(owners)}, not of this command"
    return f"unknown option {shown}; did you mean {_nearest(name, names)}?"


def _nearest(name: str, names: Iterable[str]) -> str:
    """The known name most like ``name``; by its last part too, so that ``rule`` finds ``temporal.rule``."""

    def alike(known: str) -> float:
        def ratio(a: str, b: str) -> float:
            return difflib.SequenceMatcher(None, a, b).ratio()

        return max(ratio(name, known), 0.99 * ratio(name.split(".")[-1], known.split(".")[-1]))

    scores = {known: alike(known) for known in names}
    return " or ".join([known for known, score in scores.items() if score == max(scores.values())][:3])


def _type_error(option: Option, got: str) -> str:
    return f"{option.name}: expected {_kind(option.type)}, got {got!r}"


def _kind(kind: Any) -> str:
    """A type in plain words."""
    if _is_union(kind):
        named = [_kind(member) for member in get_args(kind) if member is not type(None)]
        return " or ".join([*named, "null"])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list of " + _kind(get_args(kind)[0]).removeprefix("one of ")
    if get_origin(kind) is tuple:
        return "[" + ", ".join(map(_kind, get_args(kind))) + "]"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=sys.maxsize).removesuffix("...\n").strip()


def main(argv: list[str] | None = None) -> int:
    """``python -m videor1.cli --table train|sft``: the options as a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m videor1.cli", description="Print the options as a Markdown table.")
    parser.add_argument("--table", choices=("train", "sft"), required=True, help="whose options")
    table = parser.parse_args(argv).table
    sys.stdout.write(options_table(TrainConfig if table == "train" else SFTConfig))
    return 0


if __name__ == "__main__":
    sys.exit(main())
