"""The body of a block is left out where it stands, and whoever traced the frame notices nothing else."""

import sys

import pytest

from nnsight_eager.skipping import SkippedBody, Skipping


class LeftOut:
    """A block whose body does not run."""

    def __enter__(self):
        self.skipping = Skipping(sys._getframe(1))

    def __exit__(self, kind, error, traceback):
        self.error = error
        self.left_out = self.skipping.end(error)
        return self.left_out


@pytest.fixture(autouse=True)
def tracing():
    """What traces this thread is put back: a coverage tool may trace the tests."""
    before = sys.gettrace()
    yield
    sys.settrace(before)


def test_the_body_does_not_run_and_what_is_behind_it_does():
    events = []
    with LeftOut() as nothing:
        events.append("body")
    events.append("behind")
    assert events == ["behind"]
    with LeftOut(): events.append("body")  # fmt: skip # noqa: E701
    events.append("behind")
    assert events == ["behind", "behind"]
    assert "nothing" not in locals(), "the target is left to whoever skips"


def test_a_body_that_begins_with_a_try_of_its_own_does_not_catch_it():
    events = []
    with LeftOut():
        try:
            events.append("body")
        except BaseException:
            events.append("caught")
        finally:
            events.append("finally")
    with LeftOut():
        while True:
            try:
                continue
            except SkippedBody:
                break
    with LeftOut() as events[0], LeftOut():
        pass
    assert events == []


def test_a_body_that_compiles_to_nothing_is_left_too():
    blocks = [LeftOut() for _ in range(3)]
    with blocks[0]:
        pass
    with blocks[1]:
        ...
    with blocks[2]:
        "a string"
    assert [block.left_out for block in blocks] == [True] * 3


def test_in_a_loop_a_generator_and_a_finally_block():
    events = []

    def run():
        for turn in range(2):
            try:
                yield f"before {turn}"
            finally:
                with LeftOut():
                    events.append("body")
                events.append(f"behind {turn}")

    events += list(run())
    assert events == ["behind 0", "behind 1", "before 0", "before 1"]


class Failing(LeftOut):
    """Its `__enter__` fails when it has begun to skip."""

    def __enter__(self):
        self.skipping = Skipping(sys._getframe(1))
        raise KeyboardInterrupt


def test_an_error_of_ones_own_is_not_taken_for_it():
    class Swapping(LeftOut):
        def __exit__(self, kind, error, traceback):
            assert not self.skipping.end(SkippedBody())
            return super().__exit__(kind, error, traceback)

    block = Swapping()
    with block:
        pass
    assert block.left_out


def test_nothing_is_left_out_when_entering_fails():
    """As an interrupt does that comes when the frame is traced already."""
    events = []
    before, traced = sys.gettrace(), sys._getframe().f_trace
    try:
        with Failing():
            events.append("body")
    except KeyboardInterrupt:
        events.append("caught")
    events.append("behind")
    assert events == ["caught", "behind"]
    assert sys.gettrace() is before
    assert sys._getframe().f_trace is traced
    assert not sys._getframe().f_trace_opcodes


# Whoever traces


def test_the_frame_is_traced_as_before():
    frame = sys._getframe()

    def own(*_):
        return own

    def settings():
        return sys.gettrace(), frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines

    plain = settings()
    with LeftOut():
        pass
    assert settings() == plain
    try:
        sys.settrace(own)
        frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = own, True, False
        traced = settings()
        with LeftOut():
            pass
        assert settings() == traced
    finally:
        sys.settrace(None)
        frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = None, False, True


def test_a_tracer_sees_the_lines_around_the_block_and_those_of_the_functions_called_later():
    lines = []

    def tracer(frame, event, _):
        if frame.f_code.co_filename == __file__ and frame.f_code.co_name in ("run", "called"):
            if event == "line":
                lines.append((frame.f_code.co_name, frame.f_lineno - frame.f_code.co_firstlineno))
            return tracer
        return None

    def called():
        return 1

    def run():
        before = called()
        with LeftOut():
            before = called()
        after = called()
        return before, after

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(before)
    around = [line for name, line in lines if name == "run"]
    assert [line for line in around if line != 2] == [1, 4, 5], "line 2 is the `with` statement's"
    assert 2 in around
    assert [line for name, line in lines if name == "called"] == [1, 1]


def test_a_tracer_that_is_off_in_this_frame_stays_off():
    lines = []

    def tracer(frame, event, _):
        if frame.f_code.co_name == "called":
            lines.append(event)
            return tracer
        return None

    def called():
        return 1

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with LeftOut():
            pass
        called()
    finally:
        sys.settrace(before)
    assert lines == ["call", "line", "return"]


def test_the_error_keeps_no_frame():
    block = LeftOut()
    with block:
        pass
    assert block.error.__traceback__ is None
