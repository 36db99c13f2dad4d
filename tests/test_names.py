"""What a name means in a block that runs later: its own, an earlier block's, the code's around it; never a later block's."""

import sys
import traceback

import pytest
from without_a_model import Together, Waiting, execute, values

from nnsight_eager.errors import InvokeError


def test_a_block_sees_what_an_earlier_one_has_bound():
    with Together() as t:
        with t.invoke():
            hidden = 1
        with t.invoke():
            seen = hidden + 1
    assert (hidden, seen) == (1, 2)


def test_the_nearest_earlier_block_is_meant():
    with Together() as t:
        with t.invoke():
            hidden = 1
        with t.invoke():
            hidden = 2
        with t.invoke():
            seen = hidden
        with t.invoke():
            hidden = 3
    assert (hidden, seen) == (3, 2)


def test_a_block_sees_its_own_binding_before_an_earlier_one():
    seen = []
    with Together() as t:
        with t.invoke():
            hidden = 1
        with t.invoke():
            hidden = 2
            seen.append(hidden)
    assert seen == [2]


def test_a_block_never_sees_a_later_one():
    hidden = "around"
    seen = []
    with Together() as t:
        with t.invoke() as pause:
            seen.append(hidden)
            t.let_others_run()
            seen.append(hidden)
        with t.invoke():
            hidden = "later"
    assert seen == ["around", "around"]
    assert hidden == "later"
    assert pause is None


def test_a_block_waits_until_an_earlier_one_has_bound_the_name_for_the_last_time():
    events = []
    with Together() as t:
        with t.invoke():
            events.append("first begins")
            t.let_others_run()
            hidden = 1
            events.append("first has bound it")
            t.let_others_run()
            hidden = 2
        with t.invoke():
            events.append("second begins")
            events.append(hidden)
    assert events == ["first begins", "second begins", "first has bound it", 2]


def test_a_nested_function_and_a_comprehension_wait_too():
    seen = []
    with Together() as t:
        with t.invoke():
            t.let_others_run()
            hidden = 1
        with t.invoke():

            def read():
                return [hidden + x for x in range(2)]

            class Holder:
                value = hidden

            seen += [read(), Holder.value]
    assert seen == [[1, 2], 1]


def test_a_block_waits_for_a_name_that_has_a_value_already():
    hidden = "old"
    with Together() as t:
        with t.invoke():
            t.let_others_run()
            hidden = "new"
        with t.invoke():
            seen = hidden
    assert seen == hidden == "new"


def test_a_second_run_of_a_cell_does_not_read_the_first_ones_values():
    cell = """
with Together() as t:
    with t.invoke():
        t.let_others_run()
        hidden = start
    with t.invoke():
        seen = hidden
"""
    names = {"Together": Together, "__name__": "__main__"}
    for start in (1, 2):
        names["start"] = start
        execute(cell, into=names)
        assert values(names) == {"start": start, "hidden": start, "seen": start}


def test_a_block_waits_for_a_name_that_is_also_a_builtin():
    names = execute("""
with Together() as t:
    with t.invoke():
        t.let_others_run()
        max = 5
    with t.invoke():
        seen = max
""")
    assert names["seen"] == 5


def test_a_name_that_the_earlier_block_did_not_bind_after_all_is_looked_up_further_out():
    hidden = "around"
    with Together() as t:
        with t.invoke():
            other = "not read"
            hidden = "of the first"
        with t.invoke():
            if not hidden:
                hidden = "never"
        with t.invoke():
            seen = hidden
    assert (seen, other) == ("of the first", "not read")
    with Together() as t:
        with t.invoke():
            if not other:
                missed = 1
        with t.invoke():
            missed_by_name = "missed" in locals()
    assert not missed_by_name
    assert "missed" not in locals()


def test_what_a_nested_function_binds_through_nonlocal_or_global_is_waited_for():
    names = execute("""
def f():
    a = 0
    with Together() as t:
        with t.invoke():
            def bind():
                nonlocal a
                global b
                a, b = 1, 2
            t.let_others_run()
            bind()
        with t.invoke():
            seen = a, b
    return a, seen
result = f()
""")
    assert (names["result"], names["b"]) == ((1, (1, 2)), 2)


def test_blocks_that_wait_for_each_other_are_told():
    with pytest.raises(Waiting) as raised, Together() as t:
        with t.invoke():
            t.wait(lambda: False, "godot")
            first = 1
        with t.invoke():
            first += 1
    assert str(raised.value) == "block 1 waits for godot; block 2 waits for `first`, which block 1 binds"


