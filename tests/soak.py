"""Random programs with a fault each, many threads and tasks on one model, and memory over many traces that fail.

    python -m tests.soak --programs 20000                # half of them with a fixed seed, half with a fresh one
    python -m tests.soak --seed 7 --first 1081 --programs 1 --threads 0 --tasks 0 --traces 0       # one program again

Prints a table and what was broken; the exit status is 1 where anything was.
"""

import argparse
import asyncio
import contextlib
import gc
import platform
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # pytest does so too: the files of this folder import each other by name

import greenlet
import psutil
import torch
from faults import AROUND, Program, only_new_objects
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from subjects import WIDTH, net, subjects

WARM_UP = 500
"""After so many traces memory is to stay as it is."""
LIMIT = 5e6
"""By how many bytes it may grow."""
TRACES_OF_A_THREAD = 500


class Programs:
    """How many programs have run, what has happened in them, and what did not hold."""

    def __init__(self, subjects):
        self.subjects, self.ran, self.faults, self.broken = subjects, 0, Counter(), []

    def run(self, seed, number):
        """One program, which its seed and number tell."""
        numbers = random.Random(f"{seed}:{number}")
        program = Program(numbers.choice(self.subjects), numbers)
        self.ran += 1
        found = program.broken()
        fault = program.fault
        if fault.happened or program.interrupted:
            kind = "Ctrl-C" if program.interrupted else fault.kind
            self.faults[fault.place, kind] += 1
        if found:
            self.broken.append(f"--seed {seed} --first {number}: {program}: {'; '.join(found)}")

    def table(self):
        """How often each kind of fault has happened in each place."""
        places, kinds = (sorted({key[i] for key in self.faults}) for i in range(2))
        table = Table("faults in", *kinds)
        for place in places:
            table.add_row(place, *(f"{self.faults[place, kind]:,}" for kind in kinds))
        return table


def computed(module, x, factor):
    """What a trace that multiplies the first layer by `factor` sees of it, and gives: by plain calls."""
    hidden = module.h[0](x)
    return hidden, module.head(module.norm(module.h[1](module.norm(hidden * factor))))


def on_threads(threads, traces, advance):
    """So many threads, each with so many traces of one model; how many values were wrong."""
    model = net().model
    before = [[*each.__dict__] for each in model._module.modules()]

    def work(number):
        generator, wrong = torch.Generator().manual_seed(number), 0
        for turn in range(traces):
            x, factor = torch.randn(3, WIDTH, generator=generator), number + turn / traces
            with model.trace(x) as tracer:
                seen = model.h[0].output
                model.h[0].output = seen * factor
                logits = model.head.output
            hidden, result = computed(model._module, x, factor)
            wrong += not (torch.equal(seen, hidden) and torch.equal(logits, result) and torch.equal(tracer.result, result))
            advance()
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        wrong = sum(pool.map(work, range(threads)))
    return wrong + (before != [[*each.__dict__] for each in model._module.modules()])


def in_tasks(tasks, advance):
    """So many tasks, which take turns in the middle of their traces of one model; how many saw a wrong value."""
    model = net().model

    async def one(number):
        numbers = random.Random(number)
        x, factor = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(number)), numbers.uniform(-2, 2)

        async def others():
            for _ in range(numbers.randrange(4)):
                await asyncio.sleep(0)

        await others()
        with model.trace(x) as tracer:
            await others()
            seen = model.h[0].output
            await others()
            model.h[0].output = seen * factor
            await others()
            logits = model.head.output
            await others()
        hidden, result = computed(model._module, x, factor)
        advance()
        return not (torch.equal(seen, hidden) and torch.equal(logits, result) and torch.equal(tracer.result, result))

    async def all_of_them():
        return sum(await asyncio.gather(*map(one, range(tasks))))

    return asyncio.run(all_of_them())


def memory_over(traces, seed, subjects, advance):
    """By how many bytes resident memory grows over so many traces that fail at random, the first ones left out."""
    process, begun_with = psutil.Process(), 0
    for number in range(traces):
        if number == WARM_UP:
            gc.collect()
            begun_with = process.memory_info().rss
        numbers = random.Random(f"{seed}:memory:{number}")
        program = Program(numbers.choice(subjects), numbers, places=["body", "forward", "watcher", "edit", "hook"])
        with AROUND[program.around](), contextlib.suppress(KeyboardInterrupt):
            program.outcome()
        program.end()
        advance()
    gc.collect()
    return process.memory_info().rss - begun_with if traces > WARM_UP else 0


def parsed(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=20_000, help="random programs with a fault each (%(default)s)")
    parser.add_argument("--threads", type=int, default=16, help=f"threads, of {TRACES_OF_A_THREAD} traces each (%(default)s)")
    parser.add_argument("--tasks", type=int, default=200, help="asyncio tasks (%(default)s)")
    parser.add_argument("--traces", type=int, default=10_000, help="traces over which memory is looked at (%(default)s)")
    parser.add_argument("--seed", type=int, help="of all programs; else half have seed 0, and half a fresh one")
    parser.add_argument("--first", type=int, default=0, help="the number of the first program (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments=None, console=None):
    """Run everything; the exit status."""
    options = parsed(arguments)
    console = console or Console()
    torch.set_num_threads(1)
    fresh = random.SystemRandom().randrange(10**6)
    seeds = [0, fresh] if options.seed is None else [options.seed]
    models, table = subjects(), Table("what", "how many", "broken", "seconds")
    wrong = []

    def row(what, count, broken, begun):
        table.add_row(what, count, broken, f"{time.monotonic() - begun:.0f}")

    with Progress(console=console, disable=not console.is_terminal) as progress:

        def shown(what, total):
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        begun, done = time.monotonic(), Programs(models)
        with only_new_objects():
            for seed in seeds:
                count = options.programs // len(seeds)
                advance = shown(f"programs, seed {seed}", count)
                for number in range(options.first, options.first + count):
                    done.run(seed, number)
                    advance()
        row(f"programs, seeds {' and '.join(map(str, seeds))}", f"{done.ran:,}", str(len(done.broken)), begun)
        wrong += done.broken

        if options.threads:
            begun, each = time.monotonic(), TRACES_OF_A_THREAD
            broken = on_threads(options.threads, each, shown("threads", options.threads * each))
            row("threads on one model", f"{options.threads} with {each} traces each", str(broken), begun)
            wrong += [f"{broken} wrong on threads"] * bool(broken)
        if options.tasks:
            begun = time.monotonic()
            broken = in_tasks(options.tasks, shown("tasks", options.tasks))
            row("asyncio tasks on one model", str(options.tasks), str(broken), begun)
            wrong += [f"{broken} wrong in tasks"] * bool(broken)
        if options.traces:
            begun = time.monotonic()
            with only_new_objects():
                grown = memory_over(options.traces, seeds[-1], models, shown("memory", options.traces))
            row(f"traces with errors, memory after {WARM_UP}", f"{options.traces:,}", f"{grown / 1e6:+.1f} MB", begun)
            wrong += [f"memory has grown by {grown / 1e6:.1f} MB"] * (grown > LIMIT)

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, greenlet {greenlet.__version__}"
    for each in (versions, table, done.table(), *wrong):
        console.print(each, markup=False, soft_wrap=isinstance(each, str))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
