"""What the README and the pages of docs/ hold: blocks of code, links, headings, and commands that can be parsed."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from benchmarks.options import add_options
from videor1.config import TrainConfig
from videor1.config.cli import parse

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = {"vllm", "deepspeed", "mkdocs", "lmms_eval"}  # programs that are not ours


def load(path: Path) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_options = load(ROOT / "docs" / "make_options.py")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands in backticks within the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def links(text: str) -> list[str]:
    """Relative targets of links and pictures."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(text)))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the site make them, and of what a page takes from docstrings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def shell_commands(text: str) -> Iterator[list[str]]:
    """The commands of the bash blocks, in words; variables before them, comments and ``&&`` left out."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                    words.pop(0)
                if words and words[0] != ".":  # ". .venv/bin/activate"
                    yield words


def check_command(words: Sequence[str]) -> None:
    """Fails where a program, module, file or option of a command does not exist."""
    program, rest = words[0], list(words[1:])
    if program == "torchrun":
        program, rest = "python", rest[rest.index("-m") :]
    if program in OTHERS:
        return
    if program == "pip":
        check_extras(rest)
    elif program == "pytest":
        check_pytest(rest)
    elif program == "python" and rest[0] == "-m":
        check_module(rest[1], [word for word in rest[2:] if word != "..."])
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), rest[0]
    else:
        script = ROOT / program
        assert script.is_file(), program
        assert f"\n{rest[0]})" in script.read_text() or f"gpu.sh {rest[0]} " in script.read_text(), rest


def check_extras(words: Sequence[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"\.\[([^\]]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known), extras


def check_pytest(words: Sequence[str]) -> None:
    parser, paths = argparse.ArgumentParser(exit_on_error=False), [word for word in words if (ROOT / word).exists()]
    for option in ("-n", "--dist", "-m", "-k"):
        parser.add_argument(option)
    for option in ("--random-order", "--full"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("paths", nargs="*")
    if any(path.startswith("benchmarks") for path in paths):
        parser.add_argument("--slow", action="store_true")
        add_options(parser.add_argument)
    assert parser.parse_args(words).paths == paths


def check_module(module: str, words: Sequence[str]) -> None:
    """Parse a command of ours as it parses itself."""
    if module.partition(".")[0] in OTHERS:
        return
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            if config := make_options.CONFIGS.get(module.removeprefix("videor1.")):
                parse(config[0], [word for word in words if word != "--plan"], prog=module, description="")
            else:
                rest = make_options.parser_of(make_options.main_of(module)).parse_known_args(list(words))[1]
                if module == "videor1.plan":
                    parse(TrainConfig, rest, prog=module, description="")
                else:
                    assert not rest, f"unknown: {rest}"
        except SystemExit as stopped:  # 0: --help or --print_config
            if stopped.code:
                raise AssertionError(f"{module}: {errors.getvalue()}") from stopped
