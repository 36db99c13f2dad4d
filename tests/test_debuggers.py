"""pdb and ipdb in a terminal: from line to line of a body, with a run that is held by hand, and into the model's own code."""

import re

import pytest
from terminal import terminal
from test_pdb import SCRIPT

CALLS = {"pdb": "breakpoint()", "ipdb": "import ipdb; ipdb.set_trace()"}


@pytest.fixture(params=CALLS)
def debugger(request, tmp_path):
    """A debugger that has stopped in front of the first read of a body."""
    script = tmp_path / "script.py"
    first = "        early = model[0].output  # body 1"
    script.write_text(SCRIPT.replace(first, f"        {CALLS[request.param]}\n{first}"))
    with terminal(script, prompt=r"\(Pdb\) |ipdb> ", IPYTHONDIR=str(tmp_path), COLUMNS="160") as running:
        yield running


def current(shown):
    """The mark of the line where the debugger has stopped."""
    found = re.findall(r"^-+> .*# (.*)$", shown.replace("---> ", "-> ").replace("--> ", "-> "), re.MULTILINE)
    return re.sub(r"^\d+ +", "", found[-1]) if found else ""


def arrows(shown):
    """Every line that an arrow points at: of a stack, one a frame."""
    return re.findall(r"^-+> (?:\d+ +)?(.*\S)", shown, re.MULTILINE)


def test_it_goes_over_reads_and_shows_the_users_frames_alone(debugger):
    assert current(debugger.begun) == "body 1"
    assert current(debugger("n")) == "body 2"
    assert "torch.Size([1, 3])" in debugger("p early.shape")
    assert arrows(debugger("w")) == [
        'print("returned", outer())',
        "return look()  # the caller",
        "inner = model[1].lin.output  # body 2",
    ]
    assert current(debugger("u")) == "the caller"
    assert current(debugger("d")) == "body 2"
    assert current(debugger("n")) == "body 3"
    assert current(debugger("n")) == "with"
    assert current(debugger("n")) == "after"
    assert debugger.ends_with("c").endswith("returned (1, 4)\n")


def test_a_run_is_held_at_its_prompt_and_its_model_stepped_through(debugger):
    debugger("!run = model.trace(x).start()")  # pdb has a command `run`
    assert "paused at model[1].input (Inner)" in debugger("!run.step(3)")
    where = debugger("p run.where()")
    assert re.search(r"▶ 1\W+Inner", where)
    assert re.search(r"▶ +\d+ +input = module\(input\)", where)
    assert "def forward(self, x):" in debugger("!run.step(into_code=True)")
    assert arrows(debugger("w")) == ["input = module(input)", "def forward(self, x):"]
    assert current(debugger("n")) == "forward 1"
    assert "torch.Size([1, 3])" in debugger("p x.shape")
    assert "paused at model[1].lin.input (Linear)" in debugger("n")  # and back where this was typed
    assert current(debugger("w")) == "body 1"
    assert current(debugger("n")) == "body 2", "the debugger that was left goes on as before"
    assert "paused at model[1].lin.output (Linear)" in debugger("!run.over()")
    assert debugger.ends_with("c").endswith("returned (1, 4)\n")
