"""The body of a `with` block, found from the running frame and compiled to run later.

    found = find(frame)                                # while the frame is inside the `__enter__` of a `with` item
    FunctionType(found.body.code, names)()             # what the body would have done, its names looked up in `names`

The statement is found by the position of the running instruction, never by searching lines. Where the text does not fit the
running code (a file edited since), nothing is guessed: the block is refused.
"""

import ast
import dis
import functools
import inspect
import linecache
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

from .errors import InvokeError
from .rewriting import (
    CAUGHT,
    DELETED,
    Bindings,
    Scope,
    as_function,
    bindings_of,
    declared_global,
    leaving,
    names_of,
    only_in_comprehensions,
    without_asserts,
)

Span = tuple[int | None, int | None, int | None, int | None]

ENTERED: Final = "(entered)"
"""The name under which a target block finds what the item has entered: no identifier looks like this."""

OPERATORS: Final = frozenset({"BINARY_OP", "COMPARE_OP", "CONTAINS_OP", "IS_OP"})

_known: dict[int, tuple[weakref.ref[CodeType], dict[int, "Statement"]]] = {}
"""What has been found in code that still exists: by its identity, since the code of two notebook cells may be equal."""


class Block(NamedTuple):
    """Statements compiled to run on their own, and their names."""

    code: CodeType
    loads: frozenset[str]  # what they may look up
    stores: frozenset[str]  # what they bind or delete
    deletes: frozenset[str]
    globals: frozenset[str]  # what they declare `global`
    local: frozenset[str] | None  # the variables of the function they are in; `None` in a module, a cell or a class
    bindings: Bindings
    inner: frozenset[str]  # what functions made by them may look up


class Statement(NamedTuple):
    """What one item of a `with` statement does: store the value of `ENTERED` in its target, then run the body."""

    target: Block | None
    body: Block


def find(frame: FrameType) -> Statement:
    """The `with` item that `frame` is entering; `InvokeError` where it cannot be had, or its body cannot run later."""
    code = frame.f_code
    known = _found_in(code)
    found = known.get(frame.f_lasti)
    if found is None:
        found = known[frame.f_lasti] = _found(code, code.co_filename, frame.f_lasti, _source(frame))
    body = found.body
    mixed = body.globals.intersection(body.local or ())
    if mixed:
        raise refused(f"it uses `{min(mixed)}` both as a global name and as a local one")
    if body.local is None and body.code.co_freevars:
        raise refused("it uses `super()` or `__class__` for a class that is not made yet")
    if body.local is None and body.loads.intersection(code.co_freevars):
        raise refused(
            f"it uses `{min(body.loads.intersection(code.co_freevars))}`, a variable of the function around its class"
        )
    return found


def _found_in(code: CodeType) -> dict[int, Statement]:
    """What has been found in this code, by instruction."""
    key = id(code)
    entry = _known.get(key)
    if entry is None or entry[0]() is not code:
        entry = _known[key] = weakref.ref(code, lambda _, known=_known: known.pop(key, None)), {}  # type: ignore[misc]
    return entry[1]


def refused(reason: str) -> InvokeError:
    """The error for a block that cannot be taken; it names the forms that need no source."""
    return InvokeError(
        f"This block cannot be run in the model's forward pass: {reason}.",
        "Write it as a function (`tracer.invoke(prompt, function)`, `model.edit(function)`), or give every invoke a pass of "
        "its own with `model.trace(batched=False)`.",
    )


def _local_names(code: CodeType, above: tuple[Scope, ...]) -> frozenset[str] | None:
    """The variables of the function that is around a block, which is the last of the scopes above it."""
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return None
    names = {*code.co_varnames, *code.co_cellvars}
    if above and not isinstance(above[-1], (ast.ClassDef, ast.Lambda)):
        names -= only_in_comprehensions(above[-1])
    return frozenset(names.union(code.co_freevars))


def _source(frame: FrameType) -> str:
    """The text of the file, or cell, the frame's code was compiled from."""
    filename = frame.f_code.co_filename
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, frame.f_globals))
    if not text:
        raise refused(f"there is no source to be had for {filename!r}")
    return text


