"""A block that runs later does what it does where it stands, whatever its shape and wherever it is written."""

import contextlib
import importlib
import linecache
import py_compile
import sys
import textwrap
from contextlib import nullcontext, suppress

import pytest
from without_a_model import InPlace, Together, execute, values

from nnsight_eager.errors import InvokeError

SHAPES = {
    "plain statements": "a = first + 1\nevents.append(a)",
    "several statements on a line": "a = 1; b = a + first; events.append(b)",
    "nothing": "pass",
    "an ellipsis": "...",
    "a string": '"not a docstring"',
    "a string in front": '"not a docstring"\na = 1',
    "a comment in front": "# a comment\n\na = 1",
    "try in front": "try:\n    a = 1 / 0\nexcept ZeroDivisionError:\n    a = 5",
    "try with finally in front": "try:\n    a = 1\nfinally:\n    b = 2",
    "try with except BaseException in front": (
        "try:\n    events.append(1)\n    a = missing\nexcept BaseException as error:\n    b = str(error)\nelse:\n    b = 0"
    ),
    "a bare except in front": "try:\n    a = missing\nexcept:\n    b = 1",
    "except* in front": (
        "try:\n    raise ExceptionGroup('', [ValueError()])\nexcept* ValueError as group:\n    a = len(group.exceptions)"
    ),
    "nested tries": (
        "try:\n    try:\n        raise KeyError\n    finally:\n        events.append('inner')\n"
        "except BaseException:\n    events.append('outer')\nfinally:\n    events.append('last')"
    ),
    "while in front": "while first < 13:\n    first += 1\nelse:\n    a = first",
    "a loop with break and continue": (
        "for a in range(5):\n    if a == 1:\n        continue\n    if a == 3:\n        break\n"
        "    events.append(a)\nelse:\n    b = 1"
    ),
    "a loop in the else of a loop": "for a in ():\n    pass\nelse:\n    for b in (1, 2):\n        break",
    "if in front": "if first:\n    a = 1\nelif items:\n    b = 1\nelse:\n    c = 1",
    "a conditional binding": "if not first:\n    a = 1\nb = 2",
    "with in front": "with nullcontext(3) as a:\n    b = a",
    "with that swallows": "with suppress(KeyError):\n    a = 1\n    raise KeyError\nb = 2",
    "a decorated function in front": "@twice\ndef f(x):\n    return x + first\na = f(1)",
    "a decorated class in front": "@twice\nclass C:\n    pass\na = len(C)",
    "a nested function": "def f(x, y=first):\n    z = x + y\n    return z + later\nlater = 7\na = f(1)",
    "a recursive function": "def f(n):\n    return n * f(n - 1) if n else 1\na = f(5)",
    "a generator function": "def f():\n    received = yield first\n    yield from items\na = list(f())",
    "an async function": (
        "async def f():\n    return [x async for x in g()]\nasync def g():\n    yield first\n    yield 2\n"
        "try:\n    f().send(None)\nexcept StopIteration as stop:\n    a = stop.value"
    ),
    "a closure over an own name of a function": (
        "def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        return n\n    return g\n"
        "g = f()\na = g(), g()"
    ),
    "a function whose names hide the block's": "a = 1\ndef f(a):\n    b = a\n    return b\nb = f(3)",
    "a list comprehension": "a = [x + first for x in items if x > 1]",
    "a comprehension whose variable is a name of the block": "x = 5\na = [x for x in items]\nb = x",
    "nested comprehensions": "a = [[x * y for x in items] for y in range(first - 8)]",
    "dict and set comprehensions": "a = {x: first for x in items}\nb = {x % 2 for x in items}",
    "a generator expression": "a = sum(x * first for x in items)",
    "a comprehension in a class": "class C:\n    a = 1\n    b = [first for x in items]\na = C.a, C.b",
    "a lambda": "f = lambda x, y=first: x + y + later\nlater = 1\na = f(1)",
    "a lambda in a comprehension": "a = [f() for f in [lambda x=x: x + first for x in items]]",
    "a walrus": "a = (b := first) + 1",
    "a walrus in a condition": "if (a := len(items)) > 2:\n    b = a",
    "a walrus in a loop": "while (c := events.pop() if events else None) is not None:\n    pass",
    "a walrus in a comprehension": "a = [b := x for x in items]\nc = any((d := x) > 1 for x in items)",
    "a class": "class C:\n    x = first\n    def m(self):\n        return first, __class__.x\na = C().m()\nb = C.x",
    "a class with a name of the block": "x = 1\nclass C:\n    x = x + 1\na = x, C.x",
    "a class with bases and keywords": (
        "class A:\n    def __init_subclass__(cls, k):\n        cls.k = k\n"
        "class B(A, k=first):\n    def m(self):\n        return super().__repr__()[0]\na = B.k, B().m()"
    ),
    "a class in a class": "class C:\n    class D:\n        def m(self):\n            return first\na = C.D().m()",
    "a function in a class in a function": (
        "def f():\n    class C:\n        class D:\n            a = 1\n    return C.D.a, C.__name__\na = f()"
    ),
    "private names in a class": (
        "class C:\n    __x = 1\n    def m(self):\n        self.__y = self.__x\n        return self._C__y\na = C().m()"
    ),
    "annotations": "a: int = 1\nb: 'int'\nc: list[int] = items\n(d): int = 4\nitems[0]: int = 9",
    "annotations of functions": "def f(x: int, *y: 'str') -> first:\n    z: int = x\n    return z\na = f(1)",
    "augmented assignments": "first += 1\nfirst *= 2\nitems += [4]\nitems[0] -= 1",
    "unpacking": "a, (b, *c), d = 1, (2, 3, 4), 5\n[e, *f] = items\ng = h = 1\n(i) = 2",
    "a match of values and captures": (
        "match items:\n    case []:\n        a = 0\n    case [1, *rest] if rest:\n        a = rest\n"
        "match {'k': 1, 'l': 2}:\n    case {'k': b, **others}:\n        pass\n"
        "match first:\n    case int() as c:\n        pass\nmatch 3:\n    case 1 | 2:\n        d = 1\n    case e:\n        pass"
    ),
    "a match of classes": "class P:\n    __match_args__ = ('x',)\n    x = 4\nmatch P():\n    case P(a):\n        pass",
    "imports": "import os.path, json as j\nfrom math import pi as a, floor\nb = os.path.join('a', 'b')\nc = j.dumps(floor(a))",
    "f-strings": "a = 3\nb = f'{a!r:>{first}}{a=}{[x for x in items]}{(lambda: a)()}'",
    "string formatting of own names": "a = '%s' % first\nb = f'{first:{len(items)}d}' f'''{\nitems\n}'''",
    "a starred call": "def f(*a, **k):\n    return a, k\na = f(*items, **{'x': first})",
    "slices and chained comparisons": "a = items[1:], items[::-1], 1 < first < 20",
    "an assert": "assert first == 10, 'message'\na = 1",
    "sets of constants": "a = first in {1, 10, 'x', 'y', 'z', 'u', 'v'}, [x in (1, 2) for x in items]",
    "constants of every kind": "a = 1, 2.5, -0.0, 1e400, 3j, b'x', True, None, ..., (1, ('t',)), -first, 2**70",
    "a name equal to a builtin": "max = first\na = max\nlen = 3",
    "a builtin": "a = max(items), len(items), sorted(items)[0]",
    "del": "a = b = c = 1\ndel a, (b,)",
    "del of what is inside": "d = {1: 2, 3: 4}\ndel d[1], items[0]",
    "del and bind again": "a = 1\ndel a\na = 2\nif a:\n    del a\na = 3",
    "the name of a caught error": "try:\n    raise KeyError\nexcept KeyError as error:\n    a = repr(error)",
    "a name of a caught error that is bound again": "try:\n    raise KeyError\nexcept KeyError as error:\n    pass\nerror = 5",
    "global in a function of its own": "def f():\n    global of_module\n    of_module = 5\nf()",
    "a function without a name in common": "(lambda: events.append(1))()",
    "a semicolon at the end": "a = 1;",
    "a continued line": "a = first + \\\n    1\nb = (first\n+ 1)",
    "a string of several lines": "a = '''x\n  y\n'''",
    "other letters": "größe = 'ä' + '日本'; b = größe",
}

