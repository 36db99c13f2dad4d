"""debugpy, driven as VS Code does: it traces both sides of every switch, and shows the user's own frames."""

import pytest
from dap import debugged
from test_pdb import SCRIPT

STACK = ["the caller", ""]  # of `look`, outwards


@pytest.fixture
def debug(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with debugged(script) as session:
        yield session
    assert "returned (1, 4)\n" in session.printed


def test_from_line_to_line_of_a_body_over_reads_and_out(debug):
    assert debug.begin("body 1") == ["body 1", *STACK]
    assert debug("next") == ["body 2", *STACK]
    variables = debug.variables()
    assert variables["early"]["type"] == "Tensor"
    assert "torch.Size([1, 3])" in debug.inside(variables["early"])["shape"]
    assert "paused at model[0].output" in variables["tracer"]["value"]
    assert debug("next") == ["body 3", *STACK], "looking at a run does not run it"
    assert debug.evaluate("inner.shape") == "torch.Size([1, 3])"
    assert debug("next") == ["with", *STACK]
    assert debug("next") == ["after", *STACK]
    assert debug("stepOut") == STACK
    assert debug("continue") == []


def test_into_the_models_code_and_back_to_the_body(debug):
    assert debug.begin("body 1", "forward 2") == ["body 1", *STACK]
    assert debug("next") == ["body 2", *STACK]
    assert debug("stepIn") == ["forward 1"], "a step into a read comes to the model's code that runs"
    assert debug("next") == ["forward 2"], "which is reached when the body reads on"
    assert debug.evaluate("y.shape") == "torch.Size([1, 3])"
    assert debug("next") == ["forward 3"]
    assert debug("next") == ["with", *STACK], "past the end of the forward the body goes on"
    assert debug("next") == ["after", *STACK]
    assert debug("continue") == ["forward 2", "", *STACK], "the plain call behind the block has a stack of one piece"
    assert debug("stepOut")[-2:] == STACK
    assert debug("continue") == []
