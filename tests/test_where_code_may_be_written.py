"""The body of a trace is plain code: it may be written wherever Python may be."""

import code
import contextlib
import importlib
import py_compile
import sys

import pytest
import torch
from small_models import BEGIN, X, mlp, run_python

from nnsight_eager import NNsight

BODY = """
with model.trace(x):
    hidden = model[0].output
    model[0].output = hidden * 2
    logits = model[2].output

right = torch.equal(hidden, model[0](x)) and torch.equal(logits, model[2](torch.relu(2 * hidden)))
"""


@pytest.fixture
def names():
    return {"model": NNsight(mlp()), "x": X, "torch": torch}


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in (getattr(module, "__file__", "") or "")]:
        del sys.modules[name]


# Without a file


def test_from_standard_input():
    assert run_python("-", stdin=BEGIN + BODY + "print(right)").endswith("True\n")


def test_at_the_interactive_prompt():
    assert "right: True" in run_python("-i", "-q", stdin=BEGIN + BODY + "\nprint('right:', right)\n")


def test_in_a_string_that_is_executed(names):
    exec(BODY, names)
    assert names["right"]


def test_in_an_interactive_console(names):
    console = code.InteractiveConsole(names)
    for line in BODY.splitlines():
        console.push(line)
    console.push("")
    assert names["right"]


def test_in_a_module_of_which_only_the_compiled_file_is_left(importable, names):
    source = importable / "only_compiled.py"
    source.write_text(BEGIN + BODY)
    py_compile.compile(source, source.with_suffix(".pyc"))
    source.unlink()
    assert importlib.import_module("only_compiled").right


def test_a_module_that_was_edited_and_reloaded_runs_its_new_body(importable):
    source = importable / "edited.py"
    source.write_text(BEGIN + "with model.trace(x):\n    seen = model[0].output\n")
    module = importlib.import_module("edited")
    source.write_text(BEGIN + "# Edited.\nwith model.trace(x):\n    seen = model[2].output\n")
    importlib.invalidate_caches()
    importlib.reload(module)
    assert torch.equal(module.seen, module.model(module.x))


# In a notebook


def test_in_a_notebook_cell(shell, names):
    shell.push(names)
    shell.run_cell(BODY).raise_error()
    assert shell.user_ns["right"]


def test_under_a_cell_magic(shell, names, capsys):
    shell.push(names)
    shell.run_cell("%%time\n" + BODY.strip()).raise_error()
    assert "Wall time" in capsys.readouterr().out
    assert shell.user_ns["right"]


def test_in_a_cell_that_awaits(shell, names):
    shell.push(names)
    shell.run_cell(
        "import asyncio\nwith model.trace(x):\n    await asyncio.sleep(0)\n    hidden = model[0].output"
    ).raise_error()
    assert torch.equal(shell.user_ns["hidden"], names["model"][0](X))


def test_in_ipython_as_a_process_of_its_own(tmp_path):
    cells = BEGIN.strip() + "\n\n%%time\n" + BODY.strip().split("\n\n")[0] + "\n\n\nprint('shape', tuple(hidden.shape))\n"
    printed = run_python(
        "-m", "IPython", "--simple-prompt", "--no-banner", "--no-confirm-exit", stdin=cells, IPYTHONDIR=str(tmp_path)
    )
    assert "Wall time" in printed
    assert "shape (1, 3)" in printed


# Behind other context managers


def test_in_an_exit_stack():
    model = NNsight(mlp())
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.trace(X))
        hidden = model[0].output
    assert torch.equal(hidden, model[0](X))


def test_in_a_context_manager_of_ones_own():
    model = NNsight(mlp())

    @contextlib.contextmanager
    def doubled(x):
        with model.trace(x) as tracer:
            model[0].output = model[0].output * 2
            yield tracer

    with doubled(X) as tracer:
        relu = model[1].output
    assert torch.equal(relu, torch.relu(2 * model[0](X)))
    assert torch.equal(tracer.result, model[2](relu))


@pytest.mark.parametrize("size", range(24))
def test_a_trace_opened_by_a_function_that_has_returned_is_not_taken_for_the_nearest(size):
    """A frame that is gone leaves its address to the next frame of its size."""
    model = NNsight(mlp())
    names = {"model": model}
    exec(f"def read({', '.join(f'a{n}=0' for n in range(size))}): return model[0].output", names)

    def open_on(stack, x):
        stack.enter_context(model.trace(x))

    with contextlib.ExitStack() as stack:
        open_on(stack, X)
        with model.trace(2 * X):
            hidden = names["read"]()
    assert torch.equal(hidden, model[0](2 * X))


# With statements of several items


def test_two_models_in_one_with_statement_run_the_body_once():
    a, b = NNsight(mlp()), NNsight(mlp())
    events = []
    with a.trace(X) as one, b.trace(2 * X) as two:
        events.append("body")
        b[0].output = a[0].output
    assert events == ["body"]
    assert torch.equal(one.result, a(X))
    assert torch.equal(two.result, a(X))


def test_one_model_twice_in_one_with_statement_through_each_tracer():
    model = NNsight(mlp())
    with model.trace(X) as clean, model.trace(2 * X) as corrupt:
        before = corrupt.model[0].output
        corrupt.model[0].output = clean.model[0].output
    assert torch.equal(before, model[0](2 * X))
    assert torch.equal(clean.result, model(X))
    assert torch.equal(corrupt.result, model(X))


def test_of_two_traces_in_one_with_statement_the_model_means_the_later():
    model = NNsight(mlp())
    with model.trace(X), model.trace(2 * X):
        hidden = model[0].output
    assert torch.equal(hidden, model[0](2 * X))