SURROUNDINGS = {
    "a module": """
first, items, events = 10, [1, 2, 3], []
with Together() as t:
    with t.invoke():
        BODY
result = values(globals())
""",
    "a function": """
def f(first, items):
    events = []
    with Together() as t:
        with t.invoke():
            BODY
    return values(locals())
result = f(10, [1, 2, 3])
""",
    "a closure": """
def outer(first, items):
    events = []
    def inner():
        with Together() as t:
            with t.invoke():
                first, items, events
                BODY
        return values(locals())
    return inner()
result = outer(10, [1, 2, 3])
""",
    "a method": """
class Owner:
    def method(self, first, items):
        events = []
        with Together() as t:
            with t.invoke():
                BODY
        return values(locals())
result = Owner().method(10, [1, 2, 3])
""",
    "a class": """
class Owner:
    first, items, events = 10, [1, 2, 3], []
    with Together() as t:
        with t.invoke():
            BODY
    result = values(locals())
result = Owner.result
""",
    "a loop": """
def f(first, items):
    events = []
    for turn in range(2):
        with Together() as t:
            if turn:
                with t.invoke():
                    BODY
    return values(locals())
result = f(10, [1, 2, 3])
""",
    "a finally block": """
def f(first, items):
    events = []
    try:
        raise KeyError
    except KeyError:
        pass
    finally:
        with Together() as t, nullcontext():
            with t.invoke():
                BODY
    return values(locals())
result = f(10, [1, 2, 3])
""",
    "an except block": """
def f(first, items):
    events = []
    try:
        raise KeyError
    except KeyError:
        with Together() as t:
            with t.invoke():
                BODY
    return values(locals())
result = f(10, [1, 2, 3])
""",
    "an async function": """
async def f(first, items):
    events = []
    with Together() as t:
        with t.invoke():
            BODY
    return values(locals())
try:
    f(10, [1, 2, 3]).send(None)
except StopIteration as stop:
    result = stop.value
""",
    "a generator": """
def f(first, items):
    events = []
    yield
    with Together() as t:
        with t.invoke():
            BODY
        yield
    yield values(locals())
*_, result = f(10, [1, 2, 3])
""",
    "a module with future annotations": """
from __future__ import annotations
first, items, events = 10, [1, 2, 3], []
with Together() as t:
    with t.invoke():
        BODY
result = values(globals())
""",
}


