"""What the benchmarks share: interleaved timing, tables, and a peer in a process of its own."""

import argparse
import importlib.util
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

Ways = dict[str, Callable[[], object]]
PEER = "--peer" in sys.argv
"""Whether this is the process in which nnsight is measured, against its own baselines."""


def arguments(description: str | None, rounds: int) -> int:
    """The command line of a benchmark: the rounds of its smallest case."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of the smallest case; others may take fewer")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    warnings.filterwarnings("ignore", module="nnsight")
    return parser.parse_args().rounds


def median_times(ways: Ways, rounds: int) -> dict[str, float]:
    """The median time of each way, in microseconds, over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    order = list(ways.items())
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name, way in order:
            way()  # untimed: a way does not pay for what the one before has left
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e6 for name, each in times.items()}


def print_table(title: str, ways: Ways, rounds: int) -> None:
    """One markdown table; the first way is the bare one."""
    times = median_times(ways, rounds)
    bare, *_ = times.values()
    hooks = times["plain hooks"] - bare
    print(f"\n{title}, {rounds} rounds\n")
    print("| way | median | of bare | added | of hooks |")
    print("|---|---:|---:|---:|---:|")
    for name, each in times.items():
        added = each - bare
        ratio = f"{added / hooks:.2f}" if name not in ("wrapped, idle",) and added else "" if added else "0"
        print(f"| {name} | {each:,.0f} µs | {each / bare:.3f} | {added:,.0f} µs | {ratio} |")


def installed(name: str) -> str:
    """The version of a package, or that it is missing."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def print_header() -> None:
    """The machine and the versions, once."""
    if not PEER:
        packages = ", ".join(map(installed, ("torch", "transformers", "greenlet", "nnsight")))
        print(f"{platform.machine()}, Python {platform.python_version()}, 1 thread; {packages}")


def run_peer(script: str, rounds: int) -> None:
    """Run the script once more for nnsight, where it is installed."""
    if not PEER and importlib.util.find_spec("nnsight"):
        print("\nThe same in a process with nnsight, against its own baselines", flush=True)
        subprocess.run([sys.executable, script, "--peer", f"--rounds={rounds}"], check=True)
