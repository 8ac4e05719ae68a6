"""Python sources, read through `ast` and never executed: literals, names bound once, dates and zones."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Any

from worker.errors import DefinitionError
from worker.features.importing.entries import NotTaken, zone_of

_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
# Names may refer to names; more than this is a cycle.
_MAX_REFERENCES = 20
_MAX_ITEMS = 1000
# Methods that change a list, a set or a dict.
_CHANGES = {
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("add", "discard", "update", "setdefault", "popitem", "difference_update", "intersection_update"),
}
_LARGEST = 10**15
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.comprehension, *_COMPREHENSIONS)
_NO_PLAIN_VALUE: Mapping[type[ast.AST], str] = {
    **dict.fromkeys(_COMPREHENSIONS, "a comprehension"),
    ast.JoinedStr: "an f-string",
    ast.Lambda: "a lambda",
    ast.IfExp: "a conditional expression",
    ast.Subscript: "a subscript",
    ast.Starred: "an unpacking",
    ast.Await: "an await",
}
_UTC = ("timezone.utc", "datetime.UTC", "pytz.utc", "pytz.UTC", "UTC", "utc")


@dataclass(frozen=True, slots=True)
class FoundNode:
    """A node; `context` is `loop`, `condition` or empty, `function` the innermost function's name."""

    node: ast.AST
    context: str = ""
    function: str = ""

    def refuse_loop(self) -> None:
        """Raise NotTaken in a loop."""
        if self.context == "loop":
            raise NotTaken("it is in a loop: only running the code would tell how often")