def within(surrounding, body):
    """The text of a module in which the body stands in its place."""
    lines = []
    for line in SURROUNDINGS[surrounding].splitlines():
        place = line.removesuffix("BODY")
        lines.append(textwrap.indent(body, place) if place != line else line)
    return "\n".join(lines)


def twice(x):
    """A decorator after which a function gives the double, and a class is a pair."""
    return (x.__name__, x.__name__) if isinstance(x, type) else lambda *arguments: 2 * x(*arguments)


def what_is_bound(text, together):
    names = execute(text, together, values=values, nullcontext=nullcontext, suppress=suppress, twice=twice)
    return names["result"], names.get("of_module")


def python_runs(text):
    """Whether the text has a meaning in place: the functions in a class, for one, do not see its names."""
    try:
        what_is_bound(text, InPlace)
    except (NameError, SyntaxError):
        return False
    return True


@pytest.mark.parametrize(
    ("shape", "surrounding"),
    [(shape, place) for shape in SHAPES for place in SURROUNDINGS if python_runs(within(place, SHAPES[shape]))],
)
def test_a_block_does_later_what_it_does_in_place(shape, surrounding):
    text = within(surrounding, SHAPES[shape])
    assert what_is_bound(text, Together) == what_is_bound(text, InPlace)


# The `with` statement


def test_the_body_may_stand_on_the_with_line():
    names = execute("with Together() as t:\n    with t.invoke(): a = 1; b = a + 1\n    c = 3")
    assert values(names) == {"a": 1, "b": 2, "c": 3}


def test_blocks_may_follow_each_other_on_the_next_lines_and_each_runs_once():
    events = []
    with Together() as t:
        with t.invoke():
            events.append("first")
        with t.invoke():
            events.append("second")
        events.append("between")
    events.append("behind")
    assert events == ["between", "first", "second", "behind"]


class Attributes:
    """Something to store on."""


