"""Debuggers, coverage tools, notebooks and tracebacks take the block of an invoke for the lines the user wrote."""

import re
import sys
import traceback

import coverage
import pytest
import torch
from small_models import BEGIN, X, mlp, run_python

from nnsight_eager import NNsight
from nnsight_eager.errors import InvokeError

SCRIPT = """\
import torch
from nnsight_eager import NNsight

torch.manual_seed(0)
model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4)))
x = torch.ones(1, 2)

def outer():
    return look("not used in a block")  # the caller

def look(unused):
    scale = 2  # before
    with model.trace() as tracer:  # trace
        with tracer.invoke(x):  # first
            early = model[0].output  # body 1
            doubled = early * scale  # body 2
            last = model[2].output  # body 3
        with tracer.invoke(scale * x):  # second
            other = early + 1  # body 4
            final = model[2].output  # body 5
    after = tuple(last.shape)  # after
    assert torch.equal(doubled, 2 * model[0](x))
    return after, tuple(final.shape)

print("returned", outer())
"""
RETURNED = "returned ((1, 4), (1, 4))\n"


@pytest.fixture
def model():
    return NNsight(mlp())


# pdb


@pytest.fixture
def debug(tmp_path):
    """Run the script with `breakpoint()` in front of the line marked `at`; the answers to the commands, in order."""

    def debug(at, *commands):
        lines = []
        for line in SCRIPT.splitlines():
            if line.endswith(f"# {at}"):
                lines.append(re.match(" *", line)[0] + "breakpoint()")
            lines.append(line)
        file = tmp_path / "script.py"
        file.write_text("\n".join(lines) + "\n")
        return run_python(file, stdin="\n".join(commands) + "\n").split("(Pdb) ")

    return debug


MARK = re.compile(r"^-> .*# (before|trace|first|second|after|the caller|body \d)$", re.MULTILINE)


def stops(answers):
    """The line that each answer stops at, by its mark."""
    return [stop for answer in answers for stop in MARK.findall(answer)]


def test_next_goes_from_line_to_line_of_a_block(debug):
    answers = debug("body 1", "n", "n", "p tuple(last.shape) if 'last' in globals() else None", "c")
    assert stops(answers) == ["body 1", "body 2", "body 3"]
    assert answers[3] == "None\n"
    assert answers[-1] == RETURNED


def test_a_breakpoint_in_a_block_shows_its_names_those_of_earlier_blocks_and_those_around_it(debug):
    answers = debug(
        "body 5", "p tuple(other.shape)", "p tuple(early.shape)", "p scale", "p unused", "p x.shape", "p nobody", "c"
    )
    assert answers[1:6] == ["(1, 3)\n", "(1, 3)\n", "2\n", "'not used in a block'\n", "torch.Size([1, 2])\n"]
    assert answers[6] == "*** NameError: name 'nobody' is not defined\n"
    assert answers[-1] == RETURNED


def test_where_ends_at_the_line_of_the_block(debug):
    answers = debug("body 2", "w", "c")
    *_, last = re.findall(r"^(?:>|  )\s?(\S+?)\(\d+\)(\S+)\(\)", answers[1], re.MULTILINE)
    assert last[0].endswith("script.py")
    assert last[1] == "look"
    assert stops(answers[1:2]) == ["body 2"]
    assert answers[-1] == RETURNED


