"""Coverage sees the lines of the body, those behind the block, and those of the model's own forward."""

import coverage
import pytest
from small_models import run_python

MODEL = """\
import torch


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(2, 2)

    def forward(self, x):
        y = self.lin(x)  # seen
        if y.shape[0] > 1:
            y = y * 0  # never
        z = y + 1  # seen
        return z  # seen


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Inner()
        self.b = Inner()

    def forward(self, x):
        p = self.a(x)  # seen
        q = p * 2  # seen
        r = self.b(q)  # seen
        return r  # seen
"""

BEGIN = """\
import asyncio
import threading

import torch
from inner_and_outer import Outer
from nnsight_eager import NNsight

model = NNsight(Outer())
x = torch.ones(1, 2)


def helper(hidden):
    doubled = hidden * 2  # seen
    return doubled  # seen


"""

BODIES = {
    "a block": """
def body():
    with model.trace(x) as tracer:  # seen
        hidden = model.a.lin.output  # seen
        kept = helper(hidden)  # seen
        if kept.shape[0] > 1:  # seen
            kept = None  # never
        other = model.b.lin.output  # seen
    behind = helper(other)  # seen
    return tracer.result, behind  # seen
""",
    "a stopped block": """
def body():
    with model.trace(x) as tracer:  # seen
        hidden = model.b.output  # seen
        tracer.stop()  # seen
        hidden = None  # never
    behind = helper(hidden)  # seen
    model._module(x)
    return behind  # seen
""",
    "nested blocks": """
def body():
    with model.trace(x):  # seen
        hidden = model.a.lin.output  # seen
        with model.trace(2 * x) as tracer:  # seen
            tracer.model.b.output = model.a.output  # seen
        between = helper(hidden)  # seen
        hidden = model.b.output  # seen
    return between, hidden  # seen
""",
    "a block left by an error": """
def body():
    helper(x)
    try:
        with model.trace(x):  # seen
            hidden = model.b.lin.output  # seen
            raise KeyError(hidden)  # seen
    except KeyError:
        behind = True  # seen
    model._module(x)
    return behind  # seen
""",
    "tasks": """
async def task():
    with model.trace(x):  # seen
        hidden = model.a.lin.output  # seen
        await asyncio.sleep(0)  # seen
        other = model.b.lin.output  # seen
    return helper(hidden), other  # seen


async def tasks():
    read = await asyncio.gather(*(task() for _ in range(3)))  # seen
    return read  # seen


def body():
    answers = asyncio.run(tasks())  # seen
    return answers  # seen
""",
    "a thread": """
def read():
    with model.trace(x):  # seen
        hidden = model.b.lin.output  # seen
    return helper(hidden)  # seen


def body():
    thread = threading.Thread(target=read)  # seen
    thread.start()  # seen
    thread.join()  # seen
""",
}

END = """

body()
body()
end = True  # seen
"""


@pytest.fixture
def covered(tmp_path):
    """Run a script and its model under coverage; the lines it saw of each, beside their text."""

    def covered(script, *options):
        files = {tmp_path / "inner_and_outer.py": MODEL, tmp_path / "script.py": script}
        for file, text in files.items():
            file.write_text(text)
        data_file = tmp_path / "data"
        run_python(
            *["-m", "coverage", "run", "--rcfile=/dev/null", f"--data-file={data_file}", f"--include={tmp_path}/*"],
            *options,
            tmp_path / "script.py",
            folder=tmp_path,
            COVERAGE_PROCESS_START="",
        )
        data = coverage.CoverageData(basename=str(data_file))
        data.read()
        return {text: set(data.lines(str(file)) or ()) for file, text in files.items()}

    return covered


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
    ("body", "options"),
    [
        *((body, ()) for body in BODIES),
        ("nested blocks", ("--branch",)),
        ("nested blocks", ("--concurrency=greenlet,thread",)),
    ],
)
def test_coverage_sees_the_body_what_is_behind_it_and_the_models_forward(covered, body, options):
    for text, seen in covered(BEGIN + BODIES[body] + END, *options).items():
        assert sorted(marked(text, "seen") - seen) == []
        assert sorted(marked(text, "never") & seen) == []
        assert sorted(seen - code_lines(text)) == [], "lines of one file are noted for the other"
