"""The tests in the environments that people have: each is made with venv and pip, and what could not be made is said.

    python -m tests.versions                              # all of them; a table at the end
    python -m tests.versions "greenlet" --keep folder     # those with this in their name; the environments stay there

Pythons are looked for on the path and with pyenv. The exit status is 1 where a test has failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = ["alone", "blocks", "names", "skipping", "rewriting", "fence", "entering", "architecture"]
OF_TRANSFORMERS = [
    "seed",
    "language",
    "generation",
    "inputs",
    "lens",
    "padding",
    "nested",
    "invokes",
    "invoke_programs",
    "invokes_on_architectures",
    "attention",
    "edits",
    "cache",
    "lending",
    "operations",
    "source",
    "aliases",
    "adapters",
    "asynchrony",
    "offloaded_and_quantized",
    "circumstances",
]
OF_THE_CORE = [
    "alone",
    "coroutine",
    "fence",
    "stacks",
    "torch_state",
    "taps",
    "forward_hooks",
    "clean_up",
    "memory",
    "interrupts",
    "threads",
    "control_flow_in_the_body",
    "programs",
    "invoke_programs",
    "backward",
    "soak",
    "circumstances",
]
OF_TORCH = [*OF_THE_CORE, "compiled", "distributed", "unusual_modules", "scan", "attention"]
TORCH = "torch==2.13.0"
GIGABYTES = {"torch==2.14.1": 20}
"""What takes that much room on the disk while it is installed."""


IN_A_PROCESS_WITH_TORCH = [
    "fence.py::test_two_thousand_torch_errors_on_stacks_of_any_depth_leave_the_process_alive",
    "fence.py::test_without_the_fence_the_same_errors_kill_the_process",
    "entering.py::test_a_call_is_told_where_the_code_was_started_by_the_command_line",
    "architecture.py::test_what_the_package_has_for_everybody_imports_neither_ipython_nor_transformers",
]
"""Tests that start a Python which computes with torch."""


class Environment(NamedTuple):
    """A Python, what is installed for it, and the tests it is to pass."""

    name: str
    python: str
    packages: tuple[str, ...]
    tests: list[str]

    @property
    def has_torch(self):
        return any(each.startswith("torch") for each in self.packages)


TESTS_NEED = ("pytest>=8.4", "hypothesis>=6.100", "psutil>=6", "gguf==0.19.0", "peft>=0.17", "coverage>=7.6", "ipython>=9")
USUAL = ("transformers>=5", "greenlet", "accelerate>=1.10", "lazy_loader>=0.4", "rich>=13", *TESTS_NEED)
EARLIER = ("transformers>=4.57,<4.58", *USUAL[1:])
ALONE = ("greenlet", "lazy_loader>=0.4", "rich>=13", "pytest>=8.4")
ENVIRONMENTS = [
    Environment("transformers 4.57", "3.11", (TORCH, *EARLIER), OF_TRANSFORMERS),
    Environment("transformers 5, torchao", "3.11", (TORCH, *USUAL, "torchao>=0.18"), OF_TRANSFORMERS),
    Environment("the oldest greenlet, 3.1.0", "3.11", (TORCH, *USUAL, "greenlet==3.1.0"), OF_THE_CORE),
    Environment("torch 2.14.1", "3.11", ("torch==2.14.1", *USUAL), OF_TORCH),
    Environment("Python 3.12 without torch", "3.12", ALONE, WITHOUT_TORCH),
    Environment("Python 3.13 without torch", "3.13", ALONE, WITHOUT_TORCH),
    Environment("Python 3.12, greenlet 3.1.0", "3.12", (*ALONE, "greenlet==3.1.0"), WITHOUT_TORCH),
    Environment("Python 3.13, greenlet 3.1.0", "3.13", (*ALONE, "greenlet==3.1.0"), WITHOUT_TORCH),
]


class NotMadeError(Exception):
    """Why an environment could not be made."""


def interpreter(version):
    """The Python of that version."""
    found = shutil.which(f"python{version}")
    for root in (Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions",):
        for each in sorted(root.glob(f"{version}.*/bin/python")):
            found = str(each)
    if found is None or subprocess.run([found, "--version"], capture_output=True, check=False).returncode:
        raise NotMadeError(f"there is no Python {version} here")
    return found


def made(environment, folder):
    """Make the environment; its Python."""
    for package in environment.packages:
        free, needed = shutil.disk_usage(folder).free / 1e9, GIGABYTES.get(package, 0)
        if free < needed:
            raise NotMadeError(f"{package} needs {needed} GB while it is installed, and {free:.0f} are free")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter(environment.python), "-m", "venv", str(folder)], check=True, capture_output=True)
        # torch first and alone: a range that allows a newer one pulls gigabytes of CUDA.
        torch = [each for each in environment.packages if each.startswith("torch=")]
        others = [each for each in environment.packages if each not in torch and each != "greenlet"]
        others += [] if any(each.startswith("greenlet=") for each in others) else ["greenlet"]
        for packages in filter(None, (torch, [*torch, *others])):
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotMadeError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
    return str(python)


def versions_in(python, names=("python", "torch", "transformers", "greenlet")):
    """What is installed, in a line."""
    code = """if True:
        import importlib.metadata as metadata, platform, sys
        said = [f"Python {platform.python_version()}"]
        for name in sys.argv[1:]:
            try:
                said.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                pass
        print(", ".join(said))"""
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.strip()


def passed(environment, python):
    """Run the tests; pytest's last line, and whether all have passed."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in environment.tests]
    path = [str(ROOT)] if environment.has_torch else [str(ROOT / "tests" / "no_torch"), str(ROOT)]
    options = ["--noconftest", *(f"--deselect=tests/test_{each}" for each in IN_A_PROCESS_WITH_TORCH)]
    options = [] if environment.has_torch else options
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([lines[-1].strip("= "), *failed]), not done.returncode


def main(arguments=None):
    """Make each environment and run its tests; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="", help="only environments with this in their name")
    parser.add_argument("--keep", type=Path, help="where environments are made, and stay")
    options = parser.parse_args(arguments)
    console, table, right = Console(), Table("environment", "versions", "result"), True
    with tempfile.TemporaryDirectory() as temporary:
        for environment in ENVIRONMENTS:
            if options.name not in environment.name:
                continue
            folder = (options.keep or Path(temporary)) / environment.name.replace(" ", "-").replace(",", "")
            folder.mkdir(parents=True, exist_ok=True)
            with console.status(environment.name):
                try:
                    python = made(environment, folder)
                except NotMadeError as error:
                    table.add_row(environment.name, "", f"not made: {error}")
                    continue
                result, all_passed = passed(environment, python)
            right &= all_passed
            table.add_row(environment.name, versions_in(python), result)
            console.print(f"{environment.name}: {result}", markup=False, soft_wrap=True)
    console.print(table)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
