"""The small models of these tests, their inputs, and how to run a script that imports the package under test."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import nnsight_eager

FOLDER = Path(nnsight_eager.__file__).parent.parent

BEGIN = """
import torch
from nnsight_eager import NNsight
torch.manual_seed(0)
model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4)))
x = torch.ones(1, 2)
"""


def mlp() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4))


X = torch.ones(1, 2)


class Block(torch.nn.Module):
    """A residual block of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def forward(self, x):
        return x + self.lin(x)


class Stack(torch.nn.Module):
    """Three blocks and a head, with torch's and transformers' usual names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = torch.nn.ModuleList(Block() for _ in range(3))
        self.head = torch.nn.Linear(4, 4)
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, x):
        for block in self.h:
            x = block(x)
        return self.head(x)

    def generate(self, x, steps=3):
        """What a generation does: one forward after another."""
        for _ in range(steps):
            x = self(x)
        return x


X4 = torch.arange(4.0).reshape(1, 4)


def hooked(module, call, *names):
    """Each named submodule's outputs during `call()`, one per visit, taken with plain forward hooks."""
    taken = {name: [] for name in names}
    handles = [
        module.get_submodule(name).register_forward_hook(lambda *a, name=name: taken[name].append(a[2])) for name in names
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return [taken[name] for name in names]


def run_python(*arguments, stdin="", folder=None, seconds=120, **environment):
    """Run Python on the arguments with the package under test; what it printed, and an error where it failed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        input=stdin,
        cwd=folder or FOLDER,  # Python looks for modules here first
        env={**os.environ, "PYTHONPATH": str(FOLDER), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
