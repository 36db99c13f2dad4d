"""Traces that take turns: in tasks, in generators, in thread pools, and in what a generation calls back."""

import asyncio
import contextvars
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import Stack

from nnsight_eager import InsideForwardError, NNsight, RunError

PROMPT = "The Eiffel Tower is in the city of"
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def model():
    return NNsight(Stack())


def given(number):
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(number))


def by_hand(module, x, factor):
    """What the second block gives, and the result where that is multiplied."""
    hidden = module.h[1](module.h[0](x))
    return hidden, module.head(module.h[2](hidden * factor))


def right(module, number, seen, result):
    hidden, want = by_hand(module, given(number), number)
    return torch.equal(seen, hidden) and torch.equal(result, want)


# Tasks


async def turns(numbers):
    for _ in range(numbers.randrange(3)):
        await asyncio.sleep(0)


def test_tasks_that_take_turns_at_any_await(model):
    async def task(number):
        numbers = random.Random(number)
        with model.trace(given(number)) as tracer:
            await turns(numbers)
            seen = model.h[1].output
            await turns(numbers)
            model.h[1].output = seen * number
            await turns(numbers)
        return right(model._module, number, seen, tracer.result)

    async def tasks():
        return await asyncio.gather(*map(task, range(30)))

    assert all(asyncio.run(tasks()))


def test_a_task_that_is_cancelled_in_its_trace_closes_it_and_the_others_go_on(model):
    module = model._module

    async def waits_for_ever(reached):
        with model.trace(given(1)):
            _ = model.h[0].output
            reached.set()
            await asyncio.Event().wait()

    async def tasks():
        reached = asyncio.Event()
        task = asyncio.create_task(waits_for_ever(reached))
        await reached.wait()
        with model.trace(given(2)) as tracer:
            seen = model.h[1].output
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            model.h[1].output = seen * 2
        return right(module, 2, seen, tracer.result)

    assert asyncio.run(tasks())
    assert not [name for name, each in module.named_modules() if "forward" in each.__dict__]


def test_invokes_backward_passes_and_generations_in_tasks(model):
    module = model._module

    async def invokes(number):
        with model.trace() as tracer:
            tracer.invoke(given(number), lambda: model.h[1].output)
            await asyncio.sleep(0)
            second = tracer.invoke(given(number + 1), lambda: model.h[1].output)
            await asyncio.sleep(0)
        return torch.allclose(second.result, by_hand(module, given(number + 1), 1)[0], atol=1e-6)

    async def gradients(number):
        with model.trace(given(number)) as tracer:
            hidden = model.h[1].output
            await asyncio.sleep(0)
            with tracer.backward(model.head.output.sum()):
                await asyncio.sleep(0)
                gradient = model.h[1].output_grad
        leaf = hidden.detach().requires_grad_()
        return torch.allclose(gradient, torch.autograd.grad(module.head(module.h[2](leaf)).sum(), leaf)[0], atol=1e-6)

    async def steps(number):
        seen = []
        with model.trace(given(number), fn="generate") as tracer:
            for _ in tracer.iter[:]:
                seen.append(model.head.output)
                await asyncio.sleep(0)
        x, want = given(number), []
        for _ in range(3):
            want.append(x := module(x))
        return all(map(torch.equal, seen, want)) and len(seen) == 3

    async def tasks():
        return await asyncio.gather(*(kind(number) for number in range(8) for kind in (invokes, gradients, steps)))

    assert asyncio.run(tasks()) == [True] * 24


def test_backward_passes_that_take_turns_in_the_middle_are_refused_and_the_later_one_goes_on(model):
    module = model._module

    async def gradients(number, events):
        with model.trace(given(number)) as tracer:
            early, late = model.h[0].output, model.h[1].output
            with tracer.backward(model.head.output.sum()):
                seen = [model.h[1].output_grad]
                events[number].set()
                await events[1].wait()
                if number:
                    await asyncio.sleep(0)
                seen.append(model.h[0].output_grad)
        plain = module.h[0](given(number))
        want = [plain, module.h[1](plain)]
        gradients = torch.autograd.grad(module.head(module.h[2](want[1])).sum(), want)
        assert torch.equal(early, want[0])
        assert torch.equal(late, want[1])
        return all(map(torch.equal, seen, reversed(gradients)))

    async def tasks():
        events = [asyncio.Event(), asyncio.Event()]
        return await asyncio.gather(*(gradients(number, events) for number in range(2)), return_exceptions=True)

    first, second = asyncio.run(tasks())
    assert type(first) is RunError
    assert str(first).startswith("Another backward pass has begun on this thread and is in the middle")
    assert second is True


def test_async_generators_and_threads_of_the_event_loop(model):
    module = model._module

    async def reads(number):
        with model.trace(given(number)) as tracer:
            seen = model.h[1].output
            yield None
            model.h[1].output = seen * number
            yield None
        yield right(module, number, seen, tracer.result)

    def in_a_thread(number):
        with model.trace(given(number)) as tracer:
            seen = model.h[1].output
            model.h[1].output = seen * number
        return right(module, number, seen, tracer.result)

    async def main():
        generators, ended = [reads(number) for number in range(6)], []
        while generators:
            for each in [*generators]:
                got = await anext(each)
                if got is not None:
                    ended.append(got)
                    generators.remove(each)
                    await each.aclose()
            ended.append(await asyncio.to_thread(in_a_thread, len(ended)))
        return ended

    ended = asyncio.run(main())
    assert all(ended)
    assert len(ended) == 6 + 3


# Generators


