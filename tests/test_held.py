"""Runs that are held by hand: what is promised of them beside what the transcripts show."""

import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from small_models import BEGIN, X4, Stack, run_python

from nnsight_eager import (
    NNsight,
    NotReachedError,
    OutOfOrderError,
    PathError,
    RunEndedError,
    RunError,
    WrongThreadError,
    has_nan,
)
from nnsight_eager.interactive import predicates


class Dropping(torch.nn.Module):
    """Draws random numbers inside and between its modules."""

    def __init__(self):
        super().__init__()
        self.drops = torch.nn.ModuleList(torch.nn.Dropout(0.5) for _ in range(4))

    def forward(self, x):
        for drop in self.drops:
            x = torch.nn.functional.dropout(drop(x), 0.2, self.training) + torch.randn(x.shape)
        return x


@pytest.fixture
def model():
    return NNsight(Stack())


@pytest.mark.parametrize("keep", [True, False])
def test_going_back_with_dropout_on_is_the_same_to_the_bit(keep):
    model, x = NNsight(Dropping().train()), torch.ones(2, 50)
    run = model.trace(x).start(keep=keep)
    seen = [each.output.clone() for each in model.drops]
    result = run.finish()
    torch.randn(100)  # what is drawn meanwhile does not matter
    for number in (3, 1, 0, 2):
        run.back_to(model.drops[number])
        for later, before in list(zip(model.drops, seen, strict=True))[number:]:
            assert torch.equal(later.output, before)
        assert torch.equal(run.finish(), result)
    run.restart()
    assert torch.equal(run.finish(), result)


def test_an_edit_in_place_under_inference_mode_is_in_the_receipt_and_in_the_replay(model):
    with torch.inference_mode():
        run = model.trace(X4).start()
        model.h[0].output.mul_(0)
        run.to(model.h[2])
        assert [each.point for each in run.edits] == ["model.h[0].output"]
        run.back_to(model.h[1], "input")
        assert not model.h[1].input.any()
        other = run.fork()
        assert torch.equal(run.finish(), other.finish())


def test_what_was_changed_before_going_back_is_named_where_it_was_written(model):
    run = model.trace(X4).start()
    model.h[0].lin.output = torch.zeros(1, 4)  # the first
    run.to(model.h[0])
    run.back_to(model.h[0])
    model.h[0].output = torch.ones(1, 3)  # the second
    with pytest.raises(RuntimeError) as caught:
        run.finish()
    lines = Path(__file__).read_text().splitlines()
    written = [next(n for n, line in enumerate(lines, 1) if line.endswith(f"# the {which}")) for which in ("first", "second")]
    noted = [note for note in caught.value.__notes__ if note.startswith("Edited before")]
    assert [f"line {line})" in note for note, line in zip(noted, written, strict=True)] == [True, True]
    assert "forward" not in vars(model._module), "a run that has failed leaves nothing behind"


def test_an_edit_in_a_module_that_is_passed_over_stays_in_the_receipt_and_is_made_when_the_module_is_called_again(model):
    run = model.trace(X4).start()
    model.h[0].lin.output = torch.zeros(1, 4)
    run.to(model.h[1])
    run.back_to(model.h[1])
    assert [each.point for each in run.edits] == ["model.h[0].lin.output"]
    run.back_to(model.h[0])
    assert [each.point for each in run.edits] == ["model.h[0].lin.output"]
    model.h[0].lin._module.register_forward_hook(lambda *_: None)  # so from now on it is called
    run.back_to(model.h[0])
    assert torch.equal(model.h[0].output, X4)
    run.close()


def test_an_order_error_comes_at_once_and_leaves_the_run_where_it_is(model):
    come_by = []
    model.head._module.register_forward_pre_hook(lambda *_: come_by.append("head"))
    with model.trace(X4).start() as run:
        run.to(model.h[1])
        with pytest.raises(OutOfOrderError, match=r"Go back to it: `run\.back_to\(model\.h\[0\]\)`"):
            model.h[0].output
        with pytest.raises(NotReachedError, match="has not come by"):
            run.back_to(model.h[2])
        with pytest.raises(NotReachedError, match="holds modules"):
            run.to(model.h)
        assert repr(run).startswith("paused at model.h[1].output")
        assert come_by == []


