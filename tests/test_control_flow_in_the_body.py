"""The body of a trace may be left, resumed and awaited in every way Python has."""

import asyncio
import contextlib
import itertools
import threading

import pytest
import torch
from small_models import X4, Stack, X, hooked, mlp

from nnsight_eager import NNsight


@pytest.fixture
def model():
    return NNsight(mlp())


@pytest.fixture
def stack():
    return NNsight(Stack())


def is_as_before(model):
    """Whether no module carries anything of ours."""
    return all("forward" not in m.__dict__ and not m._forward_hooks for m in model._module.modules())


def test_return_leaves_the_block_and_lets_the_forward_finish(model):
    events = []
    handle = model._module[2].register_forward_hook(lambda *a: events.append("forward finished"))

    def hidden():
        with model.trace(X):
            return model[0].output

    assert torch.equal(hidden(), model._module[0](X))
    handle.remove()
    assert events == ["forward finished"]
    assert is_as_before(model)


def test_break_and_continue_leave_the_block(model):
    seen = []
    for scale in range(5):
        with model.trace(scale * X):
            if scale == 1:
                continue
            if scale == 3:
                break
            seen.append(model[0].output)
    assert len(seen) == 2
    assert torch.equal(seen[1], model[0](2 * X))
    assert is_as_before(model)


def test_the_body_may_begin_with_try(model):
    with model.trace(X):
        try:
            hidden = model[0].output
        finally:
            relu = model[1].output
    assert torch.equal(relu, torch.relu(hidden))


def test_the_body_may_stand_on_the_line_of_the_with_statement(model):
    names = {"model": model, "x": X}
    exec("with model.trace(x): hidden = model[0].output; model[0].output = hidden * 0", names)
    assert torch.equal(names["hidden"], model[0](X))


def test_the_body_may_be_empty(model):
    with model.trace(X) as tracer:
        pass
    assert torch.equal(tracer.result, model(X))


def test_an_error_caught_in_the_body_leaves_the_run_where_it_was(model):
    with model.trace(X):
        hidden = model[0].output
        with contextlib.suppress(ZeroDivisionError):
            _ = 1 / 0
        relu = model[1].output
    assert torch.equal(relu, torch.relu(hidden))


def test_keyboard_interrupt_in_the_body_closes_the_forward(model):
    def interrupted():
        with model.trace(X):
            _ = model[0].output
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert is_as_before(model)


# Generators


def outputs(model, x):
    """Holds a trace open between its values."""
    with model.trace(x):
        for index in range(3):
            yield model[index].output


def plain_outputs(model, x):
    return [each for [each] in hooked(model._module, lambda: model(x), "0", "1", "2")]


@pytest.mark.parametrize("order", sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1]))))
def test_two_generators_that_hold_a_trace_open_may_be_resumed_in_any_order(model, order):
    inputs = X, 2 * X
    generators = [outputs(model, x) for x in inputs]
    got = [[], []]
    for which in order:
        got[which].append(next(generators[which]))
    for generator, read, x in zip(generators, got, inputs, strict=True):
        assert list(generator) == []
        assert all(map(torch.equal, read, plain_outputs(model, x)))
    assert is_as_before(model)


def test_a_trace_in_place_is_nearer_than_a_generator_that_holds_one_open(model):
    generator = outputs(model, X)
    next(generator)
    with model.trace(2 * X):
        ours = model[0].output
        theirs = next(generator)
        next_of_ours = model[1].output
    generator.close()
    assert torch.equal(ours, model[0](2 * X))
    assert torch.equal(theirs, torch.relu(model[0](X)))
    assert torch.equal(next_of_ours, torch.relu(model[0](2 * X)))
    assert is_as_before(model)


def test_a_generator_that_is_closed_half_way_closes_its_forward(model):
    generator = outputs(model, X)
    next(generator)
    generator.close()
    assert is_as_before(model)


def test_a_generator_that_is_dropped_half_way_closes_its_forward(model):
    generator = outputs(model, X)
    next(generator)
    del generator
    assert is_as_before(model)


def test_yield_from_passes_values_out_of_two_nested_traces(model):
    def nested():
        with model.trace(X):
            yield model[0].output
            yield from outputs(model, 2 * X)
            yield model[1].output

    first, *inner, last = nested()
    assert torch.equal(first, model[0](X))
    assert all(map(torch.equal, inner, plain_outputs(model, 2 * X)))
    assert torch.equal(last, torch.relu(first))


# Tasks and threads


def test_tasks_interleave_where_they_await(stack):
    events = []

    async def read(name, x):
        with stack.trace(x) as tracer:
            seen = []
            for block in stack.h:
                seen.append(block.output)
                events.append(name)
                await asyncio.sleep(0)
        return seen, tracer.result

    async def read_all():
        return await asyncio.gather(*(read(n, n * X4) for n in range(1, 4)))

    answers = asyncio.run(read_all())
    assert events == [1, 2, 3] * 3
    for n, (seen, result) in enumerate(answers, start=1):
        plain = hooked(stack._module, lambda n=n: stack(n * X4), "h.0", "h.1", "h.2")
        assert all(torch.equal(a, b) for a, [b] in zip(seen, plain, strict=True))
        assert torch.equal(result, stack(n * X4))
    assert is_as_before(stack)


def test_a_task_that_is_cancelled_closes_its_forward(model):
    async def forever():
        with model.trace(X):
            _ = model[0].output
            await asyncio.sleep(3600)

    async def main():
        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert is_as_before(model)


def test_an_async_context_manager_may_hold_the_trace(model):
    @contextlib.asynccontextmanager
    async def traced(x):
        with model.trace(x) as tracer:
            yield tracer

    async def main():
        async with traced(X):
            await asyncio.sleep(0)
            return model[0].output

    assert torch.equal(asyncio.run(main()), model[0](X))


def test_threads_trace_one_model_at_a_time_of_their_own(stack):
    wrong = []

    def read(n):
        for _ in range(10):
            with stack.trace(n * X4) as tracer:
                hidden = stack.h[1].output
                stack.h[1].output = hidden * n
            expected = stack.h[1](stack.h[0](n * X4))
            edited = stack.head(stack.h[2](expected * n))
            if not (torch.equal(hidden, expected) and torch.equal(tracer.result, edited)):
                wrong.append(n)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert is_as_before(stack)


def test_an_untraced_call_on_another_thread_sees_no_edit(model):
    answers = []
    with model.trace(X):
        model[0].output = torch.zeros(1, 3)
        thread = threading.Thread(target=lambda: answers.append(model._module(X)))
        thread.start()
        thread.join()
    assert torch.equal(answers[0], model(X))