# The code around


def test_a_loop_variable_is_the_one_of_the_turn_that_met_the_block():
    seen = []

    def run():
        with Together() as t:
            for turn in range(3):
                name = f"turn {turn}"
                with t.invoke():
                    seen.append((turn, name))

    run()
    assert seen == [(0, "turn 0"), (1, "turn 1"), (2, "turn 2")]


def test_a_loop_variable_at_module_level_too():
    names = execute("""
seen = []
with Together() as t:
    for turn in range(3):
        with t.invoke():
            def read():
                return turn
            seen.append((turn, read(), [turn for _ in range(1)]))
""")
    assert names["seen"] == [(0, 0, [0]), (1, 1, [1]), (2, 2, [2])]


def test_what_a_function_called_in_a_block_does_to_the_module_is_seen():
    names = execute("""
calls = 0
seen = []
def count():
    global calls
    calls += 1
with Together() as t:
    for turn in range(3):
        with t.invoke():
            count()
            seen.append((turn, calls))
""")
    assert (names["seen"], names["calls"]) == ([(0, 1), (1, 2), (2, 3)], 3)


def test_a_loop_adds_up_over_its_turns():
    total, seen = 0, []
    with Together() as t:
        for turn in range(4):
            with t.invoke():
                total += turn
                seen.append(total)
    assert (total, seen) == (6, [0, 1, 3, 6])


def test_what_the_code_around_binds_behind_the_block_is_not_seen():
    with pytest.raises(NameError, match="name 'behind' is not defined"), Together() as t:
        with t.invoke():
            print(behind)  # noqa: F821
        behind = 1  # noqa: F841


def test_a_variable_without_a_value_is_not_looked_up_among_the_globals():
    names = execute("""
x = max = "of the module"
def f():
    with Together() as t:
        with t.invoke():
            for name in ("x", "max"):
                try:
                    x if name == "x" else max
                except NameError as error:
                    seen.append(str(error))
    x = max = 1
seen = []
f()
""")
    assert names["seen"] == ["name 'x' is not defined", "name 'max' is not defined"]


def test_a_name_that_a_comprehension_of_the_function_uses_is_still_the_modules():
    """From 3.12 on the comprehension's variable is among those of the function."""
    names = execute("""
x, y = 10, 20
def f():
    xs = [x for x in range(3)], {y: [max for max in ()] for y in ()}
    with Together() as t:
        with t.invoke():
            def read():
                return x, y, max(1, 2)
            seen = x, read()
    return xs, seen
result = f()
""")
    assert names["result"] == (([0, 1, 2], {}), (10, (10, 20, 2)))


def test_a_comprehension_may_use_a_variable_of_the_function():
    def f(x):
        xs = [x + 0 for x in range(x)]
        with Together() as t, t.invoke():
            seen = [x + 0 for x in range(x)], x
        return xs, seen

    assert f(2) == ([0, 1], ([0, 1], 2))


def test_eval_in_a_block_finds_every_variable_of_the_function():
    def f(first):
        with Together() as t, t.invoke():
            second = 2
            third = eval("first + second")
        return third, second

    assert f(1) == (3, 2)


def test_the_frame_and_its_values_are_let_go():
    import gc
    import weakref

    class Thing:
        pass

    def f():
        thing, other = Thing(), Thing()
        with Together() as t, t.invoke():

            def read():
                return thing

        return read, weakref.ref(thing), weakref.ref(other)

    read, thing, other = f()
    gc.collect()
    assert read() is thing()
    assert other() is None


# Errors


def test_a_name_that_nobody_binds_is_an_error_at_its_line():
    with pytest.raises(NameError, match="name 'nobody' is not defined") as raised, Together() as t, t.invoke():
        before = 1
        print(nobody)  # noqa: F821
    assert traceback.extract_tb(raised.value.__traceback__)[-1].line == "print(nobody)  # noqa: F821"
    assert before == 1


def test_what_was_bound_before_an_error_is_there_afterwards():
    with pytest.raises(ZeroDivisionError), Together() as t:
        with t.invoke():
            first = 1
        with t.invoke():
            second = 2
            third = first / 0
    assert (first, second) == (1, 2)
    assert "third" not in locals()


# What is there afterwards


def test_names_are_exported_in_the_order_written_whichever_ran_last():
    with Together() as t:
        with t.invoke():
            t.let_others_run()
            a = b = "first"
        with t.invoke():
            a = "second"
    assert (a, b) == ("second", "first")


