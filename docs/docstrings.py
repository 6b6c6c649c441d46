"""How the API pages read the packages' docstrings (an extension of griffe, which mkdocstrings reads them with).

A role such as ``:func:`linear_logprob``` becomes a link to that name where a page documents it, and code elsewhere. The
comment above or beside a record's field becomes the field's description.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from field_comments import fields  # noqa: E402 (beside this file, which is loaded by its path)

PAGES = ("kernels/api.md", "training/api.md")
ROLE = re.compile(r":\w+:`~?([^`]+)`")
CODE_FOLLOWS = re.compile(r"::$", re.MULTILINE)
BRACKETS_SIDE_BY_SIDE = re.compile(r"\] ?\[(?=[^\]`]*\])")  # a row such as "[prompt | c1] [prompt | c1]" is no link


def documented(folder: Path = HERE) -> dict[str, str]:
    """Last part of a documented name -> the whole name."""
    text = "".join((folder / page).read_text(encoding="utf-8") for page in PAGES)
    return {name.rpartition(".")[2]: name for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


RETURNS = re.compile(r"(?<=^Returns:\n) [^:\n]*: ", re.MULTILINE)  # griffe would take what stands before for a type
SOURCE = re.compile(r"^Source:\n((?: +.*\n?)+)", re.MULTILINE)
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def _arxiv(match: re.Match[str]) -> str:
    return f"[{match[0]}](https://arxiv.org/abs/{match[1]})"


class Docstrings(griffe.Extension):
    """Loaded by name from mkdocs.yml."""

    def __init__(self) -> None:
        self.documented = documented()

    def on_class_members(self, *, node: Any, cls: griffe.Class, agent: Any, **kwargs: Any) -> None:
        for name, _, meaning in fields("\n".join(cls.lines)):
            if meaning and not cls.members[name].docstring:
                cls.members[name].docstring = griffe.Docstring(self._linked(meaning), parent=cls.members[name])

    def on_instance(self, *, node: Any, obj: griffe.Object, agent: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = self._linked(obj.docstring.value)

    def _linked(self, text: str) -> str:
        text = BRACKETS_SIDE_BY_SIDE.sub(r"] \\[", text)
        text = CODE_FOLLOWS.sub(":", ROLE.sub(self._link, text))
        text = RETURNS.sub(lambda match: match[0].replace(":", "&#58;"), text)
        return SOURCE.sub(lambda match: "**Source:** " + ARXIV.sub(_arxiv, " ".join(match[1].split())), text)

    def _link(self, match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][{self.documented[name]}]" if name in self.documented else f"`{match[1]}`"
