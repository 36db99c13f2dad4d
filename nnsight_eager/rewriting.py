"""Statements compiled as a function whose names are all global, so that one dictionary holds them.

    code = as_function(node.body, frame.f_code, "script.py", "Owner")
    FunctionType(code, names)()          # runs the statements; what they bind is in `names`

Compiled inside a class and a function of the same names and with the same compiler flags, the statements mean what they meant:
`__private` names, `super()`, `from __future__`, nested functions and comprehensions.
"""

import __future__

import ast
import copy
import dis
import functools
import inspect
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import Any, Final, NamedTuple

FunctionScope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Scope = FunctionScope | ast.ClassDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp

FUTURES: Final = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
DELETED: Final = " (deleted)"
CAUGHT: Final = " (caught)"
"""What a name that `del`, or the end of an `except` block, has deleted is marked with: no identifier ends like this."""

LEAVES: Final = {
    ast.Return: "return",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
    ast.Await: "await",
    ast.AsyncFor: "async for",
    ast.AsyncWith: "async with",
}


def leaving(nodes: Iterable[ast.AST], in_loop: bool = False) -> Iterator[str]:
    """What in these statements would leave them, or wait inside them, as one would write it."""
    for node in nodes:
        if isinstance(node, tuple(LEAVES)):
            yield LEAVES[type(node)]
        elif isinstance(node, ast.comprehension) and node.is_async:
            yield "async for"
        elif isinstance(node, (ast.Break, ast.Continue)) and not in_loop:
            yield type(node).__name__.lower()
        if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            yield from leaving([node.test] if isinstance(node, ast.While) else [node.target, node.iter])
            yield from leaving(node.body, True)
            yield from leaving(node.orelse, in_loop)
        elif isinstance(node, Scope):
            yield from leaving([*getattr(node, "decorator_list", ()), *_evaluated_outside(node)])
        else:
            yield from leaving(ast.iter_child_nodes(node), in_loop)


def declared_global(nodes: Iterable[ast.AST]) -> frozenset[str]:
    """The names that are declared `global` anywhere in these statements."""
    return frozenset(name for node in nodes for each in ast.walk(node) if isinstance(each, ast.Global) for name in each.names)