def test_the_target_is_stored_where_the_block_stands():
    thing, table, order = Attributes(), {}, []
    with Together() as t:
        with t.invoke(1) as name:
            order.append(name)
        assert name == 1
        with t.invoke((2, 3)) as (first, second):
            order.append((first, second))
        assert (first, second) == (2, 3)
        with t.invoke([4, 5, 6]) as [head, *rest]:
            order.append((head, rest))
        assert (head, rest) == (4, [5, 6])
        with t.invoke(7) as thing.attribute:
            order.append(thing.attribute)
        assert thing.attribute == 7
        with t.invoke(8) as table["key"]:
            order.append(table["key"])
        assert table == {"key": 8}
        with t.invoke([9, [10, 11]]) as (table[name], (thing.other, *table["rest"])):
            order.append(name)
        assert (table, thing.other) == ({"key": 8, 1: 9, "rest": [11]}, 10)
        assert order == []
    assert order == [1, (2, 3), (4, [5, 6]), 7, 8, 1]


def test_the_body_sees_the_target_of_its_own_turn_of_a_loop():
    seen = []
    with Together() as t:
        for turn in range(3):
            with t.invoke(10 * turn) as target:
                seen.append((turn, target))
    assert seen == [(0, 0), (1, 10), (2, 20)]


def test_a_target_that_does_not_fit_is_an_error_at_its_line():
    with pytest.raises(TypeError, match="cannot unpack non-iterable int object"), Together() as t, t.invoke(1) as (_, _):
        pass


@contextlib.contextmanager
def item(events, name):
    events.append(f"enter {name}")
    try:
        yield name
    finally:
        events.append(f"leave {name}")


def test_items_before_the_invoke_are_left_where_it_stands():
    events = []
    with Together() as t:
        with item(events, "a") as a, t.invoke("b") as b:
            events.append(a + b)
        events.append("behind the block")
    assert events == ["enter a", "leave a", "behind the block", "ab"]


def test_items_behind_the_invoke_belong_to_its_body():
    events = []
    with Together() as t:
        with t.invoke("a") as a, item(events, "b") as b, item(events, "c"):
            events.append(a + b)
        events.append("behind the block")
    assert events == ["behind the block", "enter b", "enter c", "ab", "leave c", "leave b"]


def test_items_on_both_sides_in_parentheses():
    events = []
    with Together() as t:
        with (
            item(events, "a") as a,
            t.invoke("b") as b,
            item(events, "c") as c,
        ):
            events.append(a + b + c)
        events.append("behind the block")
    assert events == ["enter a", "leave a", "behind the block", "enter c", "abc", "leave c"]


def test_the_trace_and_its_invoke_in_one_statement():
    events = []
    with Together() as t, t.invoke("a") as a, item(events, "b"):
        events.append(a)
    assert events == ["enter b", "a", "leave b"]


def test_a_statement_that_the_compiler_writes_twice_is_told_apart_by_its_items():
    """`finally` is compiled once for the way through it and once for an error."""

    def run(error):
        events = []
        with suppress(KeyError):
            try:
                if error:
                    raise KeyError
            finally:
                with Together() as t, item(events, "a"), t.invoke("b") as b, item(events, "c"):
                    events.append(b)
        return events

    assert run(False) == run(True) == ["enter a", "leave a", "enter c", "b", "leave c"]


def test_two_blocks_of_one_text_in_two_cells_are_two():
    text = "with Together() as t:\n    with t.invoke():\n        a = compile('1', '', 'eval'), start + 1\n        a = a[1]"
    assert [execute(text, start=n)["a"] for n in (1, 2)] == [2, 3]


def test_a_function_that_makes_the_block_may_have_returned_when_it_runs():
    seen = []

    def add(t, x):
        with t.invoke():
            y = x + 1
            seen.append(y)

    with Together() as t:
        add(t, 1)
        add(t, 2)
    assert seen == [2, 3]


def test_a_block_inside_a_block():
    """The inner trace runs while the outer block does, and its names are the outer block's."""

    def run(together, a):
        seen = []
        with together() as t:
            with t.invoke():
                b = a + 1
                with together() as u:
                    for turn in range(2):
                        with u.invoke(turn) as target:
                            seen.append((a, b, turn, target, max(1, 2)))
                            c = a + b + turn
                d = c + 1
            with t.invoke():
                e = d + 1
        return seen, c, d, e

    assert run(Together, 5) == run(InPlace, 5) == ([(5, 6, 0, 0, 2), (5, 6, 1, 1, 2)], 12, 13, 14)


# Inside a class


class Base:
    def method(self):
        return "base"

    @classmethod
    def made(cls):
        return cls.__name__


