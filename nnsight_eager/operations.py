"""The calls and assignments in a function, named, and the same function with each of them called apart.

    found = dissected(function)
    found.operations                             # {"self_c_attn_0": ..., "query_states_0": ..., "query_states_view_0": ...}
    found.calling(function, calls)               # calls("self_c_attn_0", self.c_attn, hidden_states) where it was a call

A name is the dotted name of what is called, or assigned to, with `_` between its parts, and a number that counts the same name
in the order of evaluation: arguments come before their call, a value before its assignment. `x += y` is `x_iadd_0`. Calls that
look at the frame they stand in (`super()`, `locals()`) are left alone.
"""

import ast
import copy
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple

from .errors import SourceError
from .rewriting import FUTURES, Comprehension, FunctionScope, Scope, without_asserts
from .texts import Known, facts, parsed, text_of

CALLS: Final = "(calls)"
"""The keyword under which the rewritten function is given what it calls: no identifier looks like this."""

OF_THE_FRAME: Final = frozenset({"super", "locals", "vars", "dir", "eval", "exec", "globals"})
LISTING: Final = frozenset({"locals", "vars", "dir"})
"""Those that, called without arguments, list the frame's names, and `CALLS` among them."""


class Calls:
    """What the rewritten function calls in the place of each operation; as it stands here, nothing changes."""

    __slots__ = ()

    def __call__(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, which is the operation `name`."""
        return function(*args, **kwargs)

    def assigned(self, name: str, value: Any) -> Any:
        """Give back `value`, whose assignment is the operation `name`."""
        return value

    def own(self, names: Any) -> Any:
        """What `locals()`, `vars()` or `dir()` lists in the function as it is written: without `CALLS`."""
        if isinstance(names, list):
            return [each for each in names if each != CALLS]
        return {name: value for name, value in names.items() if name != CALLS} if CALLS in names else names


class Operation(NamedTuple):
    """One call or assignment: its name, its line in the file, and the expression called; none in a scope of its own."""

    name: str
    line: int
    callee: ast.expr | None


class Dissected(NamedTuple):
    """One function's operations, in the order of evaluation, its text, and the code that calls them apart."""

    operations: dict[str, Operation]
    lines: list[str]
    first_line: int
    code: CodeType

    def calling(self, function: FunctionType, calls: Calls) -> FunctionType:
        """`function` with `calls` in the place of its operations."""
        assert function.__closure__ is not None or not self.code.co_freevars
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        closure = tuple(cells[name] for name in self.code.co_freevars)
        rewritten = FunctionType(self.code, function.__globals__, function.__name__, function.__defaults__, closure)
        rewritten.__kwdefaults__ = {**(function.__kwdefaults__ or {}), CALLS: calls}
        return rewritten


_known: Final = Known[list[Dissected]](lambda _: [])
"""The code that has been dissected: each once."""


def dissected(function: FunctionType) -> Dissected:
    """The operations of a Python function; `SourceError` where its source is not to be had."""
    known = _known.of(function.__code__)
    if not known:
        known.append(_dissected(function.__code__, text_of(function.__code__, function.__globals__), called(function)))
    return known[0]


def called(call: Any) -> str:
    """How a function is called."""
    return getattr(call, "__qualname__", None) or type(call).__qualname__


def _dissected(code: CodeType, text: str, name: str) -> Dissected:
    """The operations of the function that was compiled to `code`, found in its file's text."""
    found = node_of(code, text)
    if found is None:
        raise SourceError(
            f"The operations of `{name}` cannot be told: there is no source to be had for it in {code.co_filename!r}.",
            "Read the outputs of its modules instead, or define it in a file or a notebook cell.",
        )
    statement, function = found
    # What is imported is called in another way than what is not, which shows where a call has many arguments (CPython 3.11).
    imports = [*_imports(parsed(text, code.co_filename).body)]
    (plain,) = without_asserts([statement])  # a test runner rewrites them
    if not facts(_code_in([*imports, plain], code)) <= facts(code):
        raise SourceError(
            f"The operations of `{name}` cannot be told: {code.co_filename!r} no longer holds the code that is running.",
            "Import the file once more.",
        )
    whole = copy.deepcopy(statement)
    copied = next(each for each, like in zip(ast.walk(whole), ast.walk(statement), strict=True) if like is function)
    rewriting = _Apart()
    rewriting.function(copied)
    first = code.co_firstlineno
    lines = text.split("\n")[first - 1 : function.end_lineno]  # `splitlines` also splits at a form feed
    return Dissected(rewriting.found, lines, first, _code_in([*imports, ast.fix_missing_locations(whole)], code))


def node_of(code: CodeType, text: str) -> tuple[ast.stmt, FunctionScope] | None:
    """The statement of the module that a function is in, and the function itself; `None` where that is not certain."""
    try:
        tree = parsed(text, code.co_filename)
    except (SyntaxError, ValueError):
        return None
    found = [
        (statement, each)
        for statement in tree.body
        if _first_line(statement) <= code.co_firstlineno <= (statement.end_lineno or 0)
        for each in ast.walk(statement)
        if isinstance(each, FunctionScope)
        and getattr(each, "name", "<lambda>") == code.co_name
        and _first_line(each) == code.co_firstlineno
    ]
    return found[0] if len(found) == 1 else None


def _first_line(node: Any) -> int:
    """Where a definition begins: at its first decorator."""
    lines: list[int] = [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]
    return min(lines)


def _imports(body: Iterable[ast.AST]) -> Iterator[ast.stmt]:
    """The imports of a module, under whatever `if` and `try`, apart from those in functions and classes."""
    for node in body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            yield node
        elif not isinstance(node, Scope):
            yield from _imports(ast.iter_child_nodes(node))


def _code_in(statements: list[ast.stmt], code: CodeType) -> CodeType:
    """The code of the function that `code` is of, in its statement, and what it needs around it, compiled anew."""
    module = ast.Module(body=statements, type_ignores=[])
    compiled = compile(module, code.co_filename, "exec", flags=code.co_flags & FUTURES, dont_inherit=True)
    return next(
        each for each in _inside(compiled) if (each.co_name, each.co_firstlineno) == (code.co_name, code.co_firstlineno)
    )


def _inside(code: CodeType) -> Iterator[CodeType]:
    """All code that is made by `code`."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _inside(each)


class _Apart(ast.NodeTransformer):
    """Puts a call of `CALLS` in the place of every operation, and notes them."""

    def __init__(self) -> None:
        self.found: dict[str, Operation] = {}
        self._counts: dict[str, int] = {}
        self._depth = 0  # of scopes in the function: in them a name may mean something else

    def visit(self, node: ast.AST) -> Any:
        inner = isinstance(node, (Scope, Comprehension))
        self._depth += inner
        done = super().visit(node)
        self._depth -= inner
        return done

    def function(self, node: Any) -> None:
        """Rewrite the function itself: what is evaluated where it is defined stays."""
        node.args.kwonlyargs.append(ast.arg(CALLS))
        node.args.kw_defaults.append(None)
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = [done for each in node.body for done in self._statements(each)]

    def _statements(self, node: ast.stmt) -> list[ast.stmt]:
        done = self.visit(node)
        return done if isinstance(done, list) else [done]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in OF_THE_FRAME:
            own = ast.Attribute(ast.Name(CALLS, ast.Load()), "own", ast.Load())
            listing = node.func.id in LISTING and not (node.args or node.keywords)
            self.generic_visit(node)
            return ast.copy_location(ast.Call(own, [node], []), node) if listing else node
        callee = copy.deepcopy(node.func)
        self.generic_visit(node)
        name = self._note(_dotted(callee) or "call", node, callee)
        call = ast.Call(ast.Name(CALLS, ast.Load()), [ast.Constant(name), node.func, *node.args], node.keywords)
        return _as_in_a_traceback(ast.copy_location(call, node), callee)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = self.visit(node.value)
        node.targets = [self.visit(each) for each in node.targets]
        if len(node.targets) == 1:
            node.value = self._assigned(node.targets[0], node.value, node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self._assigned(node.target, self.visit(node.value), node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        name = self._note(f"{node.target.id}_i{IN_PLACE[type(node.op)]}", node)
        now = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        return [node, ast.copy_location(ast.Assign([ast.Name(node.target.id, ast.Store())], _given(name, now, node)), node)]

    def _assigned(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> ast.expr:
        """A value on its way to a target; of `a, b = x, y` each on its own."""
        if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
            starred = any(isinstance(each, ast.Starred) for each in (*target.elts, *value.elts))
            if not starred and len(target.elts) == len(value.elts):
                value.elts = [self._assigned(*pair, node) for pair in zip(target.elts, value.elts, strict=True)]
        return _given(self._note(_dotted(target), node), value, node) if _begins_with_a_name(target) else value

    def _note(self, dotted: str, node: ast.expr | ast.stmt, callee: ast.expr | None = None) -> str:
        """Give an operation its name."""
        number = self._counts.get(dotted, 0)
        self._counts[dotted] = number + 1
        name = f"{dotted}_{number}"
        self.found[name] = Operation(name, node.lineno, None if self._depth else callee)
        return name


IN_PLACE: Final = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.MatMult: "matmul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.LShift: "lshift",
    ast.RShift: "rshift",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.BitAnd: "and",
}
"""What Python calls `+=` and its like: `__iadd__`."""


def _as_in_a_traceback(call: ast.Call, callee: ast.expr) -> ast.Call:
    """Have a method's call stand on the line of the method's name, as CPython has it where a chain goes over several lines."""
    if isinstance(callee, ast.Attribute) and callee.end_lineno != callee.lineno:
        assert callee.end_lineno is not None
        assert callee.end_col_offset is not None
        call.lineno, call.col_offset = callee.end_lineno, callee.end_col_offset - len(callee.attr)
    return call


def _given(name: str, value: ast.expr, node: ast.stmt) -> ast.expr:
    """`value`, shown to `CALLS` on its way."""
    method = ast.Attribute(ast.Name(CALLS, ast.Load()), "assigned", ast.Load())
    return ast.copy_location(ast.Call(method, [ast.Constant(name), value], []), node)


def _begins_with_a_name(target: ast.expr) -> bool:
    """Whether a target is a variable or a place in one, and not, say, an item of what a call returns."""
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        target = target.value
    return isinstance(target, ast.Name)


def _dotted(node: ast.expr) -> str:
    """`self.c_proj` as `self_c_proj`; what stands in brackets is left out."""
    parts = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return "_".join(reversed(parts))
