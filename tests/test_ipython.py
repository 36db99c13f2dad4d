"""IPython in a terminal: a run is held from cell to cell, the magics, the Tab key, and the debugger after an error."""

import re
import time

import pytest
import torch
from terminal import ipython

from nnsight_eager import NNsight

MODEL = """
import torch
from nnsight_eager import NNsight

class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Identity()
        self.unsafe = False

    def forward(self, x):
        half = self.inner(x / 2)
        return half.log() if self.unsafe else half + 1

torch.manual_seed(0)
blocks = torch.nn.Sequential(*[Half() for _ in range(4)])
model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), blocks, torch.nn.Linear(3, 2)))
x = -torch.ones(1, 3)
"""


@pytest.fixture
def cells(tmp_path):
    """IPython with a model."""
    (tmp_path / "begin.py").write_text(MODEL)
    with ipython(tmp_path, "--simple-prompt") as cell:
        cell(f"%run {tmp_path / 'begin.py'}")
        yield cell


def test_a_run_is_held_from_cell_to_cell(cells):
    cells("from nnsight_eager import has_nan")
    assert "paused at model.input (Sequential), step 0" in cells("run = model.trace(x).start(); run")
    assert "Out" in cells("expected = model(x); expected.shape")
    assert "torch.Size([1, 3])" in cells("model[0].output.shape")
    cells("model[0].output *= -1")  # of another cell than the read
    assert "model[0].output" in cells("run.edits")
    cells("blocks[2].unsafe = True; blocks[2].register_forward_pre_hook(lambda m, args: (args[0] - 100,)).id")
    shown = cells("run.until(has_nan)")
    assert "paused at model[1][2].output (Half), step 0" in shown
    assert "3 of its 3 values are NaN" in shown
    assert "return half.log() if self.unsafe" not in cells("run.where()")  # it is paused behind that frame
    assert "paused at model[1][1].inner.output (Identity), step 0" in cells('run.back_to("1.1.inner")')
    assert "▶ " in cells("run.where()")
    assert "tensor(3)" in cells("run.finish().isnan().sum() + 1")
    cells("blocks[2].unsafe = False; _ = blocks[2]._forward_pre_hooks.clear()")
    cells("run.restart()")
    assert "True" in cells("torch.equal(run.finish(), expected)")
    assert "[]" in cells('[path for path, each in model._module.named_modules() if "forward" in vars(each)]')
    assert "UserWarning" not in cells.ends_with("exit")


def test_the_magics(cells):
    cells("%load_ext nnsight_eager")
    assert "paused at model.input (Sequential)" in cells("%trace model x")
    assert "paused at model[0].output (Linear)" in cells("%step 2")
    assert "paused at model[1].input (Sequential)" in cells("%step")
    assert "paused at model[1][1].input (Half)" in cells("%to 1.1 input")
    assert "paused at model[1][1].output (Half)" in cells("%over")
    assert "paused at model[1].output (Sequential)" in cells("%out")
    assert re.search(r"model\[1\]\[1\].output. has already run.*\nGo back to it: `%back 1.1`; for", cells("%to 1.1"))
    assert "Go back to it: `%back 1.1.inner input`; for" in cells("%to 1.1.inner input")
    assert "paused at model[1][1].output (Half)" in cells("%back 1.1")
    cells("model[1][1].output *= 0")
    assert "model[1][1].output" in cells("%edits")
    assert "its norm is 1.732, above 1.7" in cells("%until norm_above(1.7)")
    assert "def forward" not in cells("%where")
    assert "paused at model.input" in cells("%back")
    assert "nothing has been changed" in cells("%edits")
    assert "forward of Sequential: finished" in cells("%finish")
    assert re.search("This run has come to its end.\\n`%back` begins it again, `%back PATH` goes back", cells("%step"))
    cells("del run")
    assert "No run is held as `run`" in cells("%step")


def test_a_cell_is_run_as_the_body_of_a_trace(cells):
    cells("%load_ext nnsight_eager")
    cells("%%trace model x\nhidden = model[0].output\nmodel[1].output = hidden * 0\nprint(tracer)\n\n")
    assert "True" in cells("torch.equal(tracer.result[0], model._module[2].bias)")
    assert "False" in cells("hidden.isnan().any().item()")
    failing = cells("%%trace model x\nmodel[1].output\nmodel[0].output\n\n")
    assert "----> 2 model[0].output" in failing
    assert "OutOfOrderError" in failing


def test_the_debugger_shows_the_line_of_the_cell_and_the_models_frames(cells):
    cells("run = model.trace(x).start()")
    cells("model[1][2].inner.output = torch.ones(1, 2)")
    assert_only_the_model_is_shown(cells, "model[2].output", r"----> 1 model\[2\].output")
    cells("%load_ext nnsight_eager")
    cells("run.restart()")
    cells("model[1][2].inner.output = torch.ones(1, 2)")
    assert_only_the_model_is_shown(cells, "%finish", r"run_line_magic\('finish', ''\)")
    assert_only_the_model_is_shown(
        cells,
        "with model.trace(x):\n    model[1][2].inner.output = torch.ones(1, 2)\n    logits = model[2].output\n",
        r"----> 3     logits = model\[2\].output",
    )


