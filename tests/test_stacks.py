"""What coroutines share and leave behind: context variables, threads, the stacks they run on."""

import contextvars
import gc
import threading
import weakref
from pathlib import Path

from greenlet import greenlet
from paused import Thing, paused

import nnsight_eager
from nnsight_eager.coroutine import Coroutine
from nnsight_eager.errors import WrongThreadError

OUR_FOLDER = str(Path(nnsight_eager.__file__).parent)


def greenlets():
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), greenlet) and not each.dead]


def in_a_thread(function):
    """What `function` returns or raises on a thread of its own."""
    answer = []

    def work():
        try:
            answer.append(function())
        except BaseException as error:
            answer.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return answer[0]


# Context variables

name = contextvars.ContextVar("name", default="default")


def test_context_variables_are_shared_both_ways():
    def work():
        seen.append(name.get())
        name.set("set inside")
        coroutine.pause(None)
        seen.append(name.get())

    seen = []
    coroutine = Coroutine(work)
    token = name.set("set before")
    coroutine.resume()
    seen.append(name.get())
    name.set("set while paused")
    coroutine.resume()
    name.reset(token)
    assert seen == ["set before", "set inside", "set while paused"]


def test_a_context_that_the_function_entered_is_its_own():
    def work():
        contextvars.copy_context().run(inside)
        seen.append(name.get())

    def inside():
        name.set("inside")
        coroutine.pause(None)
        seen.append(name.get())
        coroutine.pause(None)
        seen.append(name.get())

    seen = []
    coroutine = Coroutine(work)
    coroutine.resume()
    assert name.get() == "default"
    token = name.set("outside")
    coroutine.resume()
    contextvars.copy_context().run(coroutine.resume)
    assert name.get() == "outside"
    name.reset(token)
    assert seen == ["inside", "inside", "outside"]


def test_a_coroutine_resumed_in_another_context_sees_that_one():
    seen = []

    def work():
        for _ in range(2):
            seen.append(name.get())
            coroutine.pause(None)

    def other():
        name.set("other")
        coroutine.resume()

    coroutine = Coroutine(work)
    coroutine.resume()
    contextvars.copy_context().run(other)
    assert seen == ["default", "other"]


# Threads


def test_resuming_from_another_thread_is_refused_with_a_sentence():
    events = []
    coroutine = paused(events)
    error = in_a_thread(coroutine.resume)
    assert type(error) is WrongThreadError
    assert str(error) == (
        "This run is paused on another thread, and a paused forward pass can only go on on its own thread.\n"
        "Read it on the thread that opened the trace, or open a trace of its own on this one."
    )
    coroutine.resume()
    assert events == ["work went on", "work ended"]


def test_a_thread_that_ends_closes_what_it_left_paused():
    events, kept = [], []
    in_a_thread(lambda: kept.append(paused(events)))
    assert events == ["work was closed", "work ended"]
    assert kept[0].finished


def test_a_thread_that_ends_closes_what_another_coroutine_had_resumed():
    events, kept = [], []
    in_a_thread(lambda: Coroutine(lambda: kept.append(paused(events))).resume())
    assert events == ["work was closed", "work ended"]


def test_one_closed_from_another_thread_unwinds_on_its_own_thread_later():
    events = []
    coroutine = paused(events)
    in_a_thread(coroutine.close)
    assert events == []
    Coroutine(events.append, "the next begins").resume()
    assert events == ["work was closed", "work ended", "the next begins"]


def test_one_left_to_another_thread_unwinds_when_its_own_ends():
    events, ready, go_on = [], threading.Event(), threading.Event()
    kept = []

    def work():
        kept.append(paused(events))
        ready.set()
        go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    kept.pop().close()
    assert events == []
    go_on.set()
    thread.join()
    assert events == ["work was closed", "work ended"]


# Stacks


def test_stacks_are_used_again():
    def one():
        return 1

    Coroutine(one).resume()
    before = len(greenlets())
    for _ in range(100):
        Coroutine(one).resume()
        paused([]).close()
    assert len(greenlets()) == before


def test_an_idle_stack_refers_to_nothing_of_the_last_call():
    def call(argument, answer, result):
        def work(_):
            coroutine.pause(answer)
            return result

        coroutine = Coroutine(work, argument)
        coroutine.resume()
        coroutine.resume()
        return weakref.ref(work)

    things = [Thing(), Thing(), Thing()]
    alive = [weakref.ref(each) for each in things]
    gc.disable()
    try:
        alive.append(call(*things))
        things.clear()
        assert [each() for each in alive] == [None] * 4
    finally:
        gc.enable()


def test_the_stack_of_a_thread_that_ended_is_gone():
    before = len(greenlets())
    for _ in range(5):
        in_a_thread(lambda: (Coroutine(int).resume(), paused([])))
    assert len(greenlets()) <= before + 1  # greenlet frees a dead thread's main one when another thread next switches