def _found(code: CodeType, filename: str, instruction: int, text: str) -> Statement:
    """The block behind an instruction."""
    span = tuple([*code.co_positions()][instruction // 2])
    if None in span:
        raise refused("Python runs without source positions (`-X no_debug_ranges`)")
    if dis.opname[code.co_code[instruction]] != "BEFORE_WITH":
        raise refused("it was not entered by a `with` statement")
    try:
        tree = _parsed(text, filename)
    except (SyntaxError, ValueError):
        raise _stale(filename) from None
    for node, above in _statements(tree):
        for number, item in enumerate(node.items):
            # 3.13 gives the item's own expression, earlier versions the whole statement for each of its items.
            if span == _span(item.context_expr) or (span == _span(node) and number == _item(code, instruction, node)):
                return _compiled(code, filename, node, number, above)
    raise _stale(filename)


def _stale(filename: str) -> InvokeError:
    return refused(f"{filename!r} no longer holds the code that is running")


@functools.lru_cache(maxsize=8)
def _parsed(text: str, filename: str) -> ast.Module:
    return ast.parse(text, filename)


def _statements(node: ast.AST, above: tuple[Scope, ...] = ()) -> Iterator[tuple[ast.With, tuple[Scope, ...]]]:
    """Every `with` statement below `node`, and the scopes around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.With):
            yield child, above
        yield from _statements(child, (*above, child) if isinstance(child, Scope) else above)


def _span(node: ast.expr | ast.stmt) -> Span:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _item(code: CodeType, instruction: int, node: ast.With) -> int:
    """Which item of its statement an instruction enters: the statement may occur twice, as a `finally` block does."""
    spans = [*code.co_positions()]
    entering = [
        each.offset
        for each in dis.get_instructions(code)
        if each.opname == "BEFORE_WITH" and tuple(spans[each.offset // 2]) == _span(node)
    ]
    return entering.index(instruction) % len(node.items)


def _compiled(code: CodeType, filename: str, node: ast.With, number: int, above: tuple[Scope, ...]) -> Statement:
    """The `as` target of the item and its body, to which later items belong."""
    item, later = node.items[number], node.items[number + 1 :]
    body: list[ast.stmt] = node.body
    if later:
        body = [ast.copy_location(ast.With(items=later, body=node.body), later[0].context_expr)]
    leaves = next(leaving(body), None)
    if leaves:
        raise refused(f"it contains `{leaves}`, which would leave the code around it")
    owner = next((each.name for each in reversed(above) if isinstance(each, ast.ClassDef)), None)
    stores: list[ast.stmt] = []
    if item.optional_vars is not None:
        value = ast.copy_location(ast.Name(ENTERED, ast.Load()), item.optional_vars)
        stores = [ast.copy_location(ast.Assign(targets=[item.optional_vars], value=value), item.optional_vars)]
    try:
        target, rest = (_block(statements, code, filename, owner, _local_names(code, above)) for statements in (stores, body))
    except SyntaxError as error:
        raise refused(f"as a function of its own it does not compile ({error.msg})") from None
    if not _facts(rest.code) <= _facts(code):
        # Test runners rewrite assertions; the rest of the block must still be what runs.
        plain = _block(without_asserts(body), code, filename, owner, None)
        if not _facts(plain.code) <= _facts(code):
            raise _stale(filename)
    return Statement(target if stores else None, rest)


def _block(body: list[ast.stmt], code: CodeType, filename: str, owner: str | None, local: frozenset[str] | None) -> Block:
    """Statements of `code`, compiled to run on their own."""
    compiled = as_function(body or [ast.Pass(lineno=1, col_offset=0, end_lineno=1, end_col_offset=0)], code, filename, owner)
    inner = frozenset[str]().union(*(names_of(each)[0] for each in compiled.co_consts if isinstance(each, CodeType)))
    return Block(compiled, *names_of(compiled), declared_global(body), local, bindings_of(compiled), inner)


def _facts(code: CodeType) -> set[Any]:
    """Every name, constant and operator in compiled code: a text that has changed since does not have the same."""
    names = (*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars)
    facts: set[Any] = {name for name in names if not name.endswith((CAUGHT, DELETED))}
    instructions = [*dis.get_instructions(code)]
    for each, following in zip(instructions, [*instructions[1:], None], strict=True):
        if each.opname in OPERATORS:
            facts.add((each.positions, each.argval))
        elif each.opcode in dis.hasconst and not (following is not None and following.argval == "__qualname__"):
            facts |= _constants(each.argval, each.positions)
    return facts


def _constants(value: Any, place: Any) -> set[Any]:
    """The facts in a constant; a set read from a `.pyc` has another order than a compiled one."""
    if isinstance(value, CodeType):
        return _facts(value)
    if isinstance(value, (tuple, frozenset)):
        return set[Any]().union(*(_constants(each, place) for each in value))
    # The compiler adds `None`, and `True` marks a deleted name.
    return set() if value is True or value is None else {(place, type(value), repr(value))}