class Derived(Base):
    def __private(self):
        return "private"

    def method(self):
        with Together() as t, t.invoke():
            above = super().method()
            mine = self.__private()
            name = __class__.__name__
            later = lambda: (self, super(Derived, self).method())  # noqa: E731
            __hidden = [self.__private() for _ in range(2)]
        return above, mine, name, later()[1], __hidden

    @classmethod
    def made(cls):
        with Together() as t, t.invoke():
            above = super().made()
        return above


def test_super_and_private_names_mean_what_they_mean_in_the_method():
    assert Derived().method() == ("base", "private", "Derived", "base", ["private", "private"])
    assert Derived.made() == "Derived"


# What cannot be run later

INSTEAD = (
    "\nWrite it as a function, `tracer.invoke(prompt, function)`, or give every invoke a pass of its own with "
    "`model.trace(batched=False)`."
)


def sentence(reason):
    return f"This block cannot be run in the model's forward pass: {reason}.{INSTEAD}"


def refusal(text, events):
    """What the error says, raised before anything of the block has run."""
    with pytest.raises(InvokeError) as raised:
        execute(text, events=events)
    assert events == ["before"]
    return str(raised.value)


FUNCTION = """
def f():
    events.append("before")
    for turn in range(2):
        with Together() as t:
            with t.invoke():
                events.append("body")
                BODY
    events.append("behind")
"""


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return", "return"),
        ("if events:\n    return 5", "return"),
        ("x = yield", "yield"),
        ("x = [(yield 1)]", "yield"),
        ("yield from ()", "yield"),
        ("for x in (yield):\n    pass", "yield"),
        ("for events[(yield)] in ():\n    pass", "yield"),
        ("while (yield):\n    pass", "yield"),
        ("def g(x=(yield)):\n    pass", "yield"),
        ("@(yield)\nclass C:\n    pass", "yield"),
        ("break", "break"),
        ("continue", "continue"),
        ("try:\n    pass\nfinally:\n    continue", "continue"),
        ("for x in ():\n    pass\nelse:\n    break", "break"),
        ("with nullcontext():\n    break", "break"),
        ("match 1:\n    case 1:\n        break", "break"),
    ],
)
def test_what_leaves_the_block_is_refused(body, what):
    text = "\n".join(
        textwrap.indent(body, line.removesuffix("BODY")) if line.endswith("BODY") else line for line in FUNCTION.splitlines()
    )
    run = "\nnext(iter(f()), None)" if "yield" in body else "\nf()"
    assert refusal(text + run, []) == sentence(f"it contains `{what}`, which would leave the code around it")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("await f()", "await"),
        ("for x in await f():\n    pass", "await"),
        ("x = [await y for y in ()]", "await"),
        ("async for x in f():\n    pass", "async for"),
        ("x = [y async for y in f()]", "async for"),
        ("async with f():\n    pass", "async with"),
    ],
)
def test_what_waits_is_refused(body, what):
    text = "\n".join(
        textwrap.indent(body, line.removesuffix("BODY")) if line.endswith("BODY") else line for line in FUNCTION.splitlines()
    )
    text = text.replace("def f", "async def f") + "\nf().send(None)"
    assert refusal(text, []) == sentence(f"it contains `{what}`, which would leave the code around it")


def test_an_import_of_everything_is_refused():
    text = "events.append('before')\nwith Together() as t:\n    with t.invoke():\n        from os import *"
    reason = "as a function of its own it does not compile (import * only allowed at module level)"
    assert refusal(text, []) == sentence(reason)


def test_a_name_that_is_both_global_and_local_is_refused():
    text = """
def f():
    n = 1
    events.append("before")
    with Together() as t:
        with t.invoke():
            def g():
                global n
                n = 2
            g()
f()
"""
    assert refusal(text, []) == sentence("it uses `n` both as a global name and as a local one")


def test_in_a_class_a_variable_of_the_function_around_is_refused():
    """Its value is in a cell that cannot be had from the frame of a class."""
    text = """
x = "of the module"
def f():
    x = "of the function"
    class C:
        events.append("before")
        with Together() as t:
            with t.invoke():
                y = x
f()
"""
    assert refusal(text, []) == sentence("it uses `x`, a variable of the function around its class")


def test_in_a_class_a_method_that_needs_the_class_is_refused():
    text = """
class C:
    events.append("before")
    with Together() as t:
        with t.invoke():
            def m(self):
                return super().m()
"""
    assert refusal(text, []) == sentence("it uses `super()` or `__class__` for a class that is not made yet")


