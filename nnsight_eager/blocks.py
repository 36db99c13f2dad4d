"""The body of a `with` block, found from the running frame and compiled to run later.

    found = find(frame)                                # while the frame is inside the `__enter__` of a `with` item
    FunctionType(found.body.code, names)()             # what the body would have done, its names looked up in `names`

The statement is found by the position of the running instruction, never by searching lines. Where the text does not fit the
running code (a file edited since), nothing is guessed: the block is refused.
"""

import ast
import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Final, NamedTuple

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
from .texts import Known, facts, parsed, text_of

Span = tuple[int | None, int | None, int | None, int | None]

MARKS: Final = (CAUGHT, DELETED)
ENTERED: Final = "(entered)"
"""The name under which a target block finds what the item has entered: no identifier looks like this."""


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


_known: Final = Known[dict[int, Statement]](lambda _: {})
"""The statements that have been found, by the instruction that enters them."""


def find(frame: FrameType) -> Statement:
    """The `with` item that `frame` is entering; `InvokeError` where it cannot be had, or its body cannot run later."""
    code = frame.f_code
    known = _known.of(code)
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


AS_INVOKE: Final = (
    "Write it as a function, `tracer.invoke(prompt, function)`, or give every invoke a pass of its own with "
    "`model.trace(batched=False)`."
)


def refused(reason: str, instead: str = AS_INVOKE) -> InvokeError:
    """The error for a block that cannot be taken; `instead` names the forms that need no source."""
    return InvokeError(f"This block cannot be run in the model's forward pass: {reason}.", instead, reason=reason)


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
    text = text_of(frame.f_code, frame.f_globals)
    if not text:
        raise refused(f"there is no source to be had for {frame.f_code.co_filename!r}")
    return text


def _found(code: CodeType, filename: str, instruction: int, text: str) -> Statement:
    """The block behind an instruction."""
    span = tuple([*code.co_positions()][instruction // 2])
    if None in span:
        raise refused("Python runs without source positions (`-X no_debug_ranges`)")
    if dis.opname[code.co_code[instruction]] != "BEFORE_WITH":
        raise refused("it was not entered by a `with` statement")
    try:
        tree = parsed(text, filename)
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
    if not facts(rest.code, MARKS) <= facts(code, MARKS):
        # Test runners rewrite assertions; the rest of the block must still be what runs.
        plain = _block(without_asserts(body), code, filename, owner, None)
        if not facts(plain.code, MARKS) <= facts(code, MARKS):
            raise _stale(filename)
    return Statement(target if stores else None, rest)


def _block(body: list[ast.stmt], code: CodeType, filename: str, owner: str | None, local: frozenset[str] | None) -> Block:
    """Statements of `code`, compiled to run on their own."""
    compiled = as_function(body or [ast.Pass(lineno=1, col_offset=0, end_lineno=1, end_col_offset=0)], code, filename, owner)
    inner = frozenset[str]().union(*(names_of(each)[0] for each in compiled.co_consts if isinstance(each, CodeType)))
    return Block(compiled, *names_of(compiled), declared_global(body), local, bindings_of(compiled), inner)
