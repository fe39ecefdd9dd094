"""Whether a chat template takes message content as text or as a list of parts, by its syntax tree (SPEC 11.3).

Each expression has kinds: what of the conversation it may be. They are followed through assignments, loops, slices,
filters and macros until nothing new is found. A template that goes over some content takes parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from jinja2 import nodes


class Kind(Enum):
    MESSAGES = auto()
    MESSAGE = auto()
    CONTENT = auto()
    CONTENTS = auto()
    """Content of several messages."""
    OTHER = auto()
    """Text, parts, documents, tools."""


Kinds = frozenset[Kind]
UNKNOWN: Kinds = frozenset()
OTHER: Kinds = frozenset({Kind.OTHER})
ITEMS = {Kind.MESSAGES: Kind.MESSAGE, Kind.CONTENTS: Kind.CONTENT, Kind.CONTENT: Kind.OTHER, Kind.OTHER: Kind.OTHER}
SOURCES = {"messages": frozenset({Kind.MESSAGES}), "documents": OTHER, "tools": OTHER}
LISTS = {"list", "reverse", "sort", "unique", "batch", "slice", "select", "reject", "selectattr", "rejectattr"}
"""Filters that leave items of a list as they are."""
PART_FILTERS = {"selectattr", "rejectattr", "map"}
"""Filters that no text is given to."""
PICKS = {"first", "last", "random"}
SAME = {"default", "d"}


def detect_content_format(tree: nodes.Template) -> str:
    """openai when the template goes over a message's content, else string."""
    return "openai" if _Analysis(tree).takes_parts else "string"


