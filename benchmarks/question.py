"""The command line that the scripts share, and the peers that need a process of their own.

    def cases(asked: Asked) -> Iterator[Case]:
        yield Case("Every layer's output", {"bare": bare, "plain hooks": hooks, "nnsight_eager": ours}, asked.rounds(2000))

    if __name__ == "__main__":
        answer(__doc__, cases, apart=("nnsight",))

A peer that changes the process is measured in one of its own, against its own baselines: nnsight mounts a method on `object`
(where it was imported and traced, a bare forward took 12 % longer), torchlens wraps every function of torch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what counts bytes warns of those that were there before
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from plots import plot
from report import Row, Table, header, in_series, merged, read, write
from timing import Clock, Ways, medians, memory

PEER = next((each.removeprefix("--peer=") for each in sys.argv if each.startswith("--peer=")), "")
"""The one peer that this process is for, which a script imports at once; "" in the process that measures everything else."""
RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    """The same work done in several ways, of which the first is the baseline.

    Cases of one title that differ in `at` are a series, shown as one table and one plot: how a cost grows with `axis`.
    """

    title: str
    ways: Ways
    rounds: int
    at: int | None = None
    axis: str = ""
    twice: bool = True
    memory: bool = True
    clock: Clock = time.process_time


class Asked(NamedTuple):
    """What this process is to measure."""

    quick: bool
    at_most: int | None

    def rounds(self, number: int) -> int:
        """How many rounds to take, where `number` give a steady median."""
        return 1 if self.quick else min(number, self.at_most or number)

    def has(self, peer: str) -> bool:
        """Whether a peer that shares the process of everything else is measured here."""
        return not PEER and find_spec(peer) is not None


Cases = Callable[[Asked], Iterator[Case]]


def answer(description: str | None, cases: Cases, apart: Sequence[str] = (), within: Sequence[str] = ()) -> None:
    """Measure, print the tables, and write them with their plots; `apart` and `within` are the peers that take part."""
    script = Path(sys.argv[0])
    given = arguments(description)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with torch.no_grad():
        tables = in_series([measured(case) for case in cases(Asked(given.quick, given.rounds))])
    if PEER:
        write(given.out / f"{PEER}.json", tables)
        return
    missing = [peer for peer in (*apart, *within) if find_spec(peer) is None]
    for peer in (peer for peer in apart if peer not in missing):
        tables = merged(tables, in_process_of(peer, script, given))
    print(header())
    for peer in missing:
        print(f"{peer} is not installed and left out: pip install -e '.[bench]'")
    for table in tables:
        print(f"\n{table.markdown()}")
    given.out.mkdir(parents=True, exist_ok=True)
    write(given.out / f"{script.stem}.json", tables)
    plot(tables, given.out / f"{script.stem}.png")


def arguments(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models and one round: whether it runs, in seconds")
    parser.add_argument("--rounds", type=int, help="at most so many rounds of each case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the plot and the JSON file")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(case: Case) -> Table:
    """What the ways of a case take."""
    baseline, *_ = case.ways
    if case.memory:
        needs = {name: memory(way) for name, way in case.ways.items()}
    else:
        needs = {}
        for way in case.ways.values() if case.rounds > 1 else ():
            way()  # what the first time alone takes is not looked at
    times = medians(case.ways, case.rounds, case.twice, case.clock)
    rows = [
        Row(name, time, times[baseline], times.get("plain hooks"), needs.get(name), needs.get(baseline), case.at)
        for name, time in times.items()
    ]
    return Table(case.title, case.axis, case.rounds, rows)


def in_process_of(peer: str, script: Path, given: argparse.Namespace) -> list[Table]:
    """What the script measures of a peer in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*(["--quick"] if given.quick else []), *([f"--rounds={given.rounds}"] if given.rounds else [])]
        command = [sys.executable, str(script), f"--peer={peer}", f"--out={folder}", *options]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return read(Path(folder) / f"{peer}.json")
