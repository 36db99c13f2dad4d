"""One call of the model: begun by `with`, ended however the block is left, apart from every other call."""

import contextlib
import gc
import threading
import traceback
import weakref

import pytest
import torch
from small_models import X4, Stack, hooked

from nnsight_eager import NNsight
from nnsight_eager.errors import InputError, InsideForwardError, NnsightEagerError, OutOfOrderError, RunEndedError, RunError


@pytest.fixture
def model():
    return NNsight(Stack())


def is_as_before(model):
    return all("forward" not in m.__dict__ and not m._forward_hooks for m in model._module.modules())


def frames_of(error):
    """File and line text of each frame of the traceback."""
    return [(frame.filename, frame.line) for frame in traceback.extract_tb(error.__traceback__)]


# Apart from every other call


def test_a_trace_inside_a_trace_of_the_same_model(model):
    with model.trace(X4) as outer:
        first = model.h[0].output
        with model.trace(2 * X4) as inner:
            nested = model.h[0].output
            model.h[1].output = first
            also_nested = model.h[2].output
        second = model.h[1].output
    plain = hooked(model._module, lambda: model(X4), "h.0", "h.1")
    assert all(torch.equal(a, b) for a, [b] in zip((first, second), plain, strict=True))
    assert torch.equal(nested, model.h[0](2 * X4))
    assert torch.equal(also_nested, model.h[2](first))
    assert torch.equal(inner.result, model.head(also_nested))
    assert torch.equal(outer.result, model(X4))
    assert is_as_before(model)


def test_a_trace_inside_a_trace_at_the_same_module_three_deep(model):
    def deep(level):
        with model.trace(level * X4) as tracer:
            before = model.h[1].output
            if level < 3:
                deep(level + 1)
            model.h[1].output = before * level
        found[level] = before, tracer.result

    found = {}
    deep(1)
    for level, (before, result) in found.items():
        assert torch.equal(before, model.h[1](model.h[0](level * X4)))
        assert torch.equal(result, model.head(model.h[2](before * level)))
    assert is_as_before(model)


@pytest.mark.parametrize("called", ["module", "envoy"])
def test_calling_the_raw_model_in_the_body_sees_neither_edits_nor_reads(model, called):
    plain = model._module(X4)
    with model.trace(X4) as tracer:
        model.h[0].output = torch.zeros(1, 4)
        inside = (model._module if called == "module" else model)(X4)
        second = model.h[1].output
    assert torch.equal(inside, plain)
    assert torch.equal(second, model.h[1](torch.zeros(1, 4)))
    assert torch.equal(tracer.result, model.head(model.h[2](second)))


def test_a_trace_of_a_submodule_wrapped_on_its_own_may_be_nested(model):
    block = NNsight(model._module.h[1])
    with model.trace(X4) as outer:
        hidden = model.h[0].output
        with block.trace(hidden) as inner:
            ahead = block.lin.output
            block.lin.output = ahead * 0
        lin = model.h[1].lin.output
    assert torch.equal(ahead, lin)
    assert torch.equal(inner.result, hidden)
    assert torch.equal(outer.result, model(X4))


def test_a_trace_opened_by_the_models_own_forward(model):
    read = []

    def look(*_):
        with model.trace(3 * X4):
            read.append(model.h[0].output)

    handle = model._module.head.register_forward_pre_hook(lambda *a: None if read else look())
    with model.trace(X4):
        head = model.head.output
    handle.remove()
    assert torch.equal(read[0], model.h[0](3 * X4))
    assert torch.equal(head, model(X4))


def test_a_run_belongs_to_its_thread(model):
    refused = []

    def read():
        try:
            _ = tracer.model.h[1].output
        except RunError as error:
            refused.append(type(error).__name__)

    with model.trace(X4) as tracer:
        _ = model.h[0].output
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        second = model.h[1].output
    assert refused == ["WrongThreadError"]
    assert torch.equal(second, model.h[1](model.h[0](X4)))


# Results


