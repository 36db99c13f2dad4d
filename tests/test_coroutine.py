"""A coroutine: paused anywhere, resumed from anywhere on its thread, and closed with its `finally` blocks."""

import gc
import sys
import threading
import traceback
import weakref
from pathlib import Path

import pytest
import torch
from paused import Thing, paused

import nnsight_eager
from nnsight_eager import NNsight
from nnsight_eager.coroutine import Closed, Coroutine
from nnsight_eager.errors import InsideForwardError, InternalError

OUR_FOLDER = str(Path(nnsight_eager.__file__).parent)


# Order


def test_both_sides_take_turns():
    events = []

    def work(first, *, second):
        events.append(first)
        coroutine.pause("a")
        events.append(second)
        coroutine.pause("b")
        events.append("three")
        return "result"

    coroutine = Coroutine(work, "one", second="two")
    events.append("nothing runs yet")
    while not coroutine.finished:
        events.append(coroutine.resume())
    assert events == ["nothing runs yet", "one", "a", "two", "b", "three", None]
    assert coroutine.result == "result"


def test_it_pauses_from_below_c_frames():
    coroutine = Coroutine(lambda: sorted([3, 1, 2], key=lambda x: coroutine.pause(x) or x))
    asked = []
    while (value := coroutine.resume()) is not None:
        asked.append(value)
    assert (asked, coroutine.result) == ([3, 1, 2], [1, 2, 3])


def test_many_paused_at_once_go_on_in_any_order():
    events = []
    first, second, third = (paused(events, name) for name in "abc")
    second.resume(), third.resume(), first.resume()
    assert [event[0] for event in events] == ["b", "b", "c", "c", "a", "a"]


def test_each_pause_switches_back_to_whoever_resumed():
    """The opener, another coroutine, and the opener again."""
    events = []

    def work():
        for turn in range(3):
            events.append(f"work {turn}")
            coroutine.pause(turn)

    def other():
        events.append(f"other got {coroutine.resume()}")

    coroutine = Coroutine(work)
    events.append(f"opener got {coroutine.resume()}")
    Coroutine(other).resume()
    events.append(f"opener got {coroutine.resume()}")
    assert events == ["work 0", "opener got 0", "work 1", "other got 1", "work 2", "opener got 2"]


def test_one_that_resumes_itself_from_within_is_told_so():
    inner = Coroutine(lambda: outer.resume())
    outer = Coroutine(inner.resume)
    with pytest.raises(InsideForwardError):
        outer.resume()


def test_one_that_has_ended_is_not_resumed():
    coroutine = Coroutine(int)
    coroutine.resume()
    with pytest.raises(InternalError):
        coroutine.resume()


# Exceptions


def test_what_the_function_raises_is_raised_where_it_is_resumed():
    error = KeyError("mine")

    def work():
        coroutine.pause(None)
        raise error

    coroutine = Coroutine(work)
    coroutine.resume()
    with pytest.raises(KeyError) as raised:
        coroutine.resume()
    assert raised.value is error
    assert coroutine.finished


def test_an_exception_being_handled_on_one_side_is_not_seen_on_the_other():
    def work():
        seen.append(sys.exc_info())
        try:
            raise KeyError
        except KeyError:
            coroutine.pause(None)
            seen.append(sys.exc_info()[0])

    seen = []
    coroutine = Coroutine(work)
    try:
        raise ValueError
    except ValueError:
        coroutine.resume()
        seen.append(sys.exc_info()[0])
        coroutine.resume()
    assert seen == [(None, None, None), ValueError, KeyError]


def test_a_traceback_names_the_users_lines_and_none_of_ours():
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    def read_both():
        with model.trace(torch.ones(1, 2)):
            _ = model[0].output
            _ = model[1][0].output

    model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(Broken())))
    with pytest.raises(ZeroDivisionError) as raised:
        read_both()
    frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert (__file__, "read_both") in frames
    assert (__file__, "forward") == frames[-1]
    in_torch = next(at for at, (name, _) in enumerate(frames) if "torch" in name)
    assert not [name for name, _ in frames[in_torch:] if name.startswith(OUR_FOLDER)]


def test_an_error_that_was_raised_leaves_no_cycle_behind():
    def work(thing):
        raise KeyError

    thing = Thing()
    alive = weakref.ref(thing)
    gc.disable()
    try:
        with pytest.raises(KeyError):
            Coroutine(work, thing).resume()
        del thing
        assert alive() is None
    finally:
        gc.enable()


# Closing


def test_closing_runs_the_finally_blocks():
    events = []
    paused(events).close()
    assert events == ["work was closed", "work ended"]


def test_closing_one_that_has_not_begun_runs_nothing():
    coroutine = Coroutine(pytest.fail)
    coroutine.close()
    assert coroutine.finished


def test_closing_twice_or_after_the_end_does_nothing():
    events = []
    coroutine = paused(events)
    coroutine.close()
    coroutine.close()
    assert len(events) == 2


def test_one_that_swallows_the_closing_and_pauses_again_is_closed_again():
    events = []

    def work():
        for attempt in range(3):
            try:
                coroutine.pause(None)
            except Closed:
                events.append(attempt)
        return "stubborn"

    coroutine = Coroutine(work)
    coroutine.resume()
    coroutine.close()
    assert (events, coroutine.finished, coroutine.result) == ([0, 1, 2], True, "stubborn")


def test_what_a_finally_block_raises_while_closing_is_raised_by_close():
    def work():
        try:
            coroutine.pause(None)
        finally:
            raise KeyError

    coroutine = Coroutine(work)
    coroutine.resume()
    with pytest.raises(KeyError):
        coroutine.close()
    assert coroutine.finished


def test_a_thread_ends_quietly_on_which_one_coroutine_has_resumed_another():
    def nested():
        inner = Coroutine(lambda: inner.pause("inner"))
        inner.resume()
        outer.pause("outer")
        inner.resume()

    def work():
        nonlocal outer
        outer = Coroutine(nested)
        outer.resume()
        outer.resume()

    outer = None
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert outer.finished
    gc.collect()  # what is raised where the thread's stacks end is an unraisable warning, and so an error
