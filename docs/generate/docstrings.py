"""Attribute docstrings: the string below an annotated attribute, as editors show it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from itertools import pairwise


def attributes(owner: type) -> Mapping[str, tuple[str, str]]:
    """Map each documented attribute to its annotation and its docstring on one line."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    found = {}
    for before, after in pairwise(getattr(tree, "body", ())):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and _is_text(after):
            text = " ".join(ast.literal_eval(after.value).split())
            found[before.target.id] = (ast.unparse(before.annotation), text)
    return found


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
