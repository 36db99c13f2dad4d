"""The operations of a function: their names, and the same function with each of them called apart."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import linecache
import sys
import traceback

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nnsight_eager import SourceError
from nnsight_eager.operations import CALLS, dissected
from nnsight_eager.peeling import peeled

counter = 0


class Events(list):
    """What the rewritten code calls: the names of the operations, in the order in which they are called."""

    def __call__(self, name, function, /, *args, **kwargs):
        self.append(name)
        return function(*args, **kwargs)

    def assigned(self, name, value):
        self.append(name)
        return value

    def own(self, names):
        kept = [name for name in names if name != CALLS]
        return {name: names[name] for name in kept} if isinstance(names, dict) else kept


def rewritten(call):
    """The same with its operations called apart, and the list that their names go to."""
    inner, again = peeled(call)
    events = Events()
    return again(dissected(inner).calling(inner, events)), events


def names(call):
    return list(dissected(peeled(call)[0]).operations)


def double(x):
    return x * 2


def plus(x, y=1, *more, by=0, **named):
    return x + y + sum(more) + by + sum(named.values())


# What is called, and in which order


def nested(x):
    return double(plus(double(x), double(y := x + 1)) + y)


def chained(x):
    return "a-b".replace("-", "+").upper().split("+")[0] * x


def starred(x):
    return plus(*[x, *range(2)], **dict(by=3), z=double(4))  # noqa: C408


def unpacked(x):
    a, b = double(x), x
    a, b = b, a
    (c, *d), [e, f] = divmod(7, x), "ab"
    g = h = double(a)
    return a, b, c, d, e, f, g, h


def annotated(x):
    y: int = double(x)
    z: int
    z = y
    return z


def augmented(x):
    y = [x]
    y += [double(x)]
    x -= 1
    y[double(0)] += plus(1)
    return x, y


class Box:
    """Somewhere to put things."""

    def __init__(self):
        self.inner = self
        self.items = {}


def put_into_places(x):
    box = Box()
    box.inner.value = double(x)
    box.items["a"] = x
    box.inner.items[double("b")] = x
    Box().value = 3
    return box.value, box.items


def into_a_place_that_is_called(x):
    box = {}
    box[double("key")] = plus(double(x))
    return box


def walrus(x):
    return [z for each in range(x) if (z := double(each)) > 1], (w := double(x)), w


def comprehensions(x):
    a = [double(each) for each in range(x)]
    b = {double(each): plus(each) for each in a}
    c = {double(each) for each in b}
    return a, b, c, sum(double(each) for each in c)


def functions_inside(x):
    def inside(y, z=double(1)):  # noqa: B008
        return plus(y, z)

    twice = lambda y: double(y)  # noqa: E731

    class Local:
        kept = double(5)

        def get(self):
            return plus(self.kept)

    return inside(x), twice(x), Local().get()


def formatted(x):
    return f"{double(x)} {plus(x)!r:>{double(4)}} {x=}"


def tried(x):
    try:
        y = double(x)
        int("no")
    except ValueError as error:
        y = plus(y, len(error.args))
    else:
        y = double(0)
    finally:
        y = plus(y)
    return y


def with_statements(x):
    with contextlib.suppress(KeyError), contextlib.nullcontext(double(x)) as y:
        {}[plus(y)]
    return y


def loops(x):
    total = 0
    for each in range(x):
        if each == 1:
            continue
        total = plus(total, each)
    else:
        total += 1
    while total > 3:
        total = total - 2
    return total


def matched(x):
    match double(x):
        case int(y) if plus(y) > 3:
            return double(y)
        case _:
            return None


def of_globals(x):
    global counter
    counter = double(x)
    return counter


def of_nonlocals(x):
    y = 0

    def set_it():
        nonlocal y
        y = double(x)
        return y

    return set_it(), y


def of_its_own_names(x):
    y = double(x)
    return sorted(locals()), sorted(vars()), sorted(dir()), eval("y + 1", {"y": y})


def recursive(x):
    return 1 if x < 1 else x * recursive(x - 1)


def across_lines(x):
    return (
        "a"
        .join(
            [
                "b",
                "c",
            ]
        )
        .upper()
        * x
    )  # fmt: skip


EVENTS = {
    nested: ["double_0", "double_1", "plus_0", "double_2"],
    chained: ["replace_0", "upper_0", "split_0"],
    starred: ["range_0", "dict_0", "double_0", "plus_0"],
    unpacked: ["double_0", "a_0", "b_0", "a_1", "b_1", "divmod_0", "double_1"],
    annotated: ["double_0", "y_0", "z_0"],
    augmented: ["y_0", "double_0", "y_iadd_0", "x_isub_0", "double_1", "plus_0"],
    put_into_places: [
        "Box_0", "box_0", "double_0", "box_inner_value_0", "box_items_0", "box_inner_items_0", "double_1", "Box_1",
    ],
    into_a_place_that_is_called: ["box_0", "double_0", "plus_0", "box_1", "double_1"],
    walrus: ["range_0", "double_0", "double_0", "double_0", "double_1"],
    comprehensions: [
        "range_0", "double_0", "double_0", "double_0", "a_0", "double_1", "plus_0", "double_1", "plus_0", "double_1", "plus_0",
        "b_0", "double_2", "double_2", "double_2", "c_0", "sum_0", "double_3", "double_3", "double_3",
    ],
    functions_inside: [
        "double_0", "twice_0", "double_2", "kept_0", "inside_0", "plus_0", "twice_1", "double_1", "Local_0", "get_0", "plus_1",
    ],
    formatted: ["double_0", "plus_0", "double_1"],
    tried: ["double_0", "y_0", "int_0", "len_0", "plus_0", "y_1", "plus_1", "y_3"],
    with_statements: ["contextlib_suppress_0", "double_0", "contextlib_nullcontext_0", "plus_0"],
    loops: ["total_0", "range_0", "plus_0", "total_1", "plus_0", "total_1", "total_iadd_0"],
    matched: ["double_0", "plus_0", "double_1"],
    of_globals: ["double_0", "counter_0"],
    of_nonlocals: ["y_0", "set_it_0", "double_0", "y_1"],
    of_its_own_names: ["double_0", "y_0", "sorted_0", "sorted_1", "sorted_2"],
    recursive: ["recursive_0"],
    across_lines: ["join_0", "upper_0"],
}  # fmt: skip


@pytest.mark.parametrize("function", EVENTS, ids=lambda each: each.__name__)
def test_the_rewritten_function_gives_the_same_and_calls_its_operations_in_the_order_of_evaluation(function):
    again, events = rewritten(function)
    assert again(3) == function(3)
    assert events == EVENTS[function]


def test_each_name_is_counted_in_the_order_in_which_it_is_evaluated():
    assert names(nested) == ["double_0", "double_1", "plus_0", "double_2"]
    assert names(loops) == ["total_0", "range_0", "plus_0", "total_1", "total_iadd_0", "total_2"]


def test_a_value_is_counted_before_the_place_it_goes_to():
    assert names(into_a_place_that_is_called) == ["box_0", "double_0", "plus_0", "double_1", "box_1"]
    assert dissected(into_a_place_that_is_called).operations["double_1"].callee is not None
    kinds = [each.callee is None for each in dissected(into_a_place_that_is_called).operations.values()]
    assert kinds == [True, False, False, False, True]


def test_an_operation_knows_its_line():
    found = dissected(tried)
    first = tried.__code__.co_firstlineno
    assert [(name, each.line - first) for name, each in found.operations.items()][:4] == [
        ("double_0", 2), ("y_0", 2), ("int_0", 3), ("len_0", 5),
    ]  # fmt: skip
    assert found.lines[0] == "def tried(x):"
    assert found.lines[-1] == "    return y"


def test_what_stands_between_line_ends_does_not_shift_the_listing(tmp_path, monkeypatch):
    module = imported(tmp_path, monkeypatch, "one = 'a\x0cb'\n\x0c\ndef f(x):\n    y = abs(x)\n    return y\n")
    assert dissected(module.f).lines == ["def f(x):", "    y = abs(x)", "    return y"]


# Functions of every kind


def test_generators_pause_and_go_on_as_before():
    def generator(x):
        for each in range(x):
            got = yield double(each)
            plus(got or 0)
        yield from [double(9)]
        return "end"

    def driven(function):
        it = function(2)
        seen = [next(it), it.send(5), it.send(6)]
        with pytest.raises(StopIteration) as stopped:
            next(it)
        return seen, stopped.value.value

    again, events = rewritten(generator)
    assert driven(again) == driven(generator) == ([0, 2, 18], "end")
    assert events == ["range_0", "double_0", "got_0", "plus_0", "double_0", "got_0", "plus_0", "double_1"]


def test_async_functions_wait_as_before():
    async def later(x):
        await asyncio.sleep(0)
        return double(x)

    async def waits(x):
        async with contextlib.AsyncExitStack():
            y = await later(x)
        return [each async for each in counted(y)]

    async def counted(x):
        for each in range(x):
            yield each

    again, events = rewritten(waits)
    assert asyncio.run(again(1)) == asyncio.run(waits(1)) == [0, 1]
    assert events == ["contextlib_AsyncExitStack_0", "later_0", "y_0", "counted_0"]


class Parent:
    """A base class."""

    def total(self, x):
        return double(x)


class Child(Parent):
    """Private names, `super()` and `__class__`."""

    def __private(self, x):
        return plus(x)

    def total(self, x):
        self.__kept = self.__private(x)
        return super().total(x), super(Child, self).total(self.__kept), __class__.__name__  # noqa: UP008

    @classmethod
    def made(cls, x):
        return cls().total(x)

    @staticmethod
    def still(x):
        return double(x)

    def __call__(self, x, *, by=1):
        return plus(x, by)


def test_a_method_keeps_super_and_its_private_names():
    again, events = rewritten(Child().total)
    assert again(3) == Child().total(3) == (6, 8, "Child")
    assert events == ["self___private_0", "self___kept_0", "total_0", "total_1"]


def test_class_methods_static_methods_partials_and_callable_objects_are_looked_into():
    for call in (
        Child.made,
        Child.still,
        functools.partial(plus, 1, by=3),
        Child(),
        functools.partial(Child(), by=4),
        functools.partial(functools.partial(Child().total)),
    ):
        again, events = rewritten(call)
        assert again(3) == call(3)
        assert events == names(call)


def test_defaults_stay_the_objects_they_were():
    kept = []

    def appends(x, to=kept, *, also=kept):
        to.append(x)
        return also

    again, events = rewritten(appends)
    assert again(1) is kept
    assert kept == [1]
    assert events == ["to_append_0"]
    assert appends.__kwdefaults__ == {"also": kept}


def test_a_lambda_is_rewritten():
    shift = 3
    again, events = rewritten(lambda x: double(x) + plus(x, shift))
    assert again(1) == 6
    assert events == ["double_0", "plus_0"]


def test_a_closure_sees_what_its_cells_hold_later():
    factor = 2

    def scaled(x):
        return double(x) * factor

    again, events = rewritten(scaled)
    assert again(1) == 4
    factor = 10
    assert again(1) == 20
    assert events == ["double_0"] * 2


def test_a_cell_that_is_empty_still_is_an_error_of_the_function():
    def reads():
        return double(later)

    again, _ = rewritten(reads)
    with pytest.raises(NameError, match="later"):
        again()
    later = 4
    assert again() == 8


# Decorators


def with_wraps(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


def without_wraps(function):
    def wrapper(*args):
        return function(*args) + 100

    return wrapper


def dispatching(function):
    """Hands what it has wrapped to somebody else, who runs something else."""

    @functools.wraps(function)
    def wrapper(x):
        return instead_of(function)(x)

    return wrapper


def instead_of(function):
    return double


@without_wraps
def hidden(x):
    return double(x)


@dispatching
def replaced(x):
    return plus(x)


@with_wraps
@torch.no_grad()
@with_wraps
def decorated_twice(x):
    y = double(x)
    return y + torch.is_grad_enabled()


def test_what_stands_below_decorators_is_rewritten_and_they_still_run():
    again, events = rewritten(decorated_twice)
    assert again(3) == decorated_twice(3) == 8
    assert events == ["double_0", "y_0", "torch_is_grad_enabled_0"]
    assert torch.is_grad_enabled()


def test_a_decorator_that_does_not_say_what_it_wraps_is_shown_itself():
    again, events = rewritten(hidden)
    assert again(1) == hidden(1) == 102
    assert events == ["function_0"]


def test_a_decorator_that_runs_something_else_is_shown_itself():
    again, events = rewritten(replaced)
    assert again(4) == replaced(4) == 8
    assert events == ["instead_of_0", "call_0"]


def test_the_decorator_itself_stays_as_it_is():
    before = [cell.cell_contents for cell in decorated_twice.__closure__]
    rewritten(decorated_twice)[0](1)
    assert [cell.cell_contents for cell in decorated_twice.__closure__] == before


# What cannot be told


def sentence(call):
    with pytest.raises(SourceError) as caught:
        dissected(peeled(call)[0])
    return str(caught.value)


def imported(folder, monkeypatch, text, name="written_for_a_test"):
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


def test_a_file_that_has_changed_since_is_refused_rather_than_guessed(tmp_path, monkeypatch):
    module = imported(tmp_path, monkeypatch, "def f(x):\n    return abs(x)\n")
    (tmp_path / "written_for_a_test.py").write_text("def f(x):\n    return round(abs(x)) + 1\n")
    assert sentence(module.f) == (
        f"The operations of `f` cannot be told: {module.__file__!r} no longer holds the code that is running.\n"
        "Import the file once more."
    )


def test_what_is_known_of_running_code_holds_when_its_file_changes_later(tmp_path, monkeypatch):
    module = imported(tmp_path, monkeypatch, "def f(x):\n    return abs(x)\n")
    assert names(module.f) == ["abs_0"]
    (tmp_path / "written_for_a_test.py").unlink()
    assert names(module.f) == ["abs_0"]


def test_code_without_source_is_refused():
    made = {}
    exec("def f(x):\n    return abs(x)\n", made)
    assert sentence(made["f"]) == (
        "The operations of `f` cannot be told: there is no source to be had for it in '<string>'.\n"
        "Read the outputs of its modules instead, or define it in a file or a notebook cell."
    )


def test_of_two_lambdas_on_a_line_neither_is_guessed():
    pair = (lambda x: double(x), lambda x: plus(x))
    assert sentence(pair[0]) == sentence(pair[1])
    assert "there is no source to be had" in sentence(pair[0])


@pytest.mark.parametrize("call", [abs, torch.nn.functional.linear, [].append, int, torch.relu])
def test_what_is_not_written_in_python_says_so(call):
    assert sentence(call) == (
        f"`{call.__qualname__}` is not written in Python, so it has no operations.\nRead its output and its inputs."
    )


def test_a_notebook_cell_has_operations():
    text = "def f(x):\n    y = abs(x)\n    return y\n"
    linecache.cache["<cell 7>"] = len(text), None, text.splitlines(True), "<cell 7>"
    made = {}
    exec(compile(text, "<cell 7>", "exec"), made)
    try:
        assert names(made["f"]) == ["abs_0", "y_0"]
    finally:
        del linecache.cache["<cell 7>"]


def test_a_call_with_many_arguments_is_compiled_as_in_its_file(tmp_path, monkeypatch):
    """CPython compiles the call of what is imported in another way than that of what is not."""
    assert names(torch.nn.MultiheadAttention.forward)[-1] == "attn_output_1"
    many = ", ".join(f"name_{number}={number}" for number in range(40))
    module = imported(
        tmp_path, monkeypatch, f"try:\n    import builtins as b\nexcept ImportError:\n    pass\ndef f(x):\n    b.dict({many})\n"
    )
    assert names(module.f) == ["b_dict_0"]


def test_code_is_rewritten_once_for_all_functions_that_run_it():
    made = [closure(number) for number in range(2)]
    assert dissected(made[0]) is dissected(made[1])
    assert [rewritten(each)[0](1) for each in made] == [2, 3]


def closure(number):
    def inner(x):
        return double(x) + number

    return inner


# Errors


def raises_deep(x):
    y = double(x)
    if y:
        return (
            plus(
                y,
                [][x],
            )
        )  # fmt: skip


def raises_in_a_chain(x):
    return (
        "a"
        .upper()
        .index(
            "b"
        )
    )  # fmt: skip


def raises_from(x):
    try:
        int("no")
    except ValueError as error:
        raise KeyError(
            double(x)
        ) from error  # fmt: skip


def lines_of(function, *args):
    """The lines of the test that stand in the traceback of what the function raises, and the error."""
    try:
        function(*args)
    except Exception as error:
        rows = traceback.extract_tb(error.__traceback__)
        return type(error), str(error), [(each.name, each.lineno) for each in rows if each.name == function.__name__]
    return None


@pytest.mark.parametrize("function", [raises_deep, raises_from, raises_in_a_chain])
def test_a_traceback_shows_the_lines_of_the_function_as_it_is_written(function):
    again, _ = rewritten(function)
    assert lines_of(again, 2) == lines_of(function, 2) is not None


@pytest.mark.xfail(strict=True, reason="annotations that are kept as text are rewritten like code")
def test_an_annotation_of_a_function_inside_is_text_as_it_was():
    def outer(x):
        def inside(y: double(x)) -> plus(x):
            return y

        return inside.__annotations__

    again, _ = rewritten(outer)
    assert again(1) == outer(1)


# Any function


class Program:
    """Draws the text of a function of small integers, which may raise."""

    def __init__(self, draw):
        self.draw = draw

    def expression(self, depth):
        draw, inner = self.draw, (lambda: self.expression(depth - 1))
        if depth == 0:
            return draw(st.sampled_from(["a", "b", "x", "1", "0"]))
        shape = draw(st.integers(0, 11))
        return [
            lambda: f"double({inner()})",
            lambda: f"plus({inner()}, {inner()})",
            lambda: f"plus(*[{inner()}], by={inner()})",
            lambda: f"({inner()} + {inner()})",
            lambda: f"({inner()} // {inner()})",
            lambda: f"(b := {inner()})",
            lambda: f"sum([double(k) + {inner()} for k in range({self.expression(0)} % 3)])",
            lambda: f"(lambda k, j={inner()}: plus(k, j))({inner()})",
            lambda: f"int(f'{{double({self.expression(0)})}}'.zfill(3))",
            lambda: f"({inner()} if {inner()} else {inner()})",
            lambda: f"max(sorted([{inner()}, {inner()}]))",
            lambda: inner(),
        ][shape]()

    def block(self, depth, indent):
        return "".join(self.statement(depth, indent) for _ in range(self.draw(st.integers(1, 3))))

    def statement(self, depth, indent):
        draw, pad, value = self.draw, "    " * indent, (lambda: self.expression(draw(st.integers(0, 2))))
        inner = lambda: self.block(depth - 1, indent + 1)  # noqa: E731
        shape = draw(st.integers(0, 12 if depth else 5))
        return [
            lambda: f"{pad}a = {value()}\n",
            lambda: f"{pad}a, b = {value()}, {value()}\n",
            lambda: f"{pad}b += {value()}\n",
            lambda: f"{pad}a: int = {value()}\n",
            lambda: f"{pad}seen.append(\n{pad}    {value()},\n{pad})\n",
            lambda: f"{pad}d[{value()}] = {value()}\n",
            lambda: f"{pad}if {value()}:\n{inner()}{pad}else:\n{inner()}",
            lambda: f"{pad}for a in range({value()} % 3):\n{inner()}",
            lambda: f"{pad}try:\n{inner()}{pad}except ZeroDivisionError:\n{inner()}{pad}finally:\n{inner()}",
            lambda: f"{pad}with contextlib.suppress(ZeroDivisionError):\n{inner()}",
            lambda: (
                f"{pad}def g(y={value()}):\n{pad}    nonlocal b\n{inner()}{pad}    return y\n{pad}a = g()\n"
                if indent == 1
                else f"{pad}b -= {value()}\n"
            ),
            lambda: f"{pad}if {value()}:\n{pad}    return {value()}\n",
            lambda: f"{pad}d[{value()}] = double({value()}) if {value()} else b\n",
        ][shape]()


@st.composite
def functions(draw):
    return "def f(x, seen):\n    a, b, d = 1, 2, {}\n" + Program(draw).block(2, 1) + "    return a, b, d, x\n"


def outcome(function, x, name):
    seen = []
    try:
        value = function(x, seen)
    except Exception as error:
        lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == name]
        return seen, type(error), str(error), lines
    return seen, value


@settings(max_examples=150, deadline=None)
@given(text=functions(), x=st.integers(-2, 3))
def test_any_function_gives_or_raises_the_same_at_the_same_line(text, x):
    name = "<a drawn function>"
    linecache.cache[name] = len(text), None, text.splitlines(True), name
    made = {"double": double, "plus": plus, "contextlib": contextlib}
    exec(compile(text, name, "exec"), made)
    again, events = rewritten(made["f"])
    assert outcome(again, x, name) == outcome(made["f"], x, name)
    assert set(events) <= set(names(made["f"]))
    del linecache.cache[name]