@pytest.mark.parametrize("traced", [False, True])
def test_where_a_point_is_looked_for_in_vain_the_way_back_is_said(model, traced):
    run, before = model.trace(X4).start(), sys.gettrace()
    run.to(model.h[1], "input")
    if traced:  # as by a debugger or by coverage
        sys.settrace(lambda *_: None)
    try:
        with pytest.raises(NotReachedError, match=r'`run\.back_to\(model\.h\[1\], "input"\)` goes back to where the run was'):
            run.to(model.unused)
    finally:
        sys.settrace(before)
    run.back_to(model.h[1], "input")
    assert repr(run).startswith("paused at model.h[1].input")
    run.close()


def test_a_kind_that_is_put_together_at_run_time_is_the_same_kind(model):
    with model.trace(X4).start() as run:
        run.to("h.0", "".join(["in", "put"])).to("h.0", "".join(["out", "put"]))
        assert repr(run).startswith("paused at model.h[0].output")


def test_a_point_can_be_named_as_it_is_shown(model):
    with model.trace(X4).start() as run:
        for shown in ("model.h[0].lin.input", "model.h[0].lin.output", "h.1.input"):
            run.to(shown)
            assert repr(run).startswith(f"paused at {'model.h[1].input' if shown == 'h.1.input' else shown} (")
        run.back_to("model.h[0].lin.input")
        assert repr(run).startswith("paused at model.h[0].lin.input (")


def test_a_child_that_is_called_like_a_point_is_a_module_in_a_path():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.output(x)

    with NNsight(torch.nn.Sequential(Named())).trace(X4).start() as run:
        run.to("0.output", "input")
        assert repr(run).startswith("paused at model[0].output_.input (Linear)")
        run.to("0.output.output")
        assert repr(run).startswith("paused at model[0].output_.output (Linear)")


def test_a_value_is_no_place_to_go_to(model):
    with model.trace(X4).start() as run, pytest.raises(PathError) as caught:
        run.to(model.h[0].output)
    assert str(caught.value).startswith("What was given, [1, 4] float32, names no module of `Stack`.")


def test_a_run_that_nothing_refers_to_is_closed_and_says_so(model):
    run = model.trace(X4).start()
    run.to(model.h[0])
    with pytest.warns(UserWarning, match=r"paused at `model\.h\[0\]\.output`, has been closed: nothing refers to it") as told:
        run = None
    assert told[0].filename == __file__
    assert not [each for each in model._module.modules() if "forward" in vars(each)]


def test_a_run_that_is_replaced_is_closed_and_says_so_each_time(model):
    run = model.trace(X4).start()
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            other, run = run, model.trace(X4).start()
        assert ["another was started" in str(each.message) for each in told] == [True]
        with pytest.raises(RunEndedError):
            other.step()
    run.close()


def test_another_thread_is_refused_and_may_take_over_once_the_run_is_closed(model):
    run, told = model.trace(X4).start(), []

    def use():
        for call in (
            run.step,
            run.over,
            run.out,
            run.finish,
            run.restart,
            run.fork,
            lambda: run.to("h.1"),
            lambda: model.h[1].output,
        ):
            with pytest.raises(WrongThreadError) as caught:
                call()
            told.append("thread" in str(caught.value))

    in_a_thread(use)
    assert told == [True] * 8
    run.close()
    in_a_thread(lambda: told.append(run.restart().finish()))
    assert torch.equal(told[-1], model(X4))


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_nothing_is_said_of_a_run_that_is_open_when_python_ends():
    shown = run_python("-", stdin=BEGIN + "run = model.trace(x).start()\nother = run.fork()\nother.step(2)\nprint('the end')")
    assert shown == "the end\n"