def test_a_block_entered_by_an_exit_stack_is_refused():
    with pytest.raises(InvokeError) as raised, Together() as t, contextlib.ExitStack() as stack:
        stack.enter_context(t.invoke())
    assert str(raised.value) == sentence("it was not entered by a `with` statement")


def test_a_block_entered_by_hand_is_refused():
    with pytest.raises(InvokeError) as raised, Together() as t:
        t.invoke().__enter__()
    assert str(raised.value) == sentence("it was not entered by a `with` statement")


def test_a_block_opened_by_a_context_manager_for_its_caller_is_refused():
    @contextlib.contextmanager
    def opened(t):
        with t.invoke() as value:
            yield value

    events = []
    with pytest.raises(InvokeError) as raised, Together() as t, opened(t):
        events.append("body")
    assert str(raised.value) == sentence("it contains `yield`, which would leave the code around it")
    assert events == []


def test_code_without_source_is_refused():
    text = "with Together() as t:\n    with t.invoke():\n        a = 1"
    with pytest.raises(InvokeError) as raised:
        exec(text, {"Together": Together})
    assert str(raised.value) == sentence("there is no source to be had for '<string>'")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A file that can be imported, and is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "holds_a_block.py"
    sys.modules.pop("holds_a_block", None)


IN_A_FILE = """
from without_a_model import Together
def run(x):
    with Together() as t:
        with t.invoke():
            y = x + 1
            z = "a" if y in {16, 8, 0} else (y, 2)
    return y, z
"""


def test_a_module_read_from_its_compiled_file_runs_its_blocks(module):
    """Where the set of constants has another order: it is read in the order 0, 8, 16, and all three belong in one place."""
    module.write_text(IN_A_FILE)
    py_compile.compile(str(module), doraise=True)
    assert importlib.import_module("holds_a_block").run(1) == (2, (2, 2))


def test_a_module_of_which_only_the_compiled_file_is_left_is_refused(module):
    module.write_text(IN_A_FILE)
    py_compile.compile(str(module), str(module.with_suffix(".pyc")))
    module.unlink()
    importlib.invalidate_caches()
    run = importlib.import_module("holds_a_block").run
    with pytest.raises(InvokeError) as raised:
        run(1)
    assert str(raised.value) == sentence(f"there is no source to be had for {str(module)!r}")


@pytest.mark.parametrize(
    "edit",
    [
        ("y = x + 1", "y = x + 2"),
        ("y = x + 1", "y = x + other"),
        ("\ndef run", "\n# a new line\ndef run"),
        ("y = x + 1", "y = x - 1"),
        ("y in {", "y not in {"),
        ("    with t.invoke():", "    if x:\n          with t.invoke():"),
        (IN_A_FILE, "\n"),
        (IN_A_FILE, "with :"),
        (IN_A_FILE, "pass\n" * 10),
    ],
)
def test_a_module_edited_since_it_was_imported_is_refused(module, edit):
    module.write_text(IN_A_FILE)
    run = importlib.import_module("holds_a_block").run
    before, after = edit
    module.write_text(IN_A_FILE.replace(before, after))
    with pytest.raises(InvokeError) as raised:
        run(1)
    assert str(raised.value) == sentence(f"{str(module)!r} no longer holds the code that is running")


def test_a_block_that_was_found_once_stays_what_it_was_when_its_module_is_edited(module):
    module.write_text(IN_A_FILE)
    run = importlib.import_module("holds_a_block").run
    assert run(1) == (2, (2, 2))
    module.write_text(IN_A_FILE.replace("y = x + 1", "y = x + 2"))
    assert run(1) == (2, (2, 2))


def test_an_edit_below_the_block_does_no_harm(module):
    module.write_text(IN_A_FILE)
    run = importlib.import_module("holds_a_block").run
    module.write_text(IN_A_FILE + "\nmore = 1\n")
    linecache.checkcache()
    assert run(1) == (2, (2, 2))


def test_assertions_that_a_test_runner_has_rewritten_do_no_harm():
    """As pytest has rewritten this file's: the constants below are in no other place of this function."""
    with Together() as t, t.invoke():
        x = [3]
        assert x[0] in [3, 4]
        assert x[0] in {3, 5} or x[0] != -7, "a message"
        assert (x[0], 8) == (3, 8)
    assert x == [3]
