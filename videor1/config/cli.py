"""The command line: reads YAML files and ``--any.option value`` arguments into a checked config dataclass.

Everything is derived from the dataclasses of ``options.py``: each field is an option, and its docstring is the help
text. Precedence, lowest first: the class defaults, the recipe that ``compat`` names, the config.yaml of a run that is
resumed, the YAML files in order, the command line.
``python -m videor1.config.cli --table train`` prints the options as a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from videor1.atomic import write_atomic
from videor1.config.fields import (
    COMMANDS,
    SHORTHANDS,
    Option,
    collect_options,
    options_table,
    plain,
    type_error,
    unknown_option,
    value_text,
)
from videor1.config.files import compat_recipe, find_config, read_yaml, recipe_names
from videor1.config.paths import PATHS, absolute, relocated
from videor1.errors import ConfigError, DataError, TrainingStopped

# The config.yaml of an older run lacks the options that were added later. Where such a run did something else than the
# option's present default, its value stands here.
EARLIER: dict[str, Any] = {"model.positions": "transformers"}

ConfigT = TypeVar("ConfigT")


def parse(config_class: type[ConfigT], argv: Sequence[str] | None, *, prog: str, description: str) -> ConfigT:
    """Read the command line into an instance of ``config_class``.

    Args:
        config_class: a dataclass whose fields have docstrings; a field that is itself a dataclass is a section.
        argv: the arguments without the program's name; None takes ``sys.argv[1:]``.
        prog: the name of the command in messages, e.g. ``python -m videor1.train``.
        description: one sentence for ``--help``.

    ``--help`` and ``--print_config`` print and exit with 0. An invalid argument prints one line to stderr and exits
    with 2.
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
    """Read one YAML file, or a shipped recipe by its name, as ``--config`` does.

    Raises:
        ConfigError: the file cannot be read, or an option in it is unknown or out of range.
    """
    options = collect_options(config_class)
    return _resolve(config_class, _build_parser(options, "videor1", ""), options, [f"--config={path}"])[0]


def load_run_config(config_class: type[ConfigT], path: str | Path) -> ConfigT:
    """Read the config.yaml at ``path``, which an earlier run wrote into its folder.

    Raises:
        ConfigError: the file cannot be read, or an option in it is unknown or out of range.
    """
    options = collect_options(config_class)
    values = _read_run_config(Path(path), _build_parser(options, "videor1", ""), options)
    return _build(config_class, {name: values.get(name, option.default) for name, option in options.items()}, "")


def dump_config(config: Any) -> str:
    """Return the config as YAML, from which ``--config`` reads an equal config."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def save_config(config: Any, path: str | Path) -> None:
    """Write ``dump_config(config)`` to a file, completely or not at all; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, dump_config(config))


def save_run_config(config: Any, folder: str | Path, run_dir: str | Path) -> None:
    """Write the config of a run to ``folder/config.yaml``, with absolute paths (see ``paths.py``).

    Args:
        config: the config.
        folder: the folder that this process writes to.
        run_dir: the run's folder, which becomes ``output_dir``.
    """
    paths = {name: absolute(name, value) for name, value in flat_options(config).items() if name in PATHS}
    paths["output_dir"] = absolute("output_dir", str(run_dir))
    save_config(_replaced(config, paths), Path(folder) / "config.yaml")


def _replaced(config: Any, values: dict[str, Any]) -> Any:
    """Return a config with other values of options, given by their dotted names."""
    own = {name: value for name, value in values.items() if "." not in name}
    for section in {name.partition(".")[0] for name in values if "." in name}:
        inner = {name.partition(".")[2]: v for name, v in values.items() if name.startswith(f"{section}.")}
        own[section] = _replaced(getattr(config, section), inner)
    return dataclasses.replace(config, **own)


def changed_options(before: Any, after: Any) -> list[str]:
    """Return ``name: old -> new`` for each option that differs between two configs.

    Paths are compared as absolute ones. ``output_dir``, ``resume`` and ``disable_tqdm`` are left out: where a run is
    stored, how it is resumed and whether it shows a progress bar may differ.
    """
    changes = []
    for name, old in flat_options(before).items():
        new = flat_options(after)[name]
        if absolute(name, old) != absolute(name, new) and name not in ("output_dir", "resume", "disable_tqdm"):
            changes.append(f"{name}: {value_text(old)} -> {value_text(new)}")
    return changes


