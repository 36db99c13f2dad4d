"""Looking never runs the model: `repr`, `dir`, completion and probing leave a paused forward where it is."""

import inspect
import re

import pytest
import torch
from small_models import BEGIN, X4, run_python

import nnsight_eager
from nnsight_eager import errors
from nnsight_eager.points import Points

POINTS = ["output", "input", "inputs", "hidden"]


def completions(shell, text):
    """What the Tab key offers behind `text`."""
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        found = {each.text for each in shell.Completer.completions(text, len(text))} | set(shell.complete(text)[1])
    return {each.rpartition(".")[2] for each in found}


@pytest.mark.filterwarnings("ignore")  # the completer's own
@pytest.mark.parametrize("use_jedi", [False, True], ids=["no jedi", "jedi"])
@pytest.mark.parametrize("evaluation", ["minimal", "limited"])  # "unsafe" (also `greedy`) evaluates whatever is written
@pytest.mark.parametrize(
    "text",
    [
        "model.",
        "model.h[0].",
        "model.h[0].out",
        "model.h[0].output",
        "model.h[0].output.",
        "model.h[0].lin.output.sh",
        "model.h[0].input.",
        "model.h[0].inputs[",
        "model.h[0].hidden.",
        "model.h[-1].lin.",
        "model['h'].",
        "layer.output.",
        "layer.output.sum().",
        "tracer.",
        "tracer.model.h[1].output.",
    ],
)
def test_completion_does_not_advance_the_run(shell, watched, text, evaluation, use_jedi):
    model, events = watched
    shell.Completer.use_jedi, shell.Completer.evaluation = use_jedi, evaluation
    with model.trace(X4) as tracer:
        _ = model.h[0].lin.input
        shell.push({"model": model, "layer": model.h[1], "tracer": tracer})
        before = list(events)
        completions(shell, text)
        assert events == before


@pytest.mark.filterwarnings("ignore")
def test_completion_offers_points_and_children(shell, watched):
    model, _ = watched
    shell.Completer.use_jedi, shell.Completer.evaluation = False, "limited"
    shell.push({"model": model})
    assert {"output", "h", "head", "trace"} <= completions(shell, "model.")


def test_completion_works_in_a_session_that_has_traced_already():
    """IPython's evaluator is imported at the first Tab and lists the methods of the builtin types."""
    run_python("-", stdin=BEGIN + "model.trace(x).result\nimport IPython.core.guarded_eval")


@pytest.mark.parametrize("inspected", ["?", "??"])
def test_a_question_mark_in_ipython_does_not_advance_the_run(shell, watched, inspected, capsys):
    model, events = watched
    with model.trace(X4):
        _ = model.h[0].lin.input
        before = list(events)
        shell.push({"model": model})
        shell.run_cell(f"model.h[1]{inspected}").raise_error()
        assert events == before
    assert "Block" in capsys.readouterr().out


def test_showing_listing_and_probing_do_not_advance_the_run(watched):
    model, events = watched
    with model.trace(X4) as tracer:
        _ = model.h[0].lin.input
        before = list(events)
        for envoy in (model, model.h, model.h[0], model.h[2], model.head, model.unused, tracer.model, model.h[1].next()):
            repr(envoy), str(envoy), dir(envoy), bool(envoy), list(envoy.named_modules()), vars(envoy)
            inspect.getmembers_static(envoy)
            hasattr(envoy, "_ipython_display_"), hasattr(envoy, "_repr_mimebundle_")
        repr(tracer), dir(tracer), repr(tracer.iter), tracer.iter[2:]
        assert events == before


def test_showing_an_envoy_in_a_notebook_does_not_advance_the_run(shell, watched):
    model, events = watched
    with model.trace(X4):
        _ = model.h[0].lin.input
        before = list(events)
        data, _ = shell.display_formatter.format(model.h[1])
        assert events == before
        assert data["text/plain"] == repr(model.h[1])


@pytest.mark.parametrize("name", POINTS)
def test_a_point_is_a_plain_property_annotated_exactly_as_a_tensor(name):
    point = inspect.getattr_static(Points, name)
    assert type(point) is property
    assert inspect.get_annotations(point.fget, eval_str=True)["return"] is torch.Tensor


# Errors


def classes_of_errors():
    return [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, Exception)]


@pytest.mark.parametrize("error", classes_of_errors())
def test_no_error_is_an_attribute_error(error):
    assert not issubclass(error, AttributeError)


def test_every_error_can_be_imported_from_the_package():
    missing = [each.__name__ for each in classes_of_errors() if getattr(nnsight_eager, each.__name__, None) is not each]
    assert missing == []


def test_the_tree_of_errors_in_the_docstring_is_the_tree_of_classes():
    drawn = re.findall(r"^(?:NnsightEagerError|[│ ]*[├└]── (\w+))", errors.__doc__, re.MULTILINE)
    assert sorted(each or "NnsightEagerError" for each in drawn) == sorted(each.__name__ for each in classes_of_errors())
