"""What needs no torch: coroutines, their fence and context, and `.save()`. Runs on Pythons that have no torch as well."""

import contextvars
import gc
import threading
import traceback

import pytest

from nnsight_eager import compat
from nnsight_eager.coroutine import Coroutine
from nnsight_eager.errors import InternalError, WrongThreadError


def test_a_function_is_paused_from_inside_and_goes_on():
    def deep(levels):
        return deep(levels - 1) if levels else coroutine.pause("half way")

    def function():
        deep(50)
        return "done"

    coroutine = Coroutine(function)
    assert [coroutine.resume(), coroutine.finished] == ["half way", False]
    assert [coroutine.resume(), coroutine.finished, coroutine.result] == [None, True, "done"]
    with pytest.raises(InternalError):
        coroutine.resume()


def test_an_error_is_raised_where_the_coroutine_is_resumed_with_its_own_frames():
    def fails():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        Coroutine(fails).resume()
    assert [frame.name for frame in traceback.extract_tb(caught.tb)][-1] == "fails"


def test_closing_runs_the_finally_blocks_once():
    def function():
        try:
            coroutine.pause(1)
        finally:
            events.append("finally")

    events = []
    coroutine = Coroutine(function)
    coroutine.resume()
    coroutine.close()
    coroutine.close()
    assert events == ["finally"]
    assert coroutine.finished


def test_context_variables_are_shared():
    variable = contextvars.ContextVar("variable", default="before")

    def function():
        seen.append(variable.get())
        variable.set("set inside")
        coroutine.pause(None)
        seen.append(variable.get())

    seen, coroutine = [], Coroutine(function)
    variable.set("set outside")
    coroutine.resume()
    assert variable.get() == "set inside"
    variable.set("set again")
    coroutine.resume()
    assert seen == ["set outside", "set again"]


def test_another_thread_is_refused_and_a_thread_that_ends_closes_what_it_has_paused():
    def function(events):
        try:
            coroutines[-1].pause(None)
        finally:
            events.append("finally")

    def work():
        coroutines.append(Coroutine(function, events))
        coroutines[-1].resume()

    events, coroutines = [], []
    coroutines.append(here := Coroutine(function, []))
    here.resume()

    def resume_elsewhere():
        with pytest.raises(WrongThreadError):
            here.resume()
        refused.append(True)

    refused, thread = [], threading.Thread(target=resume_elsewhere)
    thread.start()
    thread.join()
    assert refused
    here.resume()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert events == ["finally"]


def test_coroutines_begin_and_end_at_any_depth_of_the_stack():
    def function():
        each.pause(1)
        raise ValueError

    def at_depth(levels, call):
        return at_depth(levels - 1, call) if levels else call()

    for depth in range(0, 300, 7):
        each = Coroutine(function)
        assert at_depth(depth, each.resume) == 1
        with pytest.raises(ValueError):
            at_depth(300 - depth, each.resume)


def test_builtin_values_have_save_and_no_other_name():
    compat.add_save_to_builtins()
    for value in ([1], (1,), {1: 2}, {1}, 1, 1.5, True):
        assert value.save() is value
        assert not hasattr(value, "value")
    assert not hasattr("text", "save")