def test_the_result_inside_the_block_runs_the_rest(model):
    with model.trace(X4) as tracer:
        model.h[2].output = torch.zeros(1, 4)
        inside = tracer.result
    assert torch.equal(inside, model.head(torch.zeros(1, 4)))
    assert tracer.result is inside


def test_the_result_needs_no_block(model):
    assert torch.equal(model.trace(X4).result, model(X4))
    assert is_as_before(model)


def test_a_trace_may_be_entered_again_when_it_has_ended(model):
    tracer = model.trace(X4)
    for _ in range(2):
        with tracer:
            hidden = model.h[0].output
        assert torch.equal(hidden, model.h[0](X4))
    with pytest.raises(RunError) as caught, tracer, tracer:
        pass
    assert str(caught.value) == ("This trace is open already.\nCall `model.trace(...)` once more for a second run.")
    assert is_as_before(model)


def test_a_method_or_any_callable_may_be_what_runs(model):
    expected = model._module.generate(X4, 2)
    assert torch.equal(model.trace(X4, 2, fn="generate").result, expected)
    assert torch.equal(model.trace(X4, steps=2, fn="generate").result, expected)
    assert torch.equal(model.trace(fn=lambda: model._module(model._module(X4))).result, expected)


@pytest.mark.parametrize(
    ("fn", "said"), [("generat", "`model` (Stack) has no `generat`; did you mean `generate`?"), (5, "`fn` was given 5.")]
)
def test_what_cannot_be_called_is_refused(model, fn, said):
    with pytest.raises(InputError) as caught:
        model.trace(X4, fn=fn)
    assert str(caught.value) == f'{said}\n`fn="..."` names a method of the model, or is a callable that runs it.'


def test_a_trace_says_where_it_is(model):
    tracer = model.trace(X4)
    assert repr(tracer) == "<forward of Stack: not begun; it is begun by `with` or `.result`>"
    with tracer:
        assert repr(tracer) == "<forward of Stack: at the start>"
        _ = model.h[1].lin.output
        assert repr(tracer) == "<forward of Stack: paused at model.h[1].lin.output, step 0>"
    assert repr(tracer) == "<forward of Stack: finished>"


def test_what_needs_a_begun_trace_says_so(model):
    for use in (lambda t: t.iter, lambda t: t.model, lambda t: t.next(), lambda t: t.stop()):
        with pytest.raises(RunError) as caught:
            use(model.trace(X4))
        assert str(caught.value) == (
            "This trace has not begun.\nWrite `with model.trace(...) as tracer:` and use `tracer` in the block."
        )


# Stopping


def test_stop_leaves_the_block_and_computes_nothing_behind_it(model):
    events = []
    handles = [m.register_forward_pre_hook(lambda m, a: events.append(m)) for m in (*model._module.h, model._module.head)]
    with model.trace(X4) as tracer:
        hidden = model.h[1].output
        tracer.stop()
        raise AssertionError("not reached")
    for handle in handles:
        handle.remove()
    assert events == [*model._module.h][:2]
    assert torch.equal(hidden, model.h[1](model.h[0](X4)))
    assert is_as_before(model)
    with pytest.raises(RunEndedError) as caught:
        _ = tracer.result
    assert str(caught.value) == (
        "This run was closed before its end, so it has no result.\nOpen a new trace to run the model again."
    )
    with pytest.raises(RunEndedError):
        tracer.stop()


def test_the_outer_trace_can_be_stopped_from_an_inner_block(model):
    events = []
    with model.trace(X4) as outer:
        _ = model.h[0].output
        with model.trace(X4) as inner:
            _ = model.h[1].output
            outer.stop()
        events.append("behind the inner block")
    assert events == []
    assert is_as_before(model)
    for tracer in (outer, inner):
        with pytest.raises(RunEndedError):
            _ = tracer.result


def test_stop_passes_through_except_exception(model):
    with model.trace(X4) as tracer:
        try:
            tracer.stop()
        except Exception:
            raise AssertionError("not reached") from None
        raise AssertionError("not reached")