def test_in_a_function_variables_closures_and_globals_are_written_where_they_live():
    names = execute("""
shared = 0
def outer():
    closed = 0
    def inner():
        nonlocal closed
        global shared
        mine = 0
        read = lambda: mine
        with Together() as t:
            with t.invoke():
                mine = 1
                closed = 2
                shared = 3
        return mine, read()
    return inner(), closed
result = outer()
""")
    assert (names["result"], names["shared"]) == (((1, 1), 2), 3)


def test_global_and_nonlocal_may_stand_in_the_block():
    names = execute("""
def outer():
    closed = 0
    def inner():
        with Together() as t:
            with t.invoke():
                global shared
                nonlocal closed
                closed += 1
                shared = 3
            with t.invoke():
                seen = closed, shared
        return seen
    return inner(), closed
result = outer()
""")
    assert (names["result"], names["shared"]) == (((1, 3), 1), 3)


def test_code_executed_with_two_dictionaries_binds_in_the_second():
    local = {}
    names = execute("with Together() as t:\n    with t.invoke():\n        a = 1\n        global b\n        b = 2", local=local)
    assert (values(local), values(names)) == ({"a": 1}, {"b": 2})


def test_a_name_deleted_in_a_block_is_gone_there_and_afterwards():
    names = execute("""
x = y = z = 1
seen = []
with Together() as t:
    with t.invoke():
        del x
        try:
            x
        except NameError as error:
            seen.append(str(error))
        del y
        y = 2
        del (z)
    with t.invoke():
        try:
            x
        except NameError as error:
            seen.append(str(error))
        seen.append(y)
        z = 3
""")
    assert values(names) == {"y": 2, "z": 3, "seen": ["name 'x' is not defined"] * 2 + [2]}


def test_what_an_earlier_block_binds_and_a_later_one_deletes_is_not_there_afterwards():
    with Together() as t:
        with t.invoke():
            x = 1
        with t.invoke():
            y = x
            del x
    assert y == 1
    assert "x" not in locals()


def test_the_name_of_a_caught_error_is_gone_afterwards():
    names = execute("""
error = "before"
with Together() as t:
    with t.invoke():
        try:
            raise KeyError
        except KeyError as error:
            seen = repr(error)
        try:
            error
        except NameError:
            seen += " and gone"
""")
    assert values(names) == {"seen": "KeyError() and gone"}


def test_the_name_of_an_error_that_was_not_caught_stays():
    names = execute("""
def f():
    error = "before"
    with Together() as t:
        with t.invoke():
            try:
                pass
            except KeyError as error:
                pass
            seen = error
    return seen, error
result = f()
""")
    assert names["result"] == ("before", "before")


def test_deleting_a_variable_of_a_function_works_or_is_refused():
    def f():
        x = y = 1
        with Together() as t, t.invoke():
            y += x
            del x
        return y, "x" in locals()

    if sys.version_info < (3, 12):
        assert f() == (2, False)
    else:
        with pytest.raises(InvokeError) as raised:
            f()
        assert str(raised.value).splitlines()[0] == (
            "This block cannot be run in the model's forward pass: "
            "it deletes `x`, and from 3.12 on Python cannot delete a function's variable from outside."
        )


def test_a_function_made_in_a_block_of_a_module_sees_later_values():
    names = execute("""
with Together() as t:
    with t.invoke():
        x = 1
        def read():
            return x
x = 2
seen = read()
""")
    assert names["seen"] == 2


def test_classes_and_functions_made_in_a_block_belong_to_the_module():
    names = execute("""
with Together() as t:
    with t.invoke():
        def f(): pass
        class C:
            def m(self): pass
""")
    assert [(each.__module__, each.__qualname__) for each in (names["f"], names["C"], names["C"].m)] == [
        ("a_module", "f"),
        ("a_module", "C"),
        ("a_module", "C.m"),
    ]


def test_a_block_goes_on_as_soon_as_no_binding_is_ahead():
    events = []
    with Together() as t:
        with t.invoke():
            hidden = 1
            hidden = hidden + 1
            t.let_others_run()
            events.append("first ends")
        with t.invoke():
            events.append(hidden)
    assert events == [2, "first ends"]


def test_what_blocks_count_together_is_what_they_count_one_after_another():
    count, names = 0, []
    with Together() as t:
        for name in "abc":
            with t.invoke():
                count += 1
                t.let_others_run()
                for _ in range(2):
                    count += 10
                    names.append((name, count))
                    t.let_others_run()
    assert count == 63
    assert names == [("a", 11), ("a", 21), ("b", 32), ("b", 42), ("c", 53), ("c", 63)]