def test_the_first_nan_is_found_at_the_module_that_made_it(model):
    model.h[1].lin._module.register_forward_hook(lambda m, args, value: value / 0 * 0)
    with model.trace(X4).start() as run:
        assert "4 of its 4 values are NaN" in repr(run.until(has_nan))
        assert repr(run).startswith("paused at model.h[1].lin.output")


def test_a_traceback_begins_at_the_users_line(model):
    run = model.trace(X4).start()
    run.to(model.h[1])
    asks = [lambda: run.to("h.0"), lambda: model.h[0].output, lambda: model.h[0].input, lambda: model.h[0].skip(X4), run.start]
    for ask in asks:
        with pytest.raises(Exception) as caught:
            ask()
        files = [entry.path for entry in caught.traceback]
        assert {str(each) for each in files} == {__file__}, "no frame of the package"
    run.close()


def test_a_run_goes_on_behind_an_operation_of_which_only_the_output_was_read(gpt2):
    """It dies otherwise: nobody has heard that the operation began."""
    run = gpt2.trace("The Eiffel Tower").start()
    gpt2.transformer.h[0].attn.pattern
    gpt2.transformer.h[1].attn.source.attention_interface_1.output
    other = run.fork()
    assert torch.equal(run.finish().logits, other.finish().logits)


def test_a_trace_that_keeps_can_be_held_by_hand(gpt2):
    run = gpt2.trace("The Eiffel Tower", keep=True).start()
    run.to("transformer.h.0.mlp")
    gpt2.transformer.h[0].mlp.output = gpt2.transformer.h[0].mlp.output * 2
    run.to("transformer.h.2")
    run.back_to("transformer.h.1")
    assert [each.size for each in run.edits] == [1.0]
    run.close()


@pytest.mark.parametrize(
    ("predicate", "says"),
    [
        ("has_inf", "2 of its 4 values are infinite"),
        ("shape_is(1, None)", "its shape is [1, 4]"),
        ("shape_is((1, 4))", "its shape is [1, 4]"),
        ("shape_is(4)", ""),
    ],
)
def test_a_run_goes_on_to_what_a_predicate_names(model, predicate, says):
    run = model.trace(X4).start()
    run.to(model.h[0].lin)
    model.h[0].lin.output[:, :2] = float("inf")
    wanted = eval(predicate, vars(predicates))
    if says:
        run.until(wanted)
        assert says in repr(run)
        assert repr(run).startswith("paused at model.h[0].output (Block), step 0")
    else:
        run.until(wanted)
        assert repr(run).startswith("forward of Stack: finished")
    run.close()


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (lambda model: model.trace().start(), "A run held by hand has one input of its own, and this trace has none."),
        (lambda model: model.trace(X4).start().stop(), "A run held by hand is in no block that could be left."),
        (lambda model: model.trace(X4).start().to(model.h[0], "grad"), "A module has no 'grad' to go to."),
        (lambda model: model.trace(keep=True).__enter__(), "`keep=True` is for a trace with one input of its own."),
    ],
)
def test_what_a_held_run_cannot_do_is_a_sentence(model, refused, said):
    from nnsight_eager import RunError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the run that nothing refers to any more
        with pytest.raises(RunError) as caught:
            refused(model)
    assert str(caught.value).splitlines()[0] == said


def test_the_result_of_a_held_run_can_be_replaced(model):
    run = model.trace(X4).start()
    run.step()
    run.result = "mine"
    assert run.finish() == "mine"
    assert not run.model.h[0]._module.__dict__.get("forward")


def test_a_forward_that_fails_before_its_first_module_leaves_nothing_behind():
    from nnsight_eager import RunEndedError

    class Failing(torch.nn.Module):
        def forward(self, x):
            raise ValueError("at once")

    module = torch.nn.Sequential(Failing())
    model = NNsight(module)
    run = model.trace(X4).start().step()
    with pytest.raises(ValueError, match="at once"):
        run.step()
    with pytest.raises((RunEndedError, ValueError)):
        run.step()
    run.close()
    assert all("forward" not in vars(each) for each in module.modules())
    assert model.trace  # and the model can be run again
    with pytest.raises(ValueError, match="at once"):
        model.trace(X4).start().finish()


