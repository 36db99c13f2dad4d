"""Going back more than once, and forks that keep nothing: what was changed before a place stays changed, and is told of."""

import pytest
import torch

from nnsight_eager import NNsight, RunError

X = torch.ones(1, 4)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NNsight(torch.nn.Sequential(*[Block() for _ in range(4)]))


def with_hook(model, register, value):
    """What the model gives with one value replaced by a plain hook."""
    handle = register(lambda *given: value)
    result = model._module(X)
    handle.remove()
    return result


def changed_at(model, point):
    """A held run past its last block, with one value changed in the second; and what has to come of it."""
    block, value, run = model[1], torch.full((1, 4), 3.0), model.trace(X).start()
    if point == "input":
        run.to(block, "input")
        block.input = value
        expected = with_hook(model, block._module.register_forward_pre_hook, value)
    elif point == "output":
        run.to(block)
        block.output = value
        expected = with_hook(model, block._module.register_forward_hook, value)
    else:
        run.to(block.first)
        block.first.output = value
        expected = with_hook(model, block.first._module.register_forward_hook, value)
    return run.to(model[3]), expected


@pytest.mark.parametrize("point", ["input", "output", "inside"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_change_in_a_block_that_is_passed_over_is_told_of_and_made_again_further_back(model, point, grad):
    with torch.set_grad_enabled(grad):
        run, expected = changed_at(model, point)
        told = [each.point for each in run.edits]
        assert len(told) == 1
        run.back_to(model[2])  # the second block is not computed again
        assert [each.point for each in run.edits] == told
        run.back_to(model[1].second)  # now it is, with what was changed before that
        if point != "output":
            assert [each.point for each in run.edits] == told
            assert torch.equal(run.finish(), expected)
        else:
            assert not run.edits
            assert torch.equal(run.finish(), model._module(X))


@pytest.mark.parametrize("keep", [True, False])
def test_a_fork_has_what_was_changed_below_it(model, keep):
    run, expected = changed_at(model, "inside")
    run.back_to(model[2])
    other = run.fork(keep=keep)
    assert [each.point for each in other.edits] == [each.point for each in run.edits]
    assert torch.equal(other.finish(), expected)
    assert torch.equal(run.finish(), expected)


@pytest.mark.parametrize("keep", [True, False])
def test_a_fork_of_a_trace_goes_on_from_its_place_and_can_be_gone_back_in(model, keep):
    runs = []
    model._module[0].register_forward_hook(lambda *given: runs.append("first"))  # a module with hooks is always computed
    with model.trace(X, keep=True) as tracer:
        hidden = model[2].output.clone()
        other = tracer.fork(keep=keep)
        other.model[2].output = hidden * 2
        other.to("3")
        other.back_to("2")
        other.model[2].output = hidden * 3
        result = other.finish()
    assert torch.equal(result, model._module[3](hidden * 3))
    assert torch.equal(tracer.result, model._module[3](hidden))


def test_a_fork_that_keeps_nothing_holds_nothing_of_what_it_computes(model):
    with model.trace(X, keep=True) as tracer:
        _ = model[0].output
        kept, nothing = tracer.fork(), tracer.fork(keep=False)
        kept.to("2")
        nothing.to("2")
        assert kept._recording.journal.all_kept()
        assert not nothing._recording.journal.all_kept()
        kept.close()
        nothing.close()


def test_a_trace_that_was_not_told_to_keep_says_what_to_write_for_a_fork(model):
    with model.trace(X) as tracer, pytest.raises(RunError) as caught:
        model[0].output
        tracer.fork()
    assert str(caught.value) == (
        "This trace keeps nothing that it could be forked by.\n"
        "Write `model.trace(..., keep=True)`, or hold the run by hand: `model.trace(...).start()` forks as it is."
    )
    assert {str(entry.path) for entry in caught.traceback} == {__file__}