def test_stop_runs_the_finally_blocks_of_the_forward(model):
    events = []

    def forward(x):
        try:
            return model._module(x)
        finally:
            events.append("finally")

    with model.trace(X4, fn=forward) as tracer:
        _ = model.h[0].output
        tracer.stop()
    assert events == ["finally"]


# Errors


def test_an_error_in_the_body_is_unchanged_and_shows_the_users_lines_alone(model):
    mistake = KeyError("mine")
    with pytest.raises(KeyError) as caught, model.trace(X4):
        _ = model.h[1].output
        raise mistake
    assert caught.value is mistake
    assert not hasattr(mistake, "__notes__")
    assert mistake.__context__ is None
    assert frames_of(mistake) == [(__file__, "raise mistake")]
    assert is_as_before(model)


@pytest.mark.parametrize("ask", ["model.h[0].output", "model.h[0].hidden", "tracer.cache('no.such')", "tracer.invoke(X4)"])
def test_an_error_of_a_point_or_a_tracer_shows_the_users_lines_alone(model, ask):
    with pytest.raises(NnsightEagerError) as caught, model.trace(X4) as tracer:
        model.h[1].output
        eval(ask, {**globals(), "model": model, "tracer": tracer})
    assert {name for name, _ in frames_of(caught.value)} == {__file__, "<string>"}


def test_what_the_closing_forward_raises_is_noted_on_the_bodys_error(model):
    def forward(x):
        try:
            return model._module(x)
        finally:
            raise OSError("disk full")

    with pytest.raises(KeyError) as caught, model.trace(X4, fn=forward):
        _ = model.h[1].output
        raise KeyError("mine")
    assert caught.value.__notes__ == ["While the forward pass was closed it raised OSError: disk full"]


def test_a_forward_that_fails_after_the_last_read_fails_at_the_end_of_the_block(model):
    with pytest.raises(RuntimeError) as caught, model.trace(X4):
        model.h[1].output = torch.zeros(1, 5)
    assert (__file__, "with pytest.raises(RuntimeError) as caught, model.trace(X4):") in frames_of(caught.value)
    assert is_as_before(model)


def test_a_failing_forward_surfaces_at_the_line_that_advanced_it_and_names_the_edit(model):
    with pytest.raises(RuntimeError) as caught, model.trace(X4):
        model.h[0].output = torch.zeros(1, 4)
        model.h[1].output = torch.zeros(1, 5, dtype=torch.float64)
        line = traceback.extract_stack(limit=1)[0].lineno - 1
        _ = model.head.output
    frames = frames_of(caught.value)
    assert [text for file, text in frames if file == __file__] == ["_ = model.head.output"]
    assert frames[-1][0] != __file__
    below = [file for file, _ in frames][next(n for n, (file, _) in enumerate(frames) if "torch" in file) :]
    assert not any("nnsight_eager" in file for file in below), "ours stand between the reader and the model"
    assert caught.value.__notes__ == [
        "The model was running `model.h[2].lin`.",
        f"Edited before: `model.h[0].output` in step 0: [1, 4] float32 became [1, 4] float32 ({__file__}, line {line - 1})",
        f"Edited before: `model.h[1].output` in step 0: [1, 4] float32 became [1, 5] float64 ({__file__}, line {line})",
    ]
    assert is_as_before(model)


@pytest.mark.parametrize("kind", [ValueError, AttributeError, KeyError, StopIteration, GeneratorExit, KeyboardInterrupt])
@pytest.mark.parametrize("point", ["output", "input", "hidden"])
def test_whatever_the_forward_raises_reaches_the_reader_as_it_is(model, kind, point):
    """An `AttributeError` would send Python from the property on to `__getattr__`."""
    mistake = kind("in the forward")

    def fail(*_):
        raise mistake

    handle = model._module.h[1].register_forward_pre_hook(fail)
    with pytest.raises(kind) as caught, model.trace(X4):
        getattr(model.h[2], point)
    handle.remove()
    assert caught.value is mistake
    assert is_as_before(model)


