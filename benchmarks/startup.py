"""How long before the first value? The import, wrapping a model of 10,000 modules, and its first trace.

python benchmarks/startup.py [--quick]

An import is timed in a process of its own, torch's first; ours also with the class that one begins with, since a name is
imported where it is first used. Where Python collects torch's garbage meanwhile, that is 80 ms of it.
"""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from models import mlp, with_hooks
from question import PEER, Asked, Case, answer
from timing import Seconds, Way, Ways

from nnsight_eager import NNsight

if PEER == "nnsight":
    import nnsight

IMPORTED = {
    "nnsight_eager": "import nnsight_eager",
    "nnsight_eager, with LanguageModel": "from nnsight_eager import LanguageModel",
    "nnsight": "import nnsight",
    "pyvene": "import pyvene",
    "torchlens": "import torchlens",
    "transformer_lens": "import transformer_lens.model_bridge",
}


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    if not PEER:
        names = [name for name in IMPORTED if find_spec(name.split(",")[0]) is not None][: 2 if asked.quick else None]
        ways = {"torch": importing("")} | {name: importing(IMPORTED[name]) for name in names}
        yield Case("Import torch and the package", ways, asked.rounds(10), twice=False, memory=False)
    modules = 100 if asked.quick else 10_000
    model, x = mlp(modules, 4), torch.randn(1, 4)
    yield Case(f"Wrap a model of {modules:,} modules", wrapping(model), asked.rounds(20), twice=False, memory=False)
    yield Case(
        f"Wrap it and read one output in the first trace, {modules:,} modules",
        first(model, x),
        asked.rounds(5),
        twice=False,
        memory=False,
    )


def importing(statement: str) -> Way:
    """The import of torch, and then of what the statement names, in a new process: the processor's time."""
    code = f"import time\nbegan = time.process_time()\nimport torch\n{statement}\nprint(time.process_time() - began)"

    def way() -> Seconds:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        return Seconds(done.stdout.split()[-1])

    return way


def wrapping(model: torch.nn.Sequential) -> Ways:
    """Making what a trace is opened on; the baseline goes over all modules once, as a tree has to."""
    ways: Ways = {"bare": lambda: list(model.named_modules())}
    if PEER:
        return ways | {"nnsight": lambda: nnsight.NNsight(model)}
    return ways | {"nnsight_eager": lambda: NNsight(model)}


def first(model: torch.nn.Sequential, x: torch.Tensor) -> Ways:
    """From the module to the first value."""
    middle = len(model) // 2
    ways: Ways = {"bare": lambda: model(x), "plain hooks": lambda: with_hooks([model[middle]], lambda: model(x))}
    if PEER:

        def theirs() -> torch.Tensor:
            peer = nnsight.NNsight(model)
            with peer.trace(x):
                value = nnsight.save(peer[middle].output)
            return value

        return ways | {"nnsight": theirs}

    def ours() -> torch.Tensor:
        twin = NNsight(model)
        with twin.trace(x):
            value = twin[middle].output
        return value

    return ways | {"nnsight_eager": ours}


if __name__ == "__main__":
    answer(__doc__, cases, apart=("nnsight",))