def assert_only_the_model_is_shown(cells, failing, line):
    shown = cells(failing)
    assert re.search(line, shown)
    assert "mat1 and mat2 shapes cannot be multiplied" in shown
    assert "The model was running `model[2]`." in shown
    assert re.search(r"became \[1, 2\] float32 \(Cell In\[\d+\], line \d\)", shown)
    assert "nnsight_eager" not in shown
    assert "linear.py" in cells("%debug")
    stack = cells("w")
    assert re.search(line.removeprefix("----> 1 ").removeprefix("----> 3 "), stack)
    assert "forward_call" not in stack
    assert "nnsight_eager" not in stack
    assert "torch.Size([1, 2])" in cells("p input.shape")
    cells("q")


def test_the_tab_key_offers_the_paths_of_modules(tmp_path):
    (tmp_path / "begin.py").write_text(MODEL)
    with ipython(tmp_path, prompt=r"In \[\d+\]:", TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1") as cell:
        tab = cell.child
        for line in (f"%run {tmp_path / 'begin.py'}", "%load_ext nnsight_eager", "%trace model x"):
            tab.send(f"{line}\r")
            tab.expect(r"In \[\d+\]:")
            time.sleep(0.2)
        tab.send("%to 1.2\t")
        tab.expect(r"1\.2\.inner")
        tab.send("inner \t")
        tab.expect("output")


@pytest.mark.parametrize(
    ("magic", "said"),
    [
        ("trace", 'Write the model and its input: `%trace model "The Eiffel Tower is in"`.'),
        ("step two", "`%step` takes a number, and was given `two`."),
        ("until", "Write what to stop at: `%until has_nan`, `%until norm_above(100)`."),
        ("to", "Write one path: `%to 0.0`, or `%to 0.0 input`."),
        ("out now", "`%out` takes nothing, and was given `now`."),
        ("finish it", "`%finish` takes nothing, and was given `it`."),
        ("until norm_above(", "This is no Python expression: '(' was never closed."),
        ('trace model "unfinished', "This is no Python expression: unterminated string literal (detected at line 1)."),
        ("trace modl 3", "name 'modl' is not defined"),
        ("trace model.tracer 3", "`model` (Sequential) has no `tracer`; did you mean `trace`?"),
        (
            "trace model",
            'A run held by hand has one input of its own, and this trace has none.\nWrite `%trace model "a prompt"`.',
        ),
    ],
)
def test_a_magic_that_lacks_a_word_says_what_to_write(shell, monkeypatch, magic, said):
    from IPython.core.error import UsageError

    from nnsight_eager.interactive.magics import load

    load(shell)
    model = NNsight(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(1, 1))))
    run = model.trace(torch.ones(1)).start()
    monkeypatch.setitem(shell.user_ns, "run", run)
    monkeypatch.setitem(shell.user_ns, "model", model)
    name, _, given = magic.partition(" ")
    with pytest.raises(UsageError) as caught:
        shell.run_line_magic(name, given)
    assert str(caught.value) == said
    run.close()


def test_the_tab_key_behind_until_offers_what_can_be_stopped_at(shell):
    from IPython.core.completer import provisionalcompleter

    from nnsight_eager.interactive.magics import load

    load(shell)
    with provisionalcompleter():
        offered = {each.text for each in shell.Completer.completions("%until has", len("%until has"))}
    assert offered == {"has_nan", "has_inf"}


@pytest.mark.parametrize(
    ("python", "magic"),
    [
        ("run.restart()", "%back"),
        ("run.back_to(...)", "%back PATH"),
        ("run.back_to(model)", "run.back_to(model)"),  # `%back` alone goes to the start, which is the model's input
        ('run.back_to(model, "input")', "%back"),
        ('run.back_to(model.h[1].attn, "pattern")', "%back h.1.attn pattern"),
        ("run.back_to(model[0].source.linear_0)", "%back 0.source.linear_0"),
        ("run.to(...)", "%to PATH"),
        ("run.step()", "%step"),
        ("model.trace(...).start()", '%trace model "a prompt"'),
        ("run.fork()", "run.fork()"),  # there is no magic for it
    ],
)
def test_what_errors_say_to_write_is_said_as_a_magic(python, magic):
    from nnsight_eager.interactive.magics import in_magics

    assert in_magics(f"Write `{python}`, or do not.") == f"Write `{magic}`, or do not."


def test_a_name_that_the_model_lacks_is_no_mistake_in_the_magic(shell, monkeypatch):
    from nnsight_eager.interactive.magics import load

    class Forgetful(torch.nn.Module):
        def forward(self, x):
            return missing + x  # noqa: F821

    load(shell)
    monkeypatch.setitem(shell.user_ns, "run", NNsight(Forgetful()).trace(torch.ones(1)).start())
    with pytest.raises(NameError, match="missing"):
        shell.run_line_magic("step", "")