READS = {
    "next": lambda model: model.h[2].next().output,
    "next input": lambda model: model.h[2].next().input,
    "skip": lambda model: model.h[2].skip(X4),
    "next skip": lambda model: model.h[2].next().skip(X4),
    "local": lambda model: model.h[2].local.output,
    "local skip": lambda model: model.h[2].local.skip(X4),
    "written": lambda model: setattr(model.h[2], "output", X4),
    "visits": lambda model: [*model.h[2].visits()],
}


@pytest.mark.parametrize("name", ["output", "input", "inputs", "hidden", "pattern", "skip"])
@pytest.mark.parametrize("local", [False, True])
def test_an_error_of_a_point_shows_the_users_lines_alone_where_it_is_caught_in_the_block(model, name, local):
    with model.trace(X4):
        model.h[1].output
        points = model.h[0].local if local else model.h[0]
        for ask in (
            (points.skip,) if name == "skip" else (lambda _: getattr(points, name), lambda new: setattr(points, name, new))
        ):
            with pytest.raises(NnsightEagerError) as caught:
                ask(((X4,), {}))
            assert {file for file, _ in frames_of(caught.value)} == {__file__}


class Mistake(AttributeError):
    """One that a weak reference can follow."""


@pytest.mark.parametrize("how", READS)
def test_an_attribute_error_of_the_forward_reaches_the_reader_and_is_not_kept(model, how):
    def fail(*_):
        raise Mistake("in the forward")

    handle = model._module.h[1].register_forward_pre_hook(fail)
    with pytest.raises(Mistake) as caught, model.trace(X4):
        READS[how](model)
    handle.remove()
    assert str(caught.value) == "in the forward"
    assert caught.value.__notes__
    gone = weakref.ref(caught.value)
    caught = None
    gc.collect()
    assert gone() is None
    with model.trace(X4):
        assert torch.equal(model.h[2].output, model.head.input)


def test_after_a_failed_forward_the_run_says_what_ended_it(model):
    with model.trace(X4) as tracer, contextlib.ExitStack() as ended:
        model.h[1].output = torch.zeros(1, 5)
        with pytest.raises(RuntimeError):
            _ = model.head.output
        with pytest.raises(RunEndedError) as caught:
            _ = model.head.output
        assert str(caught.value) == (
            "This run has ended: its forward pass raised `RuntimeError`.\nOpen a new trace to run the model again."
        )
        ended.callback(tracer.stop)
    assert is_as_before(model)


def test_a_run_that_is_over_keeps_nothing_alive(model):
    with model.trace(X4.clone()) as tracer:
        hidden = model.h[1].output
    result, gone = tracer.result, weakref.ref(hidden)
    del hidden, tracer, result
    gc.collect()
    assert gone() is None


def test_a_session_is_plain_python_around_traces(model):
    with model.session() as session:
        with model.trace(X4):
            hidden = model.h[1].output
        with session.trace(X4 * 2):
            model.h[1].output = hidden
            last = model.head.output
    assert torch.equal(last, model._module(X4))


@pytest.mark.parametrize("further", [False, True])
def test_a_point_that_the_forward_itself_asks_for_is_refused_there_and_reached_by_who_waits_for_it(model, further):
    def ask(*_):
        for read in (lambda: model.h[2].output, lambda: model.h[2].next().output, lambda: tracer.result):
            with pytest.raises(InsideForwardError):
                read()
        refused.append(True)

    refused = []
    handle = model._module.h[1].register_forward_hook(ask)
    with model.trace(X4) as tracer:
        seen = model.h[2].next().output if further else model.h[2].output
        with pytest.raises(OutOfOrderError):
            model.h[0].output
    handle.remove()
    assert refused == [True]
    ((want,),) = hooked(model._module, lambda: model._module(X4), "h.2")
    assert torch.equal(seen, want)