def only_in_comprehensions(scope: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    """The names that are variables of comprehensions in a function and not its own: from 3.12 on its code lists them too."""
    inside = {
        name.id
        for node in _in_this_scope(scope.body)
        if isinstance(node, Comprehension)
        for each in ast.walk(node)
        if isinstance(each, ast.comprehension)
        for name in ast.walk(each.target)
        if isinstance(name, ast.Name)
    }
    return frozenset(inside - _bound(scope.body) - _arguments(scope))


def without_asserts(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """The statements with nothing in the place of every `assert`."""
    return [_NoAsserts().visit(copy.deepcopy(node)) for node in body]


def as_function(body: Sequence[ast.stmt], around: CodeType, filename: str, owner: str | None) -> CodeType:
    """The code of a function that does what `body` does inside `around`, a method of the class `owner` if it is one."""
    code = _compiled(body, around, filename, owner, ())
    if "__class__" in code.co_freevars and around.co_argcount:  # `super()` reads the first argument
        code = _compiled(body, around, filename, owner, around.co_varnames[:1])
    return code.replace(co_qualname=around.co_qualname)


def names_of(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """What compiled code may look up by name, what it binds or deletes globally, and what it deletes."""
    loads, stores, deletes = set[str](code.co_names), set[str](), set[str]()
    for each in dis.get_instructions(code):
        if each.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") and not each.argval.endswith(CAUGHT):
            (deletes if each.argval.endswith(DELETED) else stores).add(each.argval.removesuffix(DELETED))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for names, more in zip((loads, stores, deletes), names_of(constant), strict=True):
                names |= more
    return frozenset(loads), frozenset(stores), frozenset(deletes)


class Bindings(NamedTuple):
    """Where compiled code binds its names: to tell, while it runs, whether a name may be bound once more."""

    places: dict[str, tuple[int, ...]]  # the instructions that bind each name
    nested: frozenset[str]  # what a function made by the code may bind, at any time
    loops: tuple[tuple[int, int], ...]  # the first and the last instruction of each

    def ahead(self, name: str, here: int) -> bool:
        """Whether code that has come to the instruction `here` may still bind the name."""
        around = [loop for loop in self.loops if loop[0] <= here <= loop[1]]
        return name in self.nested or any(
            place > here or any(first <= place <= last for first, last in around) for place in self.places.get(name, ())
        )


def bindings_of(code: CodeType) -> Bindings:
    """Where `code` binds its global names."""
    places: dict[str, tuple[int, ...]] = {}
    loops = []
    for each in dis.get_instructions(code):
        if each.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            places[each.argval] = (*places.get(each.argval, ()), each.offset)
        elif each.opcode in dis.hasjrel and each.argval <= each.offset:
            loops.append((each.argval, each.offset))
    nested = frozenset[str]().union(*(names_of(each)[1] for each in code.co_consts if isinstance(each, CodeType)))
    return Bindings(places, nested, tuple(loops))


def _compiled(
    body: Sequence[ast.stmt], around: CodeType, filename: str, owner: str | None, arguments: Sequence[str]
) -> CodeType:
    """The code of the function, taken out of the module it is compiled in."""
    rewrite = _AllGlobal()
    statements = [each for node in body for each in rewrite.statements(copy.deepcopy(node))]
    names = sorted((_bound(body) | rewrite.found) - {*arguments})
    function = ast.FunctionDef(
        name=around.co_name if around.co_name.isidentifier() else "block",
        args=ast.arguments(
            posonlyargs=[], args=[ast.arg(name) for name in arguments], kwonlyargs=[], kw_defaults=[], defaults=[]
        ),
        body=[ast.Global(names) if names else ast.Pass(), *statements],  # in front, so that a string is no docstring
        decorator_list=[],
    )
    whole: ast.stmt = function
    if owner is not None:
        whole = ast.ClassDef(name=owner, bases=[], keywords=[], body=[function], decorator_list=[])
    for node in (function, whole):
        ast.copy_location(node, body[0])
    if sys.version_info >= (3, 12):  # pragma: no cover: measured on 3.11
        function.type_params = []
        if isinstance(whole, ast.ClassDef):
            whole.type_params = []
    module = ast.fix_missing_locations(ast.Module(body=[whole], type_ignores=[]))
    flags = around.co_flags & FUTURES
    code: CodeType = compile(module, filename, "exec", flags=flags, dont_inherit=True)
    while code.co_name != function.name or code.co_flags & inspect.CO_OPTIMIZED == 0:
        code = next(each for each in code.co_consts if isinstance(each, CodeType))
    return code.replace(co_name=around.co_name)


class _AllGlobal(ast.NodeTransformer):
    """Rewrites what a global name cannot be: an annotated target, a `nonlocal` one; and marks what is deleted."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self._inside: list[set[str]] = []  # the names bound by each function around, inside the statements

    def statements(self, node: ast.stmt) -> list[ast.stmt]:
        """What stands for one statement."""
        done = self.visit(node)
        return done if isinstance(done, list) else [done]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node, node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node, node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._inside.append(set())  # a class's names are its own, and no `nonlocal` means them
        self.generic_visit(node)
        self._inside.pop()
        return node

    def visit_Nonlocal(self, node: ast.Nonlocal) -> Any:
        """What no function in between binds is a name of the body, and so a global one."""
        inner = set().union(*self._inside[:-1]) if self._inside else set()
        outside = [name for name in node.names if name not in inner]
        self.found.update(outside)
        declared = [
            kind(names) for kind, names in ((ast.Global, outside), (ast.Nonlocal, [*inner.intersection(node.names)])) if names
        ]
        return [ast.copy_location(each, node) for each in declared] if self._inside else ast.copy_location(ast.Pass(), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if self._inside or not isinstance(node.target, ast.Name):
            return node
        plain = ast.Assign(targets=[node.target], value=node.value) if node.value is not None else ast.Pass()
        return ast.copy_location(plain, node)

    def visit_Delete(self, node: ast.Delete) -> Any:
        """`del x` becomes `x = x`, which finds it wherever it is, `del x`, and a mark."""
        names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Del)]
        if self._inside or not names:
            return node
        fetch = [ast.Assign(targets=[ast.Name(name, ast.Store())], value=ast.Name(name, ast.Load())) for name in names]
        mark = [self._mark(name + DELETED) for name in names]
        return [ast.copy_location(each, node) for each in (*fetch, node, *mark)]

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        """`except E as x:` deletes `x` at its end: the mark, made before, counts when `x` is gone."""
        self.generic_visit(node)
        if node.name is not None and not self._inside:
            node.body.insert(0, ast.copy_location(self._mark(node.name + CAUGHT), node.body[0]))
        return node

    def _mark(self, name: str) -> ast.stmt:
        self.found.add(name)
        return ast.Assign(targets=[ast.Name(name, ast.Store())], value=ast.Constant(True))

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, body: Iterable[ast.AST]) -> ast.AST:
        self._inside.append(_bound(body) | _arguments(node))
        self.generic_visit(node)
        self._inside.pop()
        return node


class _NoAsserts(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The names of a function's parameters."""
    arguments = node.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    return {each.arg for each in every if each is not None}


def _bound(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that these statements bind or delete in their own scope."""
    names: set[str] = set()
    declared: set[str] = set()
    for node in _in_this_scope(nodes):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            declared.update(node.names)
    return names - declared


def _in_this_scope(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every node of these statements, without what lies in a scope of its own."""
    for node in nodes:
        yield node
        if isinstance(node, Scope):
            yield from _in_this_scope((*getattr(node, "decorator_list", ()), *_evaluated_outside(node)))
        elif isinstance(node, Comprehension):
            # Of a comprehension's own names only a walrus binds outside it.
            yield from (each.target for each in ast.walk(node) if isinstance(each, ast.NamedExpr))
        else:
            yield from _in_this_scope(ast.iter_child_nodes(node))


def _evaluated_outside(node: Scope) -> Iterator[ast.AST]:
    """The expressions of a function or class that belong to the scope around it."""
    if isinstance(node, ast.ClassDef):
        yield from (*node.bases, *node.keywords)
    else:
        yield from (*node.args.defaults, *(each for each in node.args.kw_defaults if each is not None))