def test_a_line_of_a_block_can_be_given_a_breakpoint_from_outside(debug):
    line = 1 + next(number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# body 4"))
    answers = debug("before", f"b {line}", "c", "p scale", "n", "p tuple(other.shape)", "c")
    assert stops(answers) == ["before", "body 4", "body 5"]
    assert answers[3] == "2\n"
    assert answers[5] == "(1, 3)\n"
    assert answers[-1] == RETURNED


def test_next_passes_over_the_blocks_and_the_run_of_the_trace(debug):
    answers = debug("before", *["n"] * 5, "p after", "n", "p after", "c")
    assert stops(answers) == ["before", "trace", "first", "second", "trace", "after"]
    assert answers[6] == "*** NameError: name 'after' is not defined\n"
    assert answers[-1] == RETURNED


def test_continue_from_a_block_goes_to_the_end(debug):
    answers = debug("body 3", "c")
    assert stops(answers) == ["body 3"]
    assert answers[-1] == RETURNED


def test_up_and_next_past_the_end_of_a_block_lose_nothing(debug):
    answers = debug("body 3", "n", "n", "n", "c")
    assert stops(answers)[0] == "body 3"
    assert answers[-1] == RETURNED


def test_quitting_in_a_block_ends_the_program(debug):
    with pytest.raises(AssertionError, match=r"bdb\.BdbQuit"):
        debug("body 2", "q")


# A trace function of one's own


def test_a_trace_function_is_given_back_and_sees_every_line_once(model):
    seen = []

    def tracer(frame, event, _):
        if frame.f_code.co_filename != __file__ or frame.f_code.co_name != "look":
            return None
        if event == "line":
            seen.append(frame.f_lineno - look.__code__.co_firstlineno)
        return tracer

    def look():
        with model.trace() as trace:
            with trace.invoke(X):
                hidden = model[0].output
                hidden = hidden * 2
            with trace.invoke(X):
                other = hidden + 1
            between = 1
        return other, between

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        look()
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    read = [line for line in seen if line not in (1, 2, 5)]
    assert read in ([7, 3, 4, 6, 8], [7, 3, 6, 4, 8]), "the second block goes on when the first has bound `hidden`"
    assert {1, 2, 5} <= {*seen}


def test_the_frame_of_an_untraced_function_stays_untraced(model):
    frame, before = sys._getframe(), sys.gettrace()
    settings = frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines
    with model.trace() as tracer:
        with tracer.invoke(X):
            hidden = model[0].output
        assert (frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines) == settings
        assert sys.gettrace() is before
    assert torch.equal(hidden, model[0](X))
    assert sys.gettrace() is before


# Coverage


LINES = (
    BEGIN
    + """
def helper(hidden):
    return hidden * 2  # seen

def look():
    with model.trace() as tracer:  # seen
        with tracer.invoke(x):  # seen
            early = model[0].output  # seen
            if early.shape[0] > 1:  # seen
                early = None  # never
            doubled = helper(early)  # seen
        with tracer.invoke(x): inline = model[0].output  # seen
        for turn in range(2):  # seen
            with tracer.invoke(turn * x):  # seen
                try:
                    other = doubled + turn  # seen
                    raise KeyError  # seen
                except KeyError:  # seen
                    final = model[2].output  # seen
                else:
                    final = None  # never
        between = 1  # seen
    if between > 1:  # seen
        between = None  # never
    return helper(final)  # seen

look()
with model.trace() as tracer:  # seen
    @tracer.invoke(x)  # seen
    def body():
        return model[0].output  # seen
    with tracer.invoke(2 * x):  # seen
        hidden = model[0].output  # seen
with model.trace() as tracer, tracer.invoke(x):  # seen
    joint = helper(hidden)  # seen
end = body.result + joint  # seen
"""
)


def marked(text, mark):
    return {number for number, line in enumerate(text.splitlines(), 1) if line.endswith(f"# {mark}")}


def code_lines(text):
    """Every line that code can be on."""
    found, waiting = set(), [compile(text, "script", "exec")]
    while waiting:
        code = waiting.pop()
        found |= {line for *_, line in code.co_lines() if line}
        waiting += [each for each in code.co_consts if hasattr(each, "co_lines")]
    return found


@pytest.mark.parametrize(
    "options",
    [(), ("--branch",), ("--concurrency=greenlet,thread",)],
    ids=["plain", "branch", "greenlet"],
)
def test_coverage_sees_the_lines_of_blocks_and_those_behind_them(tmp_path, options):
    script, data_file = tmp_path / "script.py", tmp_path / "data"
    script.write_text(LINES)
    run_python(
        *["-m", "coverage", "run", "--rcfile=/dev/null", f"--data-file={data_file}", f"--include={tmp_path}/*"],
        *options,
        script,
        folder=tmp_path,
        COVERAGE_PROCESS_START="",
    )
    data = coverage.CoverageData(basename=str(data_file))
    data.read()
    seen = set(data.lines(str(script)))
    assert sorted(marked(LINES, "seen") - seen) == []
    assert sorted(marked(LINES, "never") & seen) == []
    assert sorted(seen - code_lines(LINES)) == [], "lines of another file are noted for this one"


# Tracebacks


def users_lines(error):
    return [(each.name, each.line) for each in traceback.extract_tb(error.__traceback__)]


def test_an_error_in_a_block_shows_the_users_lines_and_no_other(model):
    def wrong(hidden):
        return hidden["x"][5:7:"y"]

    def look():
        with model.trace() as tracer:
            with tracer.invoke(X):
                hidden = model[0].output
            with tracer.invoke(X):
                wrong({"x": hidden.tolist()})

    with pytest.raises(TypeError) as raised:
        look()
    assert users_lines(raised.value)[1:] == [
        ("look", "with model.trace() as tracer:"),
        ("look", 'wrong({"x": hidden.tolist()})'),
        ("wrong", 'return hidden["x"][5:7:"y"]'),
    ]
    assert raised.value.__context__ is None


def test_an_error_of_the_model_shows_the_line_that_asked(model):
    def look():
        with model.trace() as tracer, tracer.invoke(X):
            model[0].output = torch.ones(1, 8)
            return_value = model[2].output
        return return_value

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        look()
    lines = users_lines(raised.value)
    assert lines[1:3] == [
        ("look", "with model.trace() as tracer, tracer.invoke(X):"),
        ("look", "return_value = model[2].output"),
    ]
    assert not [each for each in traceback.extract_tb(raised.value.__traceback__) if "nnsight_eager/" in each.filename]


def test_a_name_that_nobody_binds_is_an_error_at_its_line(model):
    with pytest.raises(NameError, match="name 'nobody' is not defined") as raised, model.trace() as tracer:
        with tracer.invoke(X):
            hidden = model[0].output
        with tracer.invoke(X):
            print(hidden + nobody)  # noqa: F821
    assert users_lines(raised.value)[-1][1] == "print(hidden + nobody)  # noqa: F821"


def test_a_refused_block_leaves_the_trace_with_an_error_of_one_cause(model):
    def look():
        with model.trace() as tracer, tracer.invoke(X):
            return model[0].output

    with pytest.raises(InvokeError) as raised:
        look()
    assert raised.value.__context__ is None
    with model.trace(X):
        hidden = model[0].output
    assert torch.equal(hidden, model[0](X))


# Notebooks and prompts

CELL = """
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model[0].output
    for scale in (2, 3):
        with tracer.invoke(scale * x):
            model[0].output = hidden
            logits = model[2].output
right = torch.equal(hidden, model[0](x)) and torch.equal(logits, model(x))
"""

IN_A_FUNCTION = """
with model.trace() as tracer:
    @tracer.invoke(x)
    def hidden():
        return model[0].output
    doubled = tracer.invoke(2 * x, lambda: model[0].output)

right = torch.equal(hidden.result, model[0](x)) and torch.equal(doubled.result, model[0](2 * x))
"""


def test_a_notebook_cell_may_hold_blocks_and_be_run_again(shell, model):
    shell.push({"model": model, "x": X, "torch": torch})
    for factor in (1, 5):
        shell.push({"x": factor * X, "right": False})
        shell.run_cell(CELL).raise_error()
        assert shell.user_ns["right"]
        assert torch.equal(shell.user_ns["hidden"], model[0](factor * X))


def test_an_error_in_a_notebooks_block_shows_the_cells_line(shell, model):
    shell.push({"model": model, "x": X})
    result = shell.run_cell(
        "with model.trace() as tracer:\n    with tracer.invoke(x):\n        seen = model[0].output.nothing_such"
    )
    with pytest.raises(AttributeError) as raised:
        result.raise_error()
    assert users_lines(raised.value)[-1][1] == "seen = model[0].output.nothing_such"


def test_a_cell_that_awaits_may_hold_blocks_beside(shell, model):
    shell.push({"model": model, "x": X, "torch": torch})
    shell.run_cell("import asyncio\nawait asyncio.sleep(0)" + CELL + "await asyncio.sleep(0)").raise_error()
    assert shell.user_ns["right"]


def test_the_function_form_works_under_a_cell_magic(shell, model, capsys):
    shell.push({"model": model, "x": X, "torch": torch, "right": False})
    shell.run_cell("%%time\n" + IN_A_FUNCTION.strip()).raise_error()
    assert "Wall time" in capsys.readouterr().out
    assert shell.user_ns["right"]


def test_in_ipython_as_a_process_of_its_own(tmp_path):
    cell = "\n".join(line for line in CELL.strip().splitlines()[:-1])
    printed = run_python(
        *["-m", "IPython", "--simple-prompt", "--no-banner", "--no-confirm-exit"],
        stdin=BEGIN.strip() + "\n" + (cell + "\n\n\n") * 2 + "print('same', torch.equal(logits, model(x)))\n",
        IPYTHONDIR=str(tmp_path),
    )
    assert "same True" in printed


REFUSED = (
    "nnsight_eager.errors.InvokeError: This block cannot be run in the model's forward pass: "
    "there is no source to be had for '<stdin>'.\n"
    "Write it as a function, `tracer.invoke(prompt, function)`, or give every invoke a pass of its own with "
    "`model.trace(batched=False)`.\n"
)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python keeps the source of what is typed")
def test_at_the_interactive_prompt_a_block_is_refused_and_a_function_works():
    lines = CELL.strip().splitlines()
    typed = BEGIN + "\n".join(lines[:-1]) + "\n\n" + IN_A_FUNCTION + "\nprint('right:', right)\n"
    printed = run_python("-i", "-q", stdin=typed)
    assert REFUSED in printed
    assert "right: True" in printed


def test_in_a_script_from_standard_input_a_block_is_refused_and_a_function_works():
    caught = "import traceback\ntry:\n" + "".join(f"    {line}\n" for line in CELL.strip().splitlines())
    caught += "except Exception as error:\n    print(traceback.format_exc())\n"
    printed = run_python("-", stdin=BEGIN + caught + IN_A_FUNCTION + "print('right:', right)\n")
    assert REFUSED in printed
    assert "right: True" in printed


def test_without_source_positions_a_block_is_refused(tmp_path):
    script = tmp_path / "script.py"
    caught = "try:\n" + "".join(f"    {line}\n" for line in CELL.strip().splitlines())
    caught += "except Exception as error:\n    print(error)\n"
    script.write_text(BEGIN + caught + IN_A_FUNCTION + "print('right:', right)\n")
    printed = run_python("-X", "no_debug_ranges", script)
    assert "model's forward pass: Python runs without source positions (`-X no_debug_ranges`).\n" in printed
    assert "right: True" in printed
