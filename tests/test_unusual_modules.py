"""Modules that call themselves, are compiled, scripted, checkpointed or skipped."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nnsight_eager import EditError, NNsight, NotReachedError


@pytest.fixture
def x():
    return torch.randn(2, 4)


class Recursive(torch.nn.Module):
    """Calls itself twice."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x, times=2):
        y = self.inner(x)
        return y + self(y, times - 1) if times else y


class Checkpointed(torch.nn.Module):
    """Two layers that are computed again for their gradient."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(lambda y: self.second(self.first(y).tanh()), x, use_reentrant=self.use_reentrant).sum()


def test_the_first_visit_of_a_module_that_calls_itself_is_the_outermost(x):
    model = NNsight(torch.nn.Sequential(Recursive()))
    want = model._module(x)
    for _ in range(2):
        with model.trace(x):
            read = model[0].output
        assert torch.equal(read, want)
        with model.trace(x) as tracer:
            model[0].output = x * 0
        assert torch.equal(tracer.result, x * 0)


def test_the_next_visit_of_a_module_that_calls_itself_is_the_one_that_ends_next(x):
    model = NNsight(torch.nn.Sequential(Recursive()))
    block = model._module[0]
    with model.trace(x):
        _ = model[0].inner.output
        innermost = model[0].next().output
    assert torch.equal(innermost, block.inner(block.inner(block.inner(x))))


def test_a_root_that_calls_itself_is_one_step(x):
    model = NNsight(Recursive())
    for _ in range(2):
        with model.trace(x) as tracer:
            assert torch.equal(model.output, model._module(x))
            assert [*tracer.iter[:]] == [0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_change_in_place_inside_checkpointing_is_refused_and_a_read_is_not(x, use_reentrant):
    model = NNsight(Checkpointed(use_reentrant))
    x.requires_grad_()
    with pytest.raises(EditError, match="is inside gradient checkpointing"), model.trace(x):
        model.first.output[:, 0] = 0
        _ = model.output
    with model.trace(x):
        norm = model.first.output.norm()
        loss = model.output
    assert torch.equal(norm, model._module.first(x).norm())
    loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_edit_in_checkpointing_is_refused_after_a_pass_without_gradients(x, use_reentrant):
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()))
    first, second = model._module

    def call(x):
        with torch.no_grad():
            model._module(x)
        return checkpoint(lambda y: second(second(first(y))), x, use_reentrant=use_reentrant)

    with pytest.raises(EditError, match="is inside gradient checkpointing"), model.trace(x.requires_grad_(), fn=call):
        _ = model[1].output
        again = model[0].next()
        again.output = again.output * 2


def test_an_edit_in_checkpointing_is_refused_where_a_model_without_gradients_sets_them_on(x):
    class WithGradients(Checkpointed):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    model = NNsight(WithGradients(False))
    call = torch.no_grad()(lambda x: model._module(x))
    with pytest.raises(EditError, match="is inside gradient checkpointing"), model.trace(x.requires_grad_(), fn=call):
        model.first.output = model.first.output * 2


@pytest.mark.filterwarnings("ignore:.*is compiled. In a trace it runs eagerly:UserWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_model_with_a_compiled_child_is_read_and_edited(x, how):
    child = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    first = torch.nn.Linear(4, 4)
    plain = torch.nn.Sequential(first, child)
    want, edited = plain(x).detach(), child(x * 0).detach()
    if how == "in place":
        child.compile(backend="eager")
        model = NNsight(plain)
    else:
        model = NNsight(torch.nn.Sequential(first, torch.compile(child, backend="eager")))
    with torch.no_grad():
        for _ in range(2):
            with model.trace(x) as tracer:
                read = model[0].output
            assert torch.equal(read, first(x))
            assert torch.allclose(tracer.result, want)
            with model.trace(x) as tracer:
                model[0].output = x * 0
            assert torch.allclose(tracer.result, edited)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_child_can_be_looked_at(x):
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), scripted))
    assert model[1].training
    assert len(model[1]) == 2
    assert "output" in dir(model[1])
    assert "0" in model[1]
    with model.trace(x):
        read = model[1].output
    assert torch.equal(read, model._module(x))


def test_asking_inside_a_skipped_module_is_refused_at_once_and_the_run_goes_on(x):
    model = NNsight(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4)))
    model.trace(x).result  # from here on it is known that nothing runs twice
    with model.trace(x):
        model[0].skip(x * 0)
        with pytest.raises(NotReachedError, match="which was skipped"):
            model[0][0].output
        after = model[0].output
    assert torch.equal(after, x * 0)


def test_a_point_that_runs_in_other_steps_says_so(x):
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    for _ in range(2):
        with model.trace(fn=lambda: [model._module(x) for _ in range(3)]) as tracer:
            for _ in tracer.iter[:]:
                pass
            with pytest.raises(NotReachedError) as caught:
                model[0].output
        happened = "`model[0].output` does not come any more: the model has finished after 3 steps."
        assert str(caught.value).splitlines()[0] == happened


class Static(torch.nn.Module):
    @staticmethod
    def forward(x):
        return x * 2


class Doubling:
    def __call__(self, x):
        return x * 2


class CallsAnObject(torch.nn.Module):
    forward = Doubling()  # no function, so it is not bound


@pytest.mark.parametrize("kind", [Static, CallsAnObject])
def test_two_runs_read_a_module_whose_class_has_no_plain_forward(kind):
    model, x = NNsight(torch.nn.Sequential(kind(), torch.nn.Tanh())), torch.ones(1, 3)
    for _ in range(2):
        with model.trace(x) as outer:
            outer.model[0].input
            with model.trace(x * 2) as inner:
                assert torch.equal(inner.model[0].output, x * 4)
            assert torch.equal(outer.model[0].output, x * 2)