class PythonSource:
    """A parsed module. `resolve` and `value` raise NotTaken for what only running the code would tell."""

    def __init__(self, text: str) -> None:
        """Raises DefinitionError if the text is not Python."""
        try:
            with warnings.catch_warnings():
                # Such as an invalid escape sequence.
                warnings.simplefilter("ignore")
                self.tree = ast.parse(text)
        except SyntaxError as error:
            raise DefinitionError(
                f"line {error.lineno}: not valid Python: {error.msg}",
                fix="name the Python file that has the schedule; this release reads the syntax of its own "
                "interpreter",
            ) from None
        except (RecursionError, MemoryError, ValueError):
            raise DefinitionError(
                "the file cannot be read as Python", fix="name the Python file that has the schedule"
            ) from None
        self.found = list(self._walk())
        self._imports = dict(self._imported())
        self._bound: dict[str, ast.expr | None] = {}
        self._changed: set[str] = set()
        for each in self.found:
            self._bind(each.node)

    def _walk(self) -> Iterator[FoundNode]:
        """All nodes, in the order of the source."""
        waiting = [FoundNode(self.tree)]
        while waiting:
            here = waiting.pop()
            yield here
            context, function = here.context, here.function
            if isinstance(here.node, _LOOPS):
                context = "loop"
            elif isinstance(here.node, ast.If | ast.Try | ast.Match) and not _always(here.node):
                context = context or "condition"
            elif isinstance(here.node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = here.node.name
            children = list(ast.iter_child_nodes(here.node))
            waiting.extend(FoundNode(child, context, function) for child in reversed(children))

    def _imported(self) -> Iterator[tuple[str, str]]:
        for each in self.found:
            if isinstance(each.node, ast.Import):
                for alias in each.node.names:
                    if alias.asname:
                        yield alias.asname, alias.name
            elif isinstance(each.node, ast.ImportFrom):
                for alias in each.node.names:
                    module = f"{each.node.module}." if each.node.module else ""
                    yield alias.asname or alias.name, module + alias.name

    def _bind(self, node: ast.AST) -> None:
        targets, value = assigned(node)
        if isinstance(node, ast.AugAssign):
            value = None
        elif isinstance(node, ast.For | ast.AsyncFor | ast.NamedExpr | ast.comprehension):
            targets = [node.target]
        elif isinstance(node, ast.arg):
            self._bound[node.arg] = None
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.attr in _CHANGES
        ):
            self._changed.add(node.func.value.id)
        for target in targets:
            if isinstance(target, ast.Name):
                # A name that is bound twice has no certain value.
                self._bound[target.id] = None if target.id in self._bound else value
            elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                self._changed.add(target.value.id)
            else:
                self._bound.update((name, None) for name in _names_in(target))

    def path(self, node: ast.AST) -> str:
        """The dotted path of a name or attribute, with its import resolved; empty for anything else."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self._imports.get(node.id, node.id), *reversed(parts)])

    def called(self, node: ast.AST) -> str:
        """The last part of the path of the called function, such as `crontab`; empty for other nodes."""
        return self.path(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""

    def is_imported(self, name: str) -> bool:
        return name in self._imports

    def resolve(self, node: ast.expr, *, changed: bool = False) -> ast.expr:
        """The expression that a name bound once stands for, or the node itself.

        A list or dict that the code changes later is accepted only if `changed`.
        """
        for _ in range(_MAX_REFERENCES):
            if not isinstance(node, ast.Name) or node.id not in self._bound:
                return node
            bound = self._bound[node.id]
            if bound is None or (node.id in self._changed and not changed):
                raise NotTaken(f"{node.id} has no value that the source alone tells")
            node = bound
        raise NotTaken("names refer to each other in a circle")

    def value(self, node: ast.expr) -> Any:
        """The value of a literal, of arithmetic on numbers, and of dates, durations and zones."""
        node = self.resolve(node)
        if isinstance(node, ast.Constant) and node.value is not ...:
            return node.value
        if isinstance(node, ast.List):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item) for item in node.elts)
        if isinstance(node, ast.Set):
            return set(map(_hashable, (self.value(item) for item in node.elts)))
        if isinstance(node, ast.Dict):
            return {_hashable(key): self.value(inner) for key, inner in self.pairs(node)}
        if isinstance(node, ast.UnaryOp | ast.BinOp):
            return self._arithmetic(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        path = self.path(node)
        if path in _UTC or path.endswith((".timezone.utc", "datetime.UTC")):
            return zone_of("UTC")
        raise NotTaken(f"{self.shown(node)} is not a literal: only running the code would tell its value")

    def pairs(self, node: ast.expr, *, changed: bool = False) -> list[tuple[Any, ast.expr]]:
        """The keys, evaluated, and the values of a dict display or of a call such as `dict(a=1)`."""
        node = self.resolve(node, changed=changed)
        if isinstance(node, ast.Dict):
            return [(self.key(key), value) for key, value in zip(node.keys, node.values, strict=True)]
        if isinstance(node, ast.Call) and self.called(node) == "dict" and not node.args:
            return list(self.keywords(node).items())
        raise NotTaken(
            f"{self.shown(node)} is not a dict literal: only running the code would tell its value"
        )

    def key(self, key: ast.expr | None) -> Any:
        """The value of a key of a dict display."""
        if key is None:
            raise NotTaken("** unpacks what only running the code would tell")
        return self.value(key)

    def keywords(self, call: ast.Call) -> dict[str, ast.expr]:
        """The keyword arguments of a call."""
        if any(keyword.arg is None for keyword in call.keywords):
            raise NotTaken("** unpacks what only running the code would tell")
        return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}

    def literal(self, given: Mapping[str, ast.expr], key: str, default: Any = None) -> Any:
        """The value of one of these arguments, or the default if it is not given."""
        return self.value(given[key]) if key in given else default

    def arguments(self, call: ast.Call, names: tuple[str, ...]) -> dict[str, ast.expr]:
        """All arguments of a call by name; `names` are those of the positional ones."""
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            raise NotTaken("* unpacks what only running the code would tell")
        if len(call.args) > len(names):
            raise NotTaken(f"{self.shown(call)} has more positional arguments than it takes")
        return dict(zip(names, call.args, strict=False)) | self.keywords(call)

    def shown(self, node: ast.AST) -> str:
        """What a node is, without its value, which may be a secret."""
        if isinstance(node, ast.Call):
            return f"a call of {self.path(node.func) or 'a function'}"
        return _NO_PLAIN_VALUE.get(type(node)) or self.path(node) or "an expression"

    def _arithmetic(self, node: ast.UnaryOp | ast.BinOp) -> Any:
        if isinstance(node, ast.UnaryOp):
            operand = self.value(node.operand)
            if isinstance(node.op, ast.USub) and _is_number(operand):
                return -operand
        elif (operation := _OPERATIONS.get(type(node.op))) is not None:
            left, right = self.value(node.left), self.value(node.right)
            if all(_is_number(side) or isinstance(side, timedelta) for side in (left, right)):
                try:
                    found = operation(left, right)
                except (ArithmeticError, TypeError) as error:
                    raise NotTaken(f"its arithmetic fails: {error}") from None
                if not _is_number(found) or abs(found) <= _LARGEST:
                    return found
        raise NotTaken("an expression is not a literal: only running the code would tell its value")

    def _call(self, node: ast.Call) -> Any:
        name = self.called(node)
        try:
            if name == "dict":
                return {key: self.value(inner) for key, inner in self.pairs(node)}
            positional = [self.value(argument) for argument in node.args]
            named = {key: self.value(inner) for key, inner in self.keywords(node).items()}
            if make := _CONSTRUCTORS.get(name):
                return make(*positional, **named)
            if name == "range" and not named:
                found = range(*positional)
                if len(found) <= _MAX_ITEMS:
                    return list(found)
        except NotTaken:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise NotTaken(f"{name}: {error}") from None
        raise NotTaken(f"{self.shown(node)} is not a literal: only running the code would tell its value")


def assigned(node: ast.AST) -> tuple[list[ast.expr], ast.expr | None]:
    """The targets of an assignment, and its value; no targets for other nodes."""
    if isinstance(node, ast.AnnAssign | ast.AugAssign):
        return [node.target], node.value
    return (node.targets, node.value) if isinstance(node, ast.Assign) else ([], None)


def literal_argument(call: ast.Call, *names: str) -> str:
    """The first of these keyword arguments that is literal, as text; empty if none is."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    values = (given.get(name) for name in names)
    return next((str(value.value) for value in values if isinstance(value, ast.Constant)), "")


def literal_pairs(node: ast.expr) -> list[tuple[str, ast.expr]]:
    """The pairs of a dict display whose keys are literal texts."""
    pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
    return [
        (key.value, value)
        for key, value in pairs
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    ]


def _zone(value: Any) -> tzinfo:
    """As `timezone` of pytz with a name, and of datetime with an offset."""
    if isinstance(value, str):
        return zone_of(value)
    return zone_of("UTC") if value == timedelta(0) else timezone(value)


_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    **{"timedelta": timedelta, "datetime": datetime, "date": date},
    **{"ZoneInfo": zone_of, "gettz": zone_of, "timezone": _zone},
}


def _always(node: ast.If | ast.Try | ast.Match) -> bool:
    """Whether the body runs in any case: `if __name__ == "__main__"` is how the program starts."""
    if isinstance(node, ast.Try):
        return True
    return isinstance(node, ast.If) and any(
        isinstance(each, ast.Name) and each.id in ("__name__", "TYPE_CHECKING")
        for each in ast.walk(node.test)
    )


def _names_in(target: ast.expr) -> list[str]:
    """The names that an assignment to several targets binds."""
    nodes = ast.walk(target)
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise NotTaken("a key or an item of a set is not hashable") from None
    return value
