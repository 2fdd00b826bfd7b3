"""Checks templates against the types of their content, without rendering them."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from jinja2 import Environment, nodes
from jinja2.runtime import LoopContext

FILTERS = dict.fromkeys(("show", "join", "replace", "truncate", "capitalize", "slug"), str)
FILTERS |= {"length": int, "min": int}


class TemplateTypes:
    """Follows the types of expressions through templates, their loops and their macros.

    Args:
        environment: Environment of the templates.
        content: Type of each variable.

    Attributes:
        faults: "template:line: reads `type.name`" of every attribute that a type does not have.
        read: (type name, attribute) of every attribute of a dataclass that is read.
    """

    def __init__(self, environment: Environment, content: Mapping[str, Any]) -> None:
        self.environment = environment
        self.content = dict(content)
        self.faults: list[str] = []
        self.read: set[tuple[str, str]] = set()
        self.checked: set[tuple[str, str, str]] = set()
        self.template = ""

    def check(self, template: str, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check a template and what it includes; return its names."""
        assert self.environment.loader is not None
        source = self.environment.loader.get_source(self.environment, template)[0]
        before, self.template = self.template, template
        scope = self.content | dict(names or {})
        self._body(_parsed(source).body, scope)
        self.template = before
        return scope

    def _body(self, body: Sequence[nodes.Node], scope: dict[str, Any]) -> None:
        # Macros first: one may call another that is defined below it.
        for node in body:
            if isinstance(node, nodes.Macro):
                scope[node.name] = (self.template, node, scope)
        for node in body:
            self._statement(node, scope)

    def _statement(self, node: nodes.Node, scope: dict[str, Any]) -> None:
        if isinstance(node, nodes.Macro):
            return
        if isinstance(node, nodes.Include):
            name = node.template.value
            if name.endswith(".j2"):
                self.check(name, scope)
        elif isinstance(node, nodes.FromImport):
            found = self.check(node.template.value)
            scope |= {name: found[name] for name in node.names}
        elif isinstance(node, nodes.For):
            inner = scope | {"loop": LoopContext}
            self._assign(node.target, _element(self.type_of(node.iter, scope)), inner)
            if node.test:
                self.type_of(node.test, inner)
            self._body(node.body, inner)
        elif isinstance(node, nodes.If):
            self.type_of(node.test, scope)
            for part in (node.body, node.elif_, node.else_):
                self._body(part, scope)
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, self.type_of(node.node, scope), scope)
        elif isinstance(node, nodes.Output):
            for part in node.nodes:
                self.type_of(part, scope)
        else:
            raise TypeError(f"{self.template}: a statement of an unknown kind, {node}")

    def _assign(self, target: nodes.Node, kind: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, nodes.Tuple):
            for place, part in enumerate(target.items):
                self._assign(part, get_args(kind)[place] if kind else None, scope)
        else:
            assert isinstance(target, nodes.Name)
            scope[target.name] = kind

    def type_of(self, node: nodes.Node, scope: Mapping[str, Any]) -> Any:
        """Type of an expression: `str` for text and numbers of any kind, None if unknown."""
        if isinstance(node, nodes.Name):
            if node.name not in scope:
                self._fault(node, node.name)
            return scope.get(node.name)
        if isinstance(node, nodes.Getattr):
            return self._attribute(node, _without_none(self.type_of(node.node, scope)))
        if isinstance(node, nodes.Getitem):
            kind = self.type_of(node.node, scope)
            self.type_of(node.arg, scope)
            return kind if isinstance(node.arg, nodes.Slice) else _item(kind, node.arg)
        if isinstance(node, nodes.Call):
            return self._call(node, scope)
        if isinstance(node, nodes.Dict):
            return dict
        inner = [self.type_of(child, scope) for child in node.iter_child_nodes()]
        if isinstance(node, nodes.Filter):
            return FILTERS[node.name]
        # The value of a condition is followed through its first branch: `a if b else c`.
        return inner[1] if isinstance(node, nodes.CondExpr) else str

    def _attribute(self, node: nodes.Getattr, kind: Any) -> Any:
        if kind is None:
            return None  # what it depends on was reported
        if is_dataclass(kind):
            self.read |= {(part.__name__, node.attr) for part in kind.__mro__}
            hints = hints_of(kind)
            if node.attr in hints:
                return hints[node.attr]
        elif get_origin(kind) is Mapping:
            if node.attr == "items":
                return Iterable[tuple[get_args(kind)]]
        elif isinstance(kind, dict):
            if node.attr in kind:
                return type(kind[node.attr])
        elif hasattr(kind, node.attr):
            return str
        self._fault(node, f"{getattr(kind, '__name__', kind)}.{node.attr}")
        return None

    def _call(self, node: nodes.Call, scope: Mapping[str, Any]) -> Any:
        called = self.type_of(node.node, scope)
        given = [self.type_of(argument, scope) for argument in node.args]
        if not isinstance(called, tuple):
            return called
        template, macro, own = called
        inner = dict(own)
        defaults = [self.type_of(default, own) for default in macro.defaults]
        names = [argument.name for argument in macro.args]
        inner |= zip(names[len(names) - len(defaults) :], defaults, strict=True)
        inner |= zip(names, given, strict=False)
        key = template, macro.name, str([inner[name] for name in names])
        if key not in self.checked:
            self.checked.add(key)
            before, self.template = self.template, template
            self._body(macro.body, inner)
            self.template = before
        return str

    def _fault(self, node: nodes.Node, name: str) -> None:
        self.faults.append(f"{self.template}:{node.lineno}: reads `{name}`")


@cache
def _parsed(source: str) -> nodes.Template:
    return Environment().parse(source)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Types of the fields and properties of a dataclass."""
    hints = get_type_hints(kind)
    found = {part.name: hints[part.name] for part in fields(kind)}
    for name in dir(kind):
        part = getattr(kind, name)
        if isinstance(part, property):
            found[name] = get_type_hints(part.fget)["return"]
    return found


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = [part for part in get_args(kind) if part is not type(None)]
    return kind


def _element(kind: Any) -> Any:
    """Type of the elements of a sequence."""
    if isinstance(kind, (list, tuple)):  # a constant of the environment
        return tuple[tuple(type(part) for part in kind[0])]
    return get_args(_without_none(kind))[0] if kind else None


def _item(kind: Any, index: nodes.Node) -> Any:
    kind = _without_none(kind)
    if kind is None:
        return None
    if kind is str or isinstance(kind, (dict, list, tuple)):
        return str
    arguments = get_args(kind)
    if get_origin(kind) is Mapping:
        return arguments[1]
    if get_origin(kind) is tuple and Ellipsis not in arguments:
        return arguments[index.as_const()]
    return arguments[0]
