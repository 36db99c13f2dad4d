"""The sweep over all architectures: `python -m tests.architectures --out architectures.md`."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .table import Row, architectures, looked_at


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description="Compare traces with plain hooks.")
    parser.add_argument("--out", type=Path, default=Path("architectures.md"), help="where the table is written")
    parser.add_argument("--zeroed", type=int, default=12, help="how many modules of each architecture are zeroed")
    parser.add_argument("--only", nargs="*", help="architectures, by their names in transformers")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    rows = swept(options.only, options.zeroed)
    options.out.write_text(as_text(rows, time.monotonic() - begun))
    print(f"{summary(rows)} The table is in {options.out}.")
    return 0 if rows and all(row.result != "differs" for row in rows) else 1


def swept(only: Sequence[str] | None, zeroed: int) -> list[Row]:
    """A row for each architecture, with a progress bar."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")  # the models' own, of random weights and short inputs
    torch.set_num_threads(1)
    chosen = [each for each in architectures() if not only or each[1] in only]
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows = []
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for family, name in chosen:
            progress.update(task, description=name)
            rows.append(looked_at(family, name, zeroed))
            progress.advance(task)
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The counts."""
    equal = sum(row.result == "equal" for row in rows)
    rows = [row for row in rows if row.result != "not run"]
    steps = sum(row.steps > 0 for row in rows)
    return (
        f"{len(rows)} models of {len({row.architecture for row in rows})} architectures, {equal} equal to plain hooks: "
        f"{sum(row.modules for row in rows)} modules, {sum(row.compared for row in rows)} values compared, "
        f"{sum(row.zeroed for row in rows)} zeroed, {sum(row.patterns for row in rows)} kinds of attention patterns; "
        f"{steps} generate."
    )


def as_text(rows: Sequence[Row], seconds: float) -> str:
    """The table as Markdown."""
    names = [name.replace("_", " ") for name in Row._fields]
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}, {seconds:.0f} s",
        "",
        summary(rows),
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(f"| {' | '.join(str(value).replace('|', '/') for value in row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
