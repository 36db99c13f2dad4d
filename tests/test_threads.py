"""Several threads trace one model: each sees its own run and no other."""

import contextlib
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nnsight_eager import NNsight
from nnsight_eager.errors import OutsideTraceError, WrongThreadError

pytestmark = pytest.mark.usefixtures("one_torch_thread")
THREADS, TRACES = 8, 100


class Net(torch.nn.Module):
    """Two residual blocks and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(2))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture
def model():
    return NNsight(Net())


def by_hand(net, x, factor):
    """What a trace that multiplies the first block by `factor` should see: the block, and the result."""
    hidden = net.blocks[0](x)
    changed = x + hidden * factor
    return hidden, net.head(changed + net.blocks[1](changed))


def on_threads(work, count=THREADS):
    """`work(number)` on that many threads at once; the first error of any is raised here."""
    together = threading.Barrier(count)

    def begin(number):
        together.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(begin, number) for number in range(count)]]


def test_eight_threads_trace_one_model_and_every_value_is_right(model):
    net = model._module
    before = [[*each.__dict__] for each in net.modules()]

    def work(number):
        generator = torch.Generator().manual_seed(number)
        right = 0
        for turn in range(TRACES):
            x, factor = torch.randn(3, 4, generator=generator), number + turn / 100
            with model.trace(x) as tracer:
                seen = model.blocks[0].output
                model.blocks[0].output = seen * factor
                logits = model.head.output
            hidden, expected = by_hand(net, x, factor)
            right += torch.equal(seen, hidden) and torch.equal(logits, expected) and torch.equal(tracer.result, expected)
        return right

    assert on_threads(work) == [TRACES] * THREADS
    assert [[*each.__dict__] for each in net.modules()] == before


def test_untraced_calls_on_other_threads_see_no_edit(model):
    net, x = model._module, torch.randn(3, 4)
    plain = net(x)

    def work(number):
        if number % 2:
            return all(torch.equal(net(x), plain) for _ in range(TRACES))
        for _ in range(TRACES):
            with model.trace(x) as tracer:
                model.blocks[0].output = model.blocks[0].output * 0
                model.head.output = model.head.output * 0
            assert not tracer.result.any()
        return True

    assert all(on_threads(work))
    assert torch.equal(net(x), plain)


def test_a_run_that_fails_on_one_thread_does_not_disturb_the_others(model):
    net = model._module

    def work(number):
        x = torch.randn(3, 4)
        for _ in range(TRACES // 2):
            if number % 2:
                with pytest.raises(RuntimeError, match="size of tensor a"), model.trace(x):
                    model.blocks[0].output = torch.ones(3, 9)
            else:
                with model.trace(x):
                    hidden = model.blocks[1].input
                assert torch.equal(hidden, x + net.blocks[0](x))

    on_threads(work)


def read_elsewhere(read):
    """What `read` raises on another thread that shares this one's context variables."""
    errors = []

    def work():
        try:
            read()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    thread.start()
    thread.join()
    return errors.pop()


def test_a_run_read_from_another_thread_is_refused_with_a_sentence_and_goes_on(model):
    x = torch.randn(3, 4)
    hidden, expected = by_hand(model._module, x, 1)
    with model.trace(x) as tracer:
        assert torch.equal(model.blocks[0].output, hidden)
        error = read_elsewhere(lambda: model.blocks[1].output)
        assert torch.equal(model.blocks[1].input, x + hidden)
        by_its_tree = read_elsewhere(lambda: tracer.model.head.output)
        logits = model.head.output
    assert type(error) is type(by_its_tree) is WrongThreadError
    assert str(error) == (
        "This run is paused on another thread, and a paused forward pass can only go on on its own thread.\n"
        "Read it on the thread that opened the trace, or open a trace of its own on this one."
    )
    assert torch.equal(logits, expected)


def test_a_run_that_has_not_begun_is_not_begun_by_another_thread(model):
    x = torch.randn(3, 4)
    hidden, expected = by_hand(model._module, x, 1)
    with model.trace(x) as tracer:
        assert type(read_elsewhere(lambda: model.blocks[0].output)) is WrongThreadError
        assert torch.equal(model.blocks[0].output, hidden)
    assert torch.equal(tracer.result, expected)


def test_a_thread_without_the_context_has_no_run_to_read(model):
    errors = []

    def read():
        try:
            _ = model.blocks[0].output
        except OutsideTraceError as error:
            errors.append(error)

    with model.trace(torch.randn(3, 4)):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_a_trace_nested_in_a_trace_on_many_threads(model):
    net = model._module

    def work(number):
        for _ in range(TRACES // 4):
            x, y = torch.randn(3, 4), torch.randn(3, 4)
            with model.trace(x) as outer:
                with model.trace(y):
                    patch = model.blocks[0].output
                model.blocks[0].output = patch
            changed = x + net.blocks[0](y)
            assert torch.equal(outer.result, net.head(changed + net.blocks[1](changed)))

    on_threads(work, 4)


def test_many_open_runs_of_one_model_do_not_stand_in_each_others_way(model):
    net, x = model._module, torch.randn(3, 4)
    with contextlib.ExitStack() as traces:
        opened = [traces.enter_context(model.trace(x + number)) for number in range(400)]
        seen = [tracer.model.head.input for tracer in opened]
        for number in (0, 200, 399):
            assert torch.allclose(seen[number], by_hand_input(net, x + number))
        assert torch.equal(net(x), by_hand(net, x, 1)[1])


def by_hand_input(net, x):
    """What the head is given."""
    for block in net.blocks:
        x = x + block(x)
    return x
