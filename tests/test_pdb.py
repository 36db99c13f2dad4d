"""The debugger needs no support: driven through its standard input, it shows the user's own frames."""

import re

import pytest
from small_models import run_python

SCRIPT = """\
import torch
from nnsight_eager import NNsight

class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(3, 3)

    def forward(self, x):
        y = self.lin(x)  # forward 1
        z = y + 1  # forward 2
        return z  # forward 3

torch.manual_seed(0)
model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 3), Inner(), torch.nn.Linear(3, 4)))
x = torch.ones(1, 2)

def outer():
    return look()  # the caller

def look():
    before = x.shape  # before
    with model.trace(x) as tracer:  # with
        early = model[0].output  # body 1
        inner = model[1].lin.output  # body 2
        last = model[2].output  # body 3
    after = tuple(last.shape)  # after
    assert torch.equal(last, model(x))
    return after

print("returned", outer())
"""


@pytest.fixture
def debug(tmp_path):
    """Run the script with `breakpoint()` in front of the line marked `at`; the answers to the commands, in order."""

    def debug(at, *commands, script=SCRIPT):
        lines = []
        for line in script.splitlines():
            if line.endswith(f"# {at}"):
                lines.append(re.match(" *", line)[0] + "breakpoint()")
            lines.append(line)
        file = tmp_path / "script.py"
        file.write_text("\n".join(lines) + "\n")
        printed = run_python(file, stdin="\n".join(commands) + "\n")
        return printed.split("(Pdb) ")

    return debug


MARK = re.compile(r"^-> .*# (before|with|after|the caller|body \d|forward \d)$", re.MULTILINE)


def stops(answers):
    """The line that each answer stops at, by its mark."""
    return [stop for answer in answers for stop in MARK.findall(answer)]


def test_next_goes_from_line_to_line_over_reads_and_past_the_end_of_the_block(debug):
    answers = debug("before", *["n"] * 6, "p after", "c")
    assert stops(answers) == ["before", "with", "body 1", "body 2", "body 3", "with", "after"]
    assert answers[-1].endswith("returned (1, 4)\n")


def test_next_on_the_with_line_goes_into_the_body(debug):
    assert stops(debug("with", "n", "n", "c")) == ["with", "body 1", "body 2"]


def test_a_breakpoint_in_the_body_shows_real_values_and_the_callers_frames(debug):
    answers = debug("body 2", "p tuple(early.shape)", "p model[1].lin.output.shape", "w", "u", "c")
    assert answers[1] == "(1, 3)\n"
    assert answers[2] == "torch.Size([1, 3])\n"
    assert re.findall(r"script\.py\(\d+\)(\S+)\(\)", answers[3]) == ["<module>", "outer", "look"]
    assert "nnsight_eager" not in answers[3]
    assert stops(answers[4:5]) == ["the caller"]
    assert answers[-1].endswith("returned (1, 4)\n")


def test_return_goes_to_the_end_of_the_function_that_holds_the_block(debug):
    answers = debug("body 1", "r", "p after", "c")
    assert "--Return--" in answers[1]
    assert "->(1, 4)" in answers[1]
    assert answers[2] == "(1, 4)\n"


def test_until_and_tbreak_work_over_the_block(debug):
    answers = debug("with", "n", "until", "until", "until", "c")
    assert stops(answers)[:4] == ["with", "body 1", "body 2", "body 3"]


def test_a_statement_typed_at_the_prompt_may_edit_the_model(debug):
    script = SCRIPT.replace(
        "    assert torch.equal(last, model(x))\n", "    print(torch.equal(inner, model[1].lin(torch.ones(1, 3))))\n"
    )
    answers = debug("body 2", "!model[0].output = torch.ones(1, 3)", "p model[0].output.tolist()", "c", script=script)
    assert answers[2] == "[[1.0, 1.0, 1.0]]\n"
    assert answers[3] == "True\nreturned (1, 4)\n"


def test_a_breakpoint_in_the_models_own_forward(debug):
    answers = debug("forward 2", "p tuple(y.shape)", "n", "p torch.equal(z, y + 1)", "c", "c")
    assert stops(answers[:3]) == ["forward 2", "forward 3"]
    assert answers[1] == "(1, 3)\n"
    assert answers[3] == "True\n"
    assert stops(answers[4:5]) == ["forward 2"], "the plain call behind the block stops there too"
    assert answers[-1].endswith("returned (1, 4)\n")


def test_a_line_of_the_forward_can_be_given_a_breakpoint_from_the_body(debug):
    line = 1 + next(number for number, line in enumerate(SCRIPT.splitlines()) if line.endswith("# forward 2"))
    answers = debug("body 2", f"b {line}", "n", "n", "p tuple(y.shape)", "cl 1", "c")
    assert stops(answers) == ["body 2", "body 3", "forward 2"]
    assert answers[4] == "(1, 3)\n"
    assert answers[-1].endswith("returned (1, 4)\n")


def test_continue_ends_the_debugging_on_both_sides(debug):
    answers = debug("body 1", "c")
    assert answers[-1].endswith("returned (1, 4)\n")
    assert len(answers) == 2


def test_next_over_the_last_read_leaves_the_block_on_the_with_line(debug):
    assert stops(debug("body 3", "n", "n", "c")) == ["body 3", "with", "after"]


def test_step_into_a_read_and_return_comes_back_to_the_body(debug):
    """`s` shows this package's own frames, as it would torch's; `r` leaves them, across the switch to the model and back."""
    answers = debug("body 1", "s", "r", "s", "r", "n", "n", "c")
    assert "nnsight_eager" in answers[1]
    assert "output()->tensor" in answers[4]
    assert stops(answers) == ["body 1", "body 2", "body 3"]


def test_a_post_mortem_begins_at_the_users_line(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.replace("early = model[0].output", "early = model[0].output.no_such_name"))
    printed = run_python("-m", "pdb", file, stdin="c\nw\nq\nq\n")
    mortem = printed.split("Uncaught exception")[1]
    assert stops([mortem])[0] == "body 1"
    assert "nnsight_eager" not in mortem.split("Traceback")[0].split("(Pdb)")[0]