@pytest.mark.parametrize("seed", range(5))
def test_generators_resumed_in_any_order_each_in_its_own_trace(model, seed):
    module, numbers = model._module, random.Random(seed)

    def reads(number):
        with model.trace(given(number)) as tracer:
            _ = model.h[0].output
            yield
            seen = model.h[1].output
            yield
            model.h[1].output = seen * number
            yield
            assert torch.equal(model.h[2].input, seen * number)
        assert right(module, number, seen, tracer.result)
        ended.append(number)

    ended, open_ones = [], [reads(number) for number in range(8)]
    while open_ones:
        chosen = numbers.choice(open_ones)
        with model.trace(given(99)) if numbers.random() < 0.3 else contextvars.copy_context().run(lambda: NOTHING):
            if next(chosen, ended) is ended:
                open_ones.remove(chosen)
    assert sorted(ended) == [*range(8)]


class Nothing:
    """A block that is no trace."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


NOTHING = Nothing()


def test_a_generator_begun_on_one_thread_pool_thread_is_closed_there_or_refused_elsewhere(model):
    with ThreadPoolExecutor(4) as pool:

        def work(number):
            with model.trace(given(number)) as outer:
                inner = pool_of_inner.submit(one, number + 1).result()
                seen = model.h[1].output
                model.h[1].output = seen * number
            return inner and right(model._module, number, seen, outer.result)

        def one(number):
            with model.trace(given(number)) as tracer:
                seen = model.h[1].output
                model.h[1].output = seen * number
            return right(model._module, number, seen, tracer.result)

        with ThreadPoolExecutor(4) as pool_of_inner:
            assert all(pool.map(work, range(40)))


# What a generation calls back


def greedy(module, ids, changed, steps=4):
    """A greedy generation by hand, whose logits are changed by a function of the ids so far."""
    for _ in range(steps):
        logits = changed(ids, module(ids).logits[:, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": False}


@pytest.mark.parametrize("outer", ["a block", "an edit", "no trace"])
def test_a_logits_processor_that_traces_the_same_model(gpt2, outer):
    from transformers import LogitsProcessorList

    gpt2.dispatch()
    module = gpt2._module
    ids = gpt2.tokenizer(PROMPT, return_tensors="pt").input_ids

    def contrast(ids, logits):
        """The logits less those of the model without its second MLP."""
        with gpt2.trace(ids, attention_mask=torch.ones_like(ids)) as tracer:
            tracer.model.transformer.h[1].mlp.output *= 0
            without = tracer.model.lm_head.output
        return logits - 0.5 * without[:, -1]

    def contrast_by_hand(ids, logits):
        handle = module.transformer.h[1].mlp.register_forward_hook(lambda m, a, output: output * 0)
        without = module(ids).logits
        handle.remove()
        return logits - 0.5 * without[:, -1]

    with torch.no_grad():
        want = greedy(module, ids, contrast_by_hand)
    options = {**OPTIONS, "logits_processor": LogitsProcessorList([contrast])}
    seen = []
    if outer == "a block":
        with gpt2.generate(ids, **options) as tracer:
            for _ in tracer.iter[:]:
                seen.append(gpt2.lm_head.output[:, -1].argmax())
        assert len(seen) == 4
    elif outer == "an edit":
        with gpt2.edit(lambda: seen.append(gpt2.transformer.h[0].output), inplace=True):
            tracer = gpt2.generate(ids, **options)
            tracer.result
        assert len(seen) == 8, "the edit is in every step, and in each of the traces"
    else:
        tracer = gpt2.generate(ids, **options)
    assert torch.equal(tracer.result, want)


def test_stopping_criteria_and_streamers_that_trace(gpt2):
    from transformers import StoppingCriteriaList

    gpt2.dispatch()
    module = gpt2._module
    ids = gpt2.tokenizer(PROMPT, return_tensors="pt").input_ids
    norms, streamed = [], []

    def stops(ids, scores, **_):
        with gpt2.trace(ids, attention_mask=torch.ones_like(ids)) as tracer:
            norms.append(float(tracer.model.transformer.h[1].hidden.norm()))
            tracer.stop()
        return torch.tensor([len(norms) == 3])

    class Streamer:
        def put(self, value):
            with gpt2.trace(ids) as tracer:
                streamed.append((value.tolist(), tracer.model.lm_head.output[0, -1].argmax().item()))

        def end(self):
            streamed.append("end")

    with gpt2.generate(ids, **OPTIONS, stopping_criteria=StoppingCriteriaList([stops]), streamer=Streamer()) as tracer:
        logits = [gpt2.lm_head.output[:, -1] for _ in tracer.iter[:]]
    with torch.no_grad():
        want = greedy(module, ids, lambda ids, logits: logits, 3)
        hidden = [module(want[:, : ids.shape[1] + number], output_hidden_states=True).hidden_states[2] for number in (1, 2, 3)]
        first = module(ids).logits[0, -1].argmax().item()
    assert torch.equal(tracer.result, want)
    assert len(logits) == 3
    assert norms == pytest.approx([float(each.norm()) for each in hidden], rel=1e-5)
    assert streamed[-1] == "end"
    assert [each[1] for each in streamed[:-1]] == [first] * (len(streamed) - 1)


def test_a_callback_that_asks_for_a_point_of_the_generation_it_is_called_by_is_told_so(gpt2):
    from transformers import LogitsProcessorList

    def asks(ids, logits):
        with pytest.raises(InsideForwardError, match="asked for by code that the model's own forward pass called"):
            gpt2.transformer.h[0].output
        asked.append(True)
        return logits

    asked = []
    with gpt2.generate(PROMPT, **OPTIONS, logits_processor=LogitsProcessorList([asks])):
        _ = gpt2.lm_head.output
    assert asked == [True] * 4
