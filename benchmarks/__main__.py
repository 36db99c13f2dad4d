"""Every benchmark, each in a process of its own, and what they found in one table.

python -m benchmarks                            # tables; plots and JSON files in `benchmarks/results`
python -m benchmarks overhead cache --quick     # two of them, in a short form
python -m benchmarks --markdown                 # at the end also the tables of the README
python -m benchmarks --markdown --shown         # those of what was measured before
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # where the scripts find what they share

from report import read  # noqa: E402
from summary import summary  # noqa: E402

NAMES = ("overhead", "generation", "batches", "cache", "patching", "extraction", "startup", "stepping")


def main() -> int:
    """Run them; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all of them where none is named")
    parser.add_argument("--quick", action="store_true", help="small models and one round: whether it runs, in seconds")
    parser.add_argument("--rounds", type=int, help="at most so many rounds of each case")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for the plots and the JSON files")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the README")
    parser.add_argument("--shown", action="store_true", help="measure nothing, and take what is in the folder")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no {unknown[0]!r}; there is {', '.join(NAMES)}")
    options = [*(["--quick"] if given.quick else []), *([f"--rounds={given.rounds}"] if given.rounds else [])]
    failed = []
    for name in given.names or NAMES:
        if not given.shown:
            print(f"\n## {name}\n", flush=True)
            command = [sys.executable, str(HERE / f"{name}.py"), f"--out={given.out}", *options]
            if subprocess.run(command, check=False).returncode:
                failed.append(name)
    if given.markdown:
        print(f"\n{summary({name: read(path) for name in NAMES if (path := given.out / f'{name}.json').exists()})}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
