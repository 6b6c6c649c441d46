"""What a record's fields mean, where that stands in a comment above or beside a field and not in a docstring."""

from __future__ import annotations

import ast
import io
import textwrap
import tokenize


def fields(class_source: str) -> list[tuple[str, str, str]]:
    """(name, type, comment) of each annotated field of a class, from its text."""
    text = textwrap.dedent(class_source)
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
