"""A debugger in the model's own code: what it shows, and where it does not stop."""

import pytest
from small_models import run_python

SCRIPT = """
import sys
import torch
from nnsight_eager import NNsight

class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Identity()

    def forward(self, x):
        half = x / 2
        inner = self.inner(half)
        return inner + 1

model = NNsight(torch.nn.Sequential(Half(), Half()))
run = model.trace(torch.ones(3)).start()
run.step()
print("AT", run.step(into_code=True))
print("TRACED BY", sys.gettrace())
print("AT", run.step(into_code=True))
print("RESULT", run.finish())
"""


@pytest.fixture
def session(tmp_path):
    """What a debugger shows for these commands."""

    def run(*commands):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        unmeasured = {"COVERAGE_PROCESS_CONFIG": ""}  # what traces where no debugger does is asked for
        return run_python(script, stdin="\n".join([*commands, ""]), folder=tmp_path, COLUMNS="160", **unmeasured)

    return run


def test_it_stops_at_the_modules_own_lines_and_goes_on_to_the_next_point(session):
    shown = session("n", "n", "p half", "c", "c")
    assert "-> half = x / 2" in shown
    assert "tensor([0.5000, 0.5000, 0.5000])" in shown
    assert "AT paused at model[0].inner.input (Identity)" in shown
    assert "RESULT tensor([1.7500, 1.7500, 1.7500])" in shown


def test_between_two_points_nothing_is_traced_and_stepping_over_a_point_comes_to_it(session):
    shown = session("n", "n", "n", "c")  # the third goes on past the call of `inner`, which the run is paused before
    assert "AT paused at model[0].inner.input" in shown
    assert "TRACED BY None" in shown
    assert "AT paused at model[0].inner.output" in shown


def test_what_the_debugger_changes_the_model_goes_on_with(session):
    shown = session("n", "n", "half = half * 4", "c", "c")
    assert "RESULT tensor([2.5000, 2.5000, 2.5000])" in shown
    assert "nnsight_eager" not in shown.replace("from nnsight_eager", "")