PARTS = [
    "model.transformer.h[0].attn.pattern",
    "model.transformer.h[0].attn.source.self_c_proj_0.output",
    "model.transformer.h[0].source.self_mlp_0.input",
]


@pytest.mark.parametrize("read_before", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_going_back_to_a_part_of_a_forward_is_done_as_the_error_says(gpt2, part, read_before):
    names = {"model": gpt2, "run": gpt2.trace("The Eiffel Tower").start()}
    gpt2.transformer.wte.output.mul_(2)
    with gpt2.trace("The Eiffel Tower") as tracer:
        tracer.model.transformer.wte.output.mul_(2)
        want = eval(part, {"model": tracer.model})
    if read_before:
        assert torch.equal(eval(part, names), want)
    result = names["run"].to(gpt2.transformer.h[1]).fork().finish().logits
    with pytest.raises(OutOfOrderError) as caught:
        eval(part, names)
    (advice,) = re.findall(r"`(run\.back_to\(.*?\))`", str(caught.value))
    eval(advice, names)
    assert repr(names["run"]).startswith(f"paused at {part} ")
    assert torch.equal(eval(part, names), want)
    assert torch.allclose(names["run"].finish().logits, result, atol=1e-4)  # a pattern is computed in other steps


def test_a_run_is_led_to_an_operation_by_its_path(model):
    run = model.trace(X4).start()
    run.to("h.1.lin.source.F_linear_0", "input").to("h.2").back_to("h[1].lin.source.F_linear_0")
    assert repr(run).startswith("paused at model.h[1].lin.source.F_linear_0.output ")
    run.close()


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Forked()

    def forward(self, x):
        return torch.tanh(self.block(self.block(x)))


def test_one_goes_back_to_the_last_time_an_operation_has_run_as_to_that_of_a_module():
    model = NNsight(Twice())
    with torch.no_grad():
        once = model._module.block(X4)
    for point in (model.block, model.block.source.self_lin_0):
        run = model.trace(X4).start()
        run.finish()
        run.back_to(point, "input")
        assert torch.equal(run._run.at.args[0], once)
        run.close()


def test_an_operation_of_the_model_itself_has_a_path():
    model = NNsight(Twice())
    run = model.trace(X4).start()
    by_path = repr(run.to("source.torch_tanh_0", "input"))
    assert by_path == repr(run.restart().to(model.source.torch_tanh_0, "input"))
    run.close()


def test_what_is_no_predicate_is_refused_where_the_run_is(model):
    run = model.trace(X4).start()
    before = repr(run)
    with pytest.raises(RunError, match=r"^'nan' is no predicate\.\nGive a function of a tensor"):
        run.until("nan")
    assert repr(run) == before
    run.close()


class Forked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def forward(self, x, turned=False):
        if turned:
            x = torch.flip(x, (0,))
        return self.lin(x)


def test_going_back_to_an_operation_that_does_not_run_is_refused_and_the_run_stays(model):
    model = NNsight(Forked())
    run = model.trace(X4).start()
    run.to(model.lin)
    with pytest.raises(NotReachedError, match="the forward that it is in went another way"):
        run.back_to(model.source.torch_flip_0)
    assert repr(run).startswith("paused at model.lin.output ")
    assert torch.equal(run.finish(), model._module(X4))


@pytest.mark.parametrize("part", [("attn", "pattern"), ("source.self_mlp_0",)])
def test_in_a_generation_a_run_goes_on_to_a_part_in_each_step(gpt2, part):
    run = gpt2.generate("The Eiffel Tower", max_new_tokens=3, min_new_tokens=3, do_sample=False).start()
    name, *kind = part
    steps = []
    for _ in range(3):
        run.to(f"transformer.h.1.{name}", *kind)
        steps.append(int(repr(run).split("step ")[1].split()[0]))
    assert steps == [0, 1, 2]
    run.close()
