"""Sessions at the prompt: what is typed, and what a shell shows for it, kept as text and compared with what it shows now.

A transcript is a file of `>>> ` lines with their output, typed line by line into Python's own shell. Numbers with a fraction
are compared within a tolerance, since they depend on the processor, and lines of source without their numbers. Write `>>> `
lines, or change what is shown, and have the rest written:

    NNSIGHT_EAGER_REWRITE=1 pytest tests/test_transcripts.py
"""

import builtins
import contextlib
import io
import os
import re
import sys
import warnings
from code import InteractiveConsole
from pathlib import Path

import pytest
import torch

import nnsight_eager
from nnsight_eager import LanguageModel, demo

FOLDER = Path(__file__).parent / "transcripts"
REWRITE = bool(os.environ.get("NNSIGHT_EAGER_REWRITE"))
CALLS = [
    "step",
    "over",
    "out",
    "to",
    "until",
    "where",
    "locals",
    "back_to",
    "restart",
    "fork",
    "edits",
    "finish",
    "close",
    "start_without_keeping",
    "fork_of_a_trace",
    "generate",
    "errors",
    "looking_for_what_does_not_run",
]
FRACTION = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?|-?\d+e[-+]\d+")
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def models(folder):
    """A tiny random model, and the small real one, each made once."""
    made = {}

    def model(kind):
        if kind not in made:
            try:
                path = folder("gpt2") if kind == "tiny" else demo.folder()
            except nnsight_eager.LoadError as error:
                pytest.skip(f"the real model cannot be had here: {error}")
            made[kind] = LanguageModel(path, dispatch=True)
        return made[kind]

    return model


@pytest.fixture
def plain_shell(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # Ray's, where it was imported, stands in for it


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["tiny", "real"])
@pytest.mark.usefixtures("plain_shell")
def test_a_session_shows_what_is_in_its_transcript(models, kind, call):
    file = FOLDER / kind / f"{call}.txt"
    model, before = models(kind), file.read_text()
    modules = [dict(vars(each)) for each in model._module.modules()]
    now = typed([line for line in before.splitlines() if line.startswith(PROMPTS)], model)
    assert [dict(vars(each)) for each in model._module.modules()] == modules, "nothing is left on the model"
    if REWRITE:
        file.write_text(now)
    else:
        assert without_fractions(now) == without_fractions(before)
        assert fractions(now) == pytest.approx(fractions(before), rel=2e-2, abs=2e-3)


def test_every_transcript_is_compared():
    assert {path.relative_to(FOLDER) for path in FOLDER.rglob("*.txt")} == {
        Path(kind, f"{call}.txt") for kind in ("tiny", "real") for call in CALLS
    }


PROMPTS = (">>> ", "...")


def typed(lines, model):
    """Each line, and what Python's shell shows when it is typed."""
    names = {"__name__": "__main__", "model": model, "torch": torch}
    names |= {name: getattr(nnsight_eager, name) for name in ("has_nan", "has_inf", "norm_above", "shape_is")}
    shell, shown = InteractiveConsole(names), io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: shown.write(f"{type(message).__name__}: {message}\n")
        for line in lines:
            shown.write(f"{line.rstrip()}\n")
            shell.push(line[4:])
        session = shown.getvalue()
        names.clear()
        builtins._ = None  # what the shell has shown last
    return "".join(f"{line.rstrip()}\n" for line in session.replace(str(FOLDER.parent.parent), "…").splitlines())


def without_fractions(text):
    """The text, with its numbers that have a fraction, the width of columns, and the numbers of source lines left out."""
    text = re.sub(r"(\.py:)\d+", r"\1…", text)
    text = re.sub(r"^([▶ ] +)\d+(  )", r"\1…\2", text, flags=re.MULTILINE)
    text = re.sub(r"[━─┳╇┻┯┴]{2,}", "─", text)
    return re.sub(r" +", " ", FRACTION.sub("#", text))


def fractions(text):
    return [float(each) for each in FRACTION.findall(text)]
