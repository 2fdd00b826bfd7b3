"""The changes: every place of a module where an operator, number or statement can be another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

OTHER: Final[dict[type[ast.AST], type[ast.AST]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


@dataclass(frozen=True)
class Change:
    """One change: the line, what it is, and the source of the changed module."""

    line: int
    what: str
    source: str


def changes(source: str) -> Iterator[Change]:
    """Yield all changes of a module, in the order of its lines."""
    count = len(list(_places(ast.parse(source))))
    for number in range(count):
        tree = ast.parse(source)
        node, kind = list(_places(tree))[number]
        before = ast.unparse(node)
        _apply(tree, node, kind)
        after = ast.unparse(node) if kind != "drop" else "nothing"
        what = f"{before} -> {after}".replace("\n", " ")[:160]
        yield Change(node.lineno, what, ast.unparse(tree))


def _places(tree: ast.AST) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    for node in _code(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
            yield node, "compare"
        elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OTHER:
            yield node, "operator"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            yield node, "unary"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield node, "number"
        elif isinstance(node, ast.If):
            yield node, "condition"
        elif isinstance(node, (ast.Raise, ast.AugAssign)) or _is_call(node):
            yield node, "drop"


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes without annotations, error texts and other keywords of `fail`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.arg) or (
            isinstance(tree, (ast.AnnAssign, ast.FunctionDef))
            and child in (getattr(tree, "annotation", None), getattr(tree, "returns", None))
        ):
            continue
        yield child
        is_error = isinstance(child, ast.Call) and ast.unparse(child.func) in ("fail", "Problem")
        if not is_error and not isinstance(child, ast.JoinedStr):
            yield from _code(child)


def _apply(tree: ast.AST, node: ast.stmt | ast.expr, kind: str) -> None:
    if kind == "compare" and isinstance(node, ast.Compare):
        node.ops[0] = OTHER[type(node.ops[0])]()  # type: ignore[assignment]
    elif kind == "operator":
        node.op = OTHER[type(node.op)]()  # type: ignore[union-attr]
    elif kind == "number" and isinstance(node, ast.Constant):
        value = node.value
        node.value = not value if isinstance(value, bool) else value + 1  # type: ignore[operator]
    elif kind == "condition" and isinstance(node, ast.If):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif kind == "unary":
        _replace(tree, node, node.operand)  # type: ignore[union-attr]
    else:
        _replace(tree, node, ast.Pass())
    ast.fix_missing_locations(tree)


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and old in value:
                value[value.index(old)] = new
