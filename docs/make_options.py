"""The pages of ``docs/options``, made of the commands themselves: ``python docs/make_options.py --write``.

An option of a run is a field of a config dataclass, and its meaning the field's docstring. ``report``, ``doctor`` and
``plan`` have an argparse parser instead.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of this checkout, whatever is installed

from videor1.config import EvaluateConfig, SFTConfig, TrainConfig  # noqa: E402
from videor1.config.fields import SHORTHANDS, collect_options, options_table  # noqa: E402

FOLDER = ROOT / "docs" / "options"
CONFIGS = {
    "train": (
        TrainConfig,
        "trains with T-GRPO. Without a model and data it runs the demonstration; with `--plan` it "
        "prints what the run would take of a GPU's memory, and exits.",
    ),
    "sft": (SFTConfig, "makes the cold start: supervised training on chain-of-thought data."),
    "evaluate": (
        EvaluateConfig,
        "asks a model the questions of benchmarks or of a data file, from frames in order and from shuffled frames.",
    ),
}
PARSERS = ("report", "doctor", "plan")
NOTE = "<!-- Made by python docs/make_options.py --write: mend the docstrings of the options, not this page. -->"
HOW = """\
`--config FILE.yaml` reads options from a YAML file, or from a recipe by its name; it may be given several times, and
later files win. Options on the command line win over all files. `--help` shows this list, and `--print_config` the
options that a command results in. An unknown option is an error that names the nearest one."""


def pages() -> dict[str, str]:
    """Every page by its file name."""
    made = {f"{name}.md": _config_page(name, *told) for name, told in CONFIGS.items()}
    return made | {f"{name}.md": _parser_page(name, parser_of(main_of(f"videor1.{name}"))) for name in PARSERS}


def _config_page(name: str, config: type, does: str) -> str:
    lines = [f"# Options of {name}", "", NOTE, "", f"`python -m videor1.{name}` {does}", "", HOW]
    head, rule, *rows = options_table(config).splitlines()
    options = zip(collect_options(config).values(), rows, strict=True)
    # A section's options may stand between others: the sort is stable, and the options without a section come first.
    order = list(dict.fromkeys(["", *(option.section for option in collect_options(config).values())]))
    by_section = sorted(options, key=lambda pair: order.index(pair[0].section))
    for section, group in groupby(by_section, key=lambda pair: pair[0].section):
        found = list(group)
        lines += ["", f"## {section or 'General'}", ""]
        if section:
            lines += [found[0][0].title, ""]
        if section in SHORTHANDS:
            lines[-2] += f" `--{section} true|false` is short for `--{SHORTHANDS[section]}`."
        lines += [head, rule, *(_portable(row) for _, row in found)]
    return "\n".join(lines) + "\n"


def _portable(row: str) -> str:
    """Entities where one reader of Markdown knows a backslash before a character and the other does not."""
    return row.replace("\\<", "&lt;").replace("\\~", "&#126;")


def _parser_page(name: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"# Options of {name}", "", NOTE, "", f"`{parser.prog}`: {parser.description}", ""]
    lines += ["| Option | Meaning |", "|---|---|", *_rows(parser)]
    return "\n".join([*lines, *(["", parser.epilog] if parser.epilog else [])]) + "\n"


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            value = f" {action.metavar}" if action.option_strings and action.metavar else ""
            shown = ", ".join(action.option_strings) or str(action.metavar)
            yield f"| `{shown}{value}` | {action.help} |"


def main_of(module: str) -> Callable[..., object]:
    """The ``main`` that ``python -m module`` runs."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ValueError(f"no module {module}")
    return importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main


class _Caught(BaseException):
    """Carries a parser out of a command."""


def parser_of(main: Callable[..., object]) -> argparse.ArgumentParser:
    """The argparse parser that a command's ``main`` makes, taken at the moment when it would parse."""

    def catch(parser: argparse.ArgumentParser, *arguments: object, **named: object) -> NoReturn:
        raise _Caught(parser)

    try:
        with mock.patch.multiple(argparse.ArgumentParser, parse_args=catch, parse_known_args=catch):
            main([]) if inspect.signature(main).parameters else main()
    except _Caught as caught:
        return caught.args[0]
    raise ValueError(f"{main.__module__}.main: expected a command that parses its arguments with argparse")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python docs/make_options.py", description="Make the pages of docs/options.")
    parser.add_argument("--write", action="store_true", help="write them; without it, list what is not current")
    write = parser.parse_args(argv).write
    stale = [
        name
        for name, text in pages().items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != text
    ]
    for name in stale:
        if write:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / name).write_text(pages()[name], encoding="utf-8")
        print(f"{'written' if write else 'not current'}: docs/options/{name}")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    sys.exit(main())
