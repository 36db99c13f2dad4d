"""The line to a server that dies, comes back or never does; the actor is one that answers what it was told to."""

import getpass
import os
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from nnsight_eager import ServerLostError

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")

DIED = "The actor experienced an error before finishing this task"


class Method:
    """A method of the actor, as Ray's are called."""

    def __init__(self, name, actor):
        self.name, self.actor = name, actor

    def options(self, **_):
        return self

    def remote(self, *args):
        self.actor.called.append((self.name, *args))
        return self.actor.answers[self.name].pop(0)


class Actor:
    def __init__(self, **answers):
        self.answers, self.called = answers, []

    def __getattr__(self, name):
        return Method(name, self)


def opened(number):
    from nnsight_eager.remote.wire import Opened

    return Opened(number, "life", 1e6)


def died():
    import ray

    return ray.exceptions.RayActorError()


def line_to(**answers):
    """A line to an actor that gives these answers, one after another, or raises them."""
    import ray

    from nnsight_eager.remote.line import Line

    def get(answer, timeout=None):
        if isinstance(answer, Exception):
            raise answer
        return answer

    line = Line("llama", Actor(open=[opened(1), opened(2), opened(3)], **answers))
    line._ray = SimpleNamespace(get=get, exceptions=ray.exceptions, is_initialized=lambda: True)
    return line


def message(begin=None):
    from nnsight_eager.remote.wire import Message

    return Message(1, begin, [], None, "finish", ())


ANSWER = ((None, "", 0, False, 0, True, True), ("value", "value"), None)


@pytest.mark.parametrize(
    ("call", "lost"),
    [
        (lambda line: line.call("handled", 1), "what `handled` was to do"),
        (lambda line: line.control("handled"), "what `handled` was to do"),
        (lambda line: line.await_function(died(), None), "the function that was submitted"),
    ],
)
def test_whatever_was_asked_of_an_actor_that_dies_is_said_to_be_lost_in_one_sentence(call, lost):
    line = line_to(handled=[died()])
    assert line.session.session == 1
    with pytest.raises(ServerLostError) as caught:
        call(line)
    assert str(caught.value).splitlines()[0] == f"The actor `llama` has died, and with it {lost}. Ray says: {DIED}."
    assert line.session.session == 2  # let in anew


def test_a_function_that_has_not_ended_in_time_is_a_timeout():
    import ray

    with pytest.raises(TimeoutError, match="The function has not ended yet"):
        line_to().await_function(ray.exceptions.GetTimeoutError(), 1)


def test_a_server_that_was_started_anew_lets_the_client_in_anew_and_loses_only_what_had_begun():
    from nnsight_eager.remote.line import Lost

    line = line_to(go=[None, ANSWER, None])
    assert line.go(message(begin="the begin of a run")).value == "value"
    assert [name for name, *_ in line._actor.called] == ["open", "go", "open", "go"]
    with pytest.raises(Lost, match="it was started anew, and knows this client no more"):
        line.go(message())


def test_what_a_server_that_was_started_anew_does_not_know_is_lost():
    line = line_to(handled=[("unknown", None), ("returned", 5)])
    with pytest.raises(ServerLostError, match=r"with it what `handled` was to do\. Ray says: it was started anew"):
        line.call("handled")
    assert line.call("handled") == 5
    assert [call for call in line._actor.called if call[0] == "handled"] == [("handled", 1), ("handled", 2)]


def test_a_server_that_does_not_come_back_is_waited_for_and_then_given_up(monkeypatch):
    from nnsight_eager.remote import line as module

    line = line_to()
    line._actor.answers["open"] = [died(), opened(7)]
    line.wait_until_back()
    assert line.session.session == 7
    monkeypatch.setattr(module, "PATIENCE", -1)
    line = line_to()
    line._actor.answers["open"] = [died()]
    with pytest.raises(ServerLostError, match="has died, and with it what this client had there"):
        line.wait_until_back()


def dying(line, error):
    """Have the line's actor be away for as long as it is asked."""
    line._actor.answers["open"] = SimpleNamespace(pop=lambda _: error)
    return line


def test_nobody_waits_for_a_server_on_behalf_of_a_client_that_has_gone():
    line = dying(line_to(), died())
    threading.Timer(0.1, line.close).start()
    with pytest.raises(ServerLostError, match="has died, and with it what this client had there"):
        line.wait_until_back()


def test_nobody_waits_for_a_server_on_behalf_of_a_function_whose_future_nobody_has():
    from nnsight_eager.remote.jobs import Future

    line = line_to(run_function=[died()])
    future = Future(line, "the function", "name", retries=1)
    dying(line, died())
    assert not future.done()
    waiting = future._anew
    assert waiting.is_alive()
    del future
    waiting.join(60)
    assert not waiting.is_alive()


def test_closing_a_run_of_a_server_that_has_died_is_nothing_to_be_told_of():
    line = line_to(close=[None, died()])
    line.close_run(3)  # nobody has been let in, so there is nothing to close
    assert line.session.session == 1
    line.close_run(3)
    line.close_run(4)
    assert line._actor.called[1:] == [("close", 1, 3), ("close", 1, 4)]
    assert line.session.session == 2


def test_who_is_not_known_when_giving_a_sign_of_life_is_let_in_anew():
    line = line_to(beat=[True, False])
    session = line.session
    line.forget("ref", 5)
    assert line._beat(session)
    assert not line._beat(session)
    assert line._actor.called[1:] == [("beat", 1, [("ref", 5)]), ("beat", 1, [])]
    assert line.session.session == 2
    assert not line._beat(session)  # of a session that is over


def test_a_user_without_a_name_is_seen_by_number(monkeypatch):
    def nobody():
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    line = line_to()
    assert line.session.session == 1
    ((_, owner),) = line._actor.called
    assert owner.startswith(f"{os.getuid()}@")
    assert owner.endswith(f":{os.getpid()}")


def test_a_function_that_a_server_started_anew_does_not_know_is_submitted_again():
    from nnsight_eager.remote.jobs import Future
    from nnsight_eager.remote.packing import packed

    line = line_to(run_function=[("unknown", None), ("returned", packed(41))])
    assert Future(line, "the function", "name").result() == 41
    assert [call for call in line._actor.called if call[0] == "run_function"] == [
        ("run_function", 1, 1, "the function"),
        ("run_function", 2, 2, "the function"),
    ]