class _Analysis:
    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._names: dict[str, Kinds] = dict(SOURCES)
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        self._has_changed = True
        self.takes_parts = False
        while self._has_changed and not self.takes_parts:
            self._has_changed = False
            self._visit(tree)

    def _visit(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Assign):
            self._assign(node.target, node.node)
        elif isinstance(node, nodes.AssignBlock):
            self._bind(node.target, OTHER)
        elif isinstance(node, nodes.For):
            self._loop(node)
        elif isinstance(node, nodes.Call):
            self._call(node)
        elif isinstance(node, nodes.Expr):
            self._kinds(node)  # for what it says of its parts
        for child in node.iter_child_nodes():
            self._visit(child)

    def _assign(self, target: nodes.Node, value: nodes.Expr) -> None:
        if isinstance(target, nodes.Tuple) and isinstance(value, nodes.Tuple) and len(target.items) == len(value.items):
            for one, other in zip(target.items, value.items, strict=True):
                self._assign(one, other)
            return
        self._bind(target, self._kinds(value))
        is_namespace = isinstance(value, nodes.Call) and isinstance(value.node, nodes.Name)
        if is_namespace and value.node.name in ("namespace", "dict") and isinstance(target, nodes.Name):
            for keyword in value.kwargs:
                self._add(f"{target.name}.{keyword.key}", self._kinds(keyword.value))

    def _loop(self, node: nodes.For) -> None:
        kinds = self._kinds(node.iter)
        self._see_parts(kinds)
        self._bind(node.target, frozenset(ITEMS[kind] for kind in kinds if kind in ITEMS))
        if Kind.MESSAGES in kinds:
            for name in ("loop.previtem", "loop.nextitem"):
                self._add(name, frozenset({Kind.MESSAGE}))

    def _call(self, node: nodes.Call) -> None:
        """Bind the parameters of a macro to what it is called with."""
        macro = self._macros.get(node.node.name) if isinstance(node.node, nodes.Name) else None
        if macro is None:
            return
        for parameter, value in zip(macro.args, node.args, strict=False):
            self._add(parameter.name, self._kinds(value))
        for keyword in node.kwargs:
            self._add(keyword.key, self._kinds(keyword.value))

    def _bind(self, target: nodes.Node, kinds: Kinds) -> None:
        if isinstance(target, nodes.Tuple):
            for item in target.items:
                self._bind(item, OTHER if kinds else UNKNOWN)
        elif isinstance(target, nodes.NSRef):
            self._add(f"{target.name}.{target.attr}", kinds)
        elif isinstance(target, nodes.Name):
            self._add(target.name, kinds)

    def _add(self, name: str, kinds: Kinds) -> None:
        known = self._names.get(name, UNKNOWN)
        if not kinds <= known:
            self._names[name] = known | kinds
            self._has_changed = True

    def _see_parts(self, kinds: Iterable[Kind]) -> None:
        self.takes_parts = self.takes_parts or Kind.CONTENT in kinds

    def _kinds(self, node: nodes.Node | None) -> Kinds:
        """Empty where nothing is known."""
        if isinstance(node, nodes.Name):
            return self._names.get(node.name, UNKNOWN)
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            return self._item(node)
        if isinstance(node, nodes.Filter):
            return self._filtered(node)
        if isinstance(node, nodes.CondExpr):
            return self._kinds(node.expr1) | self._kinds(node.expr2)
        if isinstance(node, nodes.Or | nodes.And):
            return self._kinds(node.left) | self._kinds(node.right)
        if isinstance(node, nodes.Add):  # lists of messages; content that something is added to is text
            return ((self._kinds(node.left) | self._kinds(node.right)) & {Kind.MESSAGES}) or OTHER
        if isinstance(node, nodes.List | nodes.Tuple):
            inner = frozenset().union(*(self._kinds(item) for item in node.items))
            return frozenset({Kind.MESSAGES}) if Kind.MESSAGE in inner else OTHER
        if isinstance(node, nodes.Call):
            return self._result(node)
        return OTHER if isinstance(node, nodes.Expr) else UNKNOWN

    def _item(self, node: nodes.Getattr | nodes.Getitem) -> Kinds:
        """Of `node.attr`, `node['attr']`, `node[number]` and `node[a:b]`."""
        key = node.attr if isinstance(node, nodes.Getattr) else node.arg
        if isinstance(key, nodes.Const):
            key = key.value
        if isinstance(node.node, nodes.Name) and f"{node.node.name}.{key}" in self._names:
            return self._names[f"{node.node.name}.{key}"]
        base = self._kinds(node.node)
        if isinstance(key, nodes.Slice):
            return base
        if isinstance(key, str):
            inner = node.node
            if isinstance(inner, nodes.Getitem) and not isinstance(inner.arg, nodes.Slice):
                self._see_parts(self._kinds(inner.node) if key in ("text", "type") else ())  # content[0].text
            is_content = key == "content" and base != OTHER and Kind.CONTENT not in base
            return frozenset({Kind.CONTENT}) if is_content else OTHER if base else UNKNOWN
        return frozenset(ITEMS[kind] for kind in base if kind in ITEMS)

    def _filtered(self, node: nodes.Filter) -> Kinds:
        base = self._kinds(node.node)
        if node.name in PART_FILTERS:
            self._see_parts(base)
        if node.name in SAME:
            return base.union(*(self._kinds(value) for value in node.args)) - ({Kind.OTHER} if base else set())
        if node.name in LISTS:
            return base
        if node.name in PICKS:
            return frozenset(ITEMS[kind] for kind in base if kind in ITEMS)
        is_contents = node.name == "map" and any(
            keyword.key == "attribute" and isinstance(keyword.value, nodes.Const) and keyword.value.value == "content"
            for keyword in node.kwargs
        )
        return frozenset({Kind.CONTENTS}) if is_contents and Kind.MESSAGES in base else OTHER

    def _result(self, node: nodes.Call) -> Kinds:
        """Of a call: a message's get('content'), or text and the like."""
        method = node.node
        if isinstance(method, nodes.Getattr) and method.attr == "get" and node.args:
            name = node.args[0].value if isinstance(node.args[0], nodes.Const) else None
            return self._item(nodes.Getattr(method.node, str(name), "load"))
        return OTHER
