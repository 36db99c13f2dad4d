"""What a trace sees and changes is what plain hooks see and change, in every architecture that can be had small.

The whole table: `python -m tests.architectures`. Here every fourth row of it is made, with fewer modules zeroed, and those that
have found something.
"""

import pytest
import torch
import transformers
from architectures.__main__ import main
from architectures.catalogue import FAMILIES
from architectures.checking import Checks
from architectures.table import architectures, looked_at
from small_models import X4, Stack

# The models' own: of short inputs, of settings they have no weights for.
pytestmark = [pytest.mark.usefixtures("one_torch_thread", "quiet"), pytest.mark.filterwarnings("ignore")]
FOUND = {"dpt", "internvl", "led", "mistral3", "reformer", "whisper"}
SAMPLE = [
    pytest.param(*each, id=f"{each[1]}-{each[0].loaded_by}")
    for number, each in enumerate(architectures())
    if number % 4 == 0 or each[1] in FOUND
]


@pytest.fixture
def quiet():
    """Transformers says much of random weights."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize(("family", "architecture"), SAMPLE)
def test_a_trace_is_what_plain_hooks_are(family, architecture):
    row = looked_at(family, architecture, zeroed=1)
    if row.result == "not run" and transformers.__version__ < "5":
        pytest.skip(f"transformers {transformers.__version__} does not run the small model: {row.why_not}")
    assert row.result == "equal", row.why_not
    assert row.modules > 10
    assert row.compared >= 4 * row.modules


def test_there_are_enough_of_every_family():
    assert len({name for _, name in architectures()}) >= 60
    assert {family.name for family, _ in architectures()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("broken", ["output", "inputs", "replaced", "zeroed", "cached"])
def test_the_checks_tell_what_differs(broken, monkeypatch):
    """Each of them, by having the package do a wrong thing."""
    from nnsight_eager.cache import Keep
    from nnsight_eager.run import Run
    from nnsight_eager.tree import Envoy

    wrong = {
        "output": (Envoy, "output", property(lambda self: Envoy.hidden.fget(self) + 1, Envoy.output.fset)),
        "inputs": (Envoy, "inputs", property(lambda self: ((self.input + 1,), {}), Envoy.inputs.fset)),
        "replaced": (Run, "replace", lambda self, visit, value, path: setattr(visit, "value", torch.ones_like(X4))),
        "zeroed": (Run, "replace", lambda self, visit, value, path: None),
        "cached": (Keep, "copy", lambda self, value: X4),
    }
    checks = Checks(Stack(), {"x": X4})
    checks.forward(zeroed=20)
    assert not checks.found.problems
    assert (checks.found.modules, checks.found.zeroed) == (8, 7)
    monkeypatch.setattr(*wrong[broken])
    checks = Checks(Stack(), {"x": X4})
    checks.forward(zeroed=20)
    said = {"replaced": "replacing with the same value", "zeroed": "zeroing", "cached": "cache"}.get(broken, f".{broken}:")
    assert any(said in problem for problem in checks.found.problems)


def test_the_checks_tell_a_pattern_that_is_not_what_the_model_computes(monkeypatch):
    from nnsight_eager.attention import AttentionPattern

    real = AttentionPattern.forward
    gpt2 = next(each for each in architectures() if each[1] == "gpt2")
    for factor, said in ((0.5, "the result differs"), (2, "it is none")):
        monkeypatch.setattr(AttentionPattern, "forward", lambda *args, factor=factor, **kwargs: real(*args, **kwargs) * factor)
        assert f"transformer.h.0.attn.pattern: {said}" in looked_at(*gpt2, zeroed=0).why_not


def test_the_table_is_written_by_one_command(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "table.md"), "--only", "gpt2", "t5", "--zeroed", "2"]) == 0
    text = (tmp_path / "table.md").read_text()
    assert "| gpt2 | decoder | GPT2LMHeadModel | 31 | 310 | 2 | 1 | 3 | equal |  |" in text
    assert "2 models of 2 architectures, 2 equal to plain hooks" in text
    assert "2 models of 2 architectures" in capsys.readouterr().out