def flat_options(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a config's values by their dotted names."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        values |= flat_options(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: plain(value)}
    return values


def resume_command(command: str, folder: str | Path, launcher: str = "python") -> str:
    """Return the shell command that resumes the run in ``folder``, whose config.yaml holds the other options."""
    return f"{launcher} -m videor1.{command} --resume auto --output_dir {shlex.quote(str(folder))}"


def run_main(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Call a command's ``main`` and print errors that the user can correct as one message on stderr.

    Any other exception is a bug and keeps its traceback.

    Returns:
        The exit code: main's own, 2 for ConfigError, 1 for DataError and TrainingStopped, 130 for Ctrl-C.
    """
    try:
        return main(argv)
    except (ConfigError, DataError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130


def _build_parser(options: dict[str, Option], prog: str, description: str) -> ArgumentParser:
    recipes = ", ".join(recipe_names(options))
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE.yaml ...] [--any.option value ...]",
        description=description,
        epilog=f"Recipes that --config takes by name: {recipes}." if recipes else None,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        type=str,
        metavar="FILE",
        help="YAML file of options, or the name of a recipe; may be repeated, later files win",
    )
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
        range_note = f" Range: {option.range.words}." if option.range else ""
        groups[option.section].add_argument(
            f"--{option.name}", type=option.type, default=option.default, help=f"{option.help}{range_note}", **extra
        )
    return parser


def _resolve(
    config_class: type[ConfigT], parser: ArgumentParser, options: dict[str, Option], argv: Sequence[str]
) -> tuple[ConfigT, bool]:
    """Merge the defaults, files and arguments by precedence.

    Returns:
        The config, and whether ``--print_config`` was given.
    """
    print_config = "--print_config" in argv
    tokens = _normalise([token for token in argv if token != "--print_config"], options)
    given = _parse_tokens(parser, options, tokens, defaults=False)
    values: dict[str, Any] = {}
    for name in given.get("config") or []:
        values |= read_yaml(find_config(name, options), parser, options)
    folder = given["output_dir"] if "output_dir" in given else values.get("output_dir")
    # A command that names the model or the data is complete, like that of a new run. Otherwise the options that are not
    # given again are taken from the config.yaml of the run to resume.
    complete = any(name in given or name in values for name in ("model_name_or_path", "dataset_name"))
    if given.get("resume") and folder and not complete and (run_config := Path(folder) / "config.yaml").is_file():
        values = _read_run_config(run_config, parser, options) | values
    compat = given["compat"] if "compat" in given else values.get("compat")
    if compat is not None:
        values = read_yaml(compat_recipe(compat), parser, options) | values
    # --list+ appends to the parser's default, so that must be the list from the files.
    parser.set_defaults({name: value for name, value in values.items() if options[name].is_list})
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
            raise ConfigError(type_error(options[key[1]], value[1])) from None
        raise ConfigError(" ".join(text.split())) from None


def _normalise(argv: Sequence[str], options: dict[str, Option]) -> list[str]:
    """Check the option names and write each option in the form that the parser reads.

    Shorthands are expanded, and ``--list a b`` and ``--list a,b`` become ``--list=["a", "b"]``.
    """
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
            raise ConfigError(unknown_option(f"--{name}", ["config", "print_config", *options]))
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


def _read_run_config(path: Path, parser: ArgumentParser, options: dict[str, Option]) -> dict[str, Any]:
    """Read a run's config.yaml, as it is from where the run's folder now lies.

    Options that its version did not have are taken from ``EARLIER``.
    """
    values = {name: value for name, value in EARLIER.items() if name in options} | read_yaml(path, parser, options)
    return relocated(values, path.parent)


def _build(config_class: type[ConfigT], values: dict[str, Any], prefix: str) -> ConfigT:
    """Make an instance of ``config_class`` from values by dotted name, of which its own begin with ``prefix``."""
    hints = get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        name, hint = prefix + field.name, hints[field.name]
        section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        arguments[field.name] = _build(hint, values, f"{name}.") if section else values[name]
    return config_class(**arguments)


def main(argv: list[str] | None = None) -> int:
    """Print the options of a command (``--table train``, ``sft`` or ``evaluate``) as a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m videor1.config.cli", description="Print the options as a Markdown table."
    )
    commands = {name.removeprefix("videor1."): config_class for name, config_class in COMMANDS.items()}
    parser.add_argument("--table", choices=tuple(commands), required=True, help="the command whose options to print")
    sys.stdout.write(options_table(commands[parser.parse_args(argv).table]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
