"""The text that running code was compiled from, and whether it still is.

    text = text_of(code, frame.f_globals)         # "" where there is none
    tree = parsed(text, code.co_filename)
    facts(compiled_again) <= facts(code)          # nothing in the text is new to the code

Where a text does not fit the running code (a file edited since), nothing is to be guessed.
"""

import ast
import dis
import functools
import linecache
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

OPERATORS: Final = frozenset({"BINARY_OP", "COMPARE_OP", "CONTAINS_OP", "IS_OP"})


class Known(Generic[T]):
    """What has been found out about code that still exists, once for each.

    By its identity, since the code of two notebook cells may be equal.
    """

    def __init__(self, find: Callable[[CodeType], T]) -> None:
        """`find` finds it out, or makes room for it."""
        self._find = find
        self._entries: dict[int, tuple[weakref.ref[CodeType], T]] = {}

    def of(self, code: CodeType) -> T:
        """What is known of this code."""
        key = id(code)
        entry = self._entries.get(key)
        if entry is None or entry[0]() is not code:
            forget = functools.partial(_forget, self._entries, key)
            entry = self._entries[key] = weakref.ref(code, forget), self._find(code)
        return entry[1]


def _forget(entries: dict[int, Any], key: int, _: Any) -> None:
    entries.pop(key, None)


def text_of(code: CodeType, names: dict[str, Any]) -> str:
    """The whole text of the file, or cell, that `code` was compiled from; `names` are its module's."""
    linecache.checkcache(code.co_filename)
    return "".join(linecache.getlines(code.co_filename, names))


@functools.lru_cache(maxsize=8)
def parsed(text: str, filename: str) -> ast.Module:
    """The text as a tree, which is not to be changed."""
    return ast.parse(text, filename)


def facts(code: CodeType, without: tuple[str, ...] = ()) -> set[Any]:
    """Every name, constant and operator in compiled code; names that end `without` are ours, and left out."""
    names = (*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars)
    found: set[Any] = {name for name in names if not (without and name.endswith(without))}
    instructions = [*dis.get_instructions(code)]
    for each, following in zip(instructions, [*instructions[1:], None], strict=True):
        if each.opname in OPERATORS:
            found.add((each.positions, each.argval))
        elif each.opcode in dis.hasconst and not (following is not None and following.argval == "__qualname__"):
            # The names of keywords have no place of their own (3.11 gives now this one and now that), nor a value in `dis`.
            place = None if each.opname == "KW_NAMES" else each.positions
            found |= _constants(code.co_consts[each.arg or 0], place, without)
    return found


def _constants(value: Any, place: Any, without: tuple[str, ...]) -> set[Any]:
    """The facts in a constant; a set read from a `.pyc` has another order than a compiled one."""
    if isinstance(value, CodeType):
        return facts(value, without)
    if isinstance(value, (tuple, frozenset)):
        return set[Any]().union(*(_constants(each, place, without) for each in value))
    # The compiler adds `None`, and `True` marks a deleted name.
    return set() if value is True or value is None else {(place, type(value), repr(value))}
