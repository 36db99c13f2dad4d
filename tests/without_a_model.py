"""A trace without a model: its blocks are taken as a trace's are, and run when it ends, taking turns where they wait."""

import contextlib
import itertools
import linecache
import sys

from greenlet import getcurrent, greenlet

from nnsight_eager.blocks import ENTERED, find
from nnsight_eager.names import Names, begin, end
from nnsight_eager.skipping import Skipping


class Waiting(Exception):
    """No block can go on."""


class Together:
    """`with Together() as t:` and in it `with t.invoke():`, as often as one likes."""

    def __init__(self):
        self.blocks = []

    def __enter__(self):
        return self

    def invoke(self, value=None):
        """A block, whose `as` target gets the value."""
        return Taken(self, value)

    def __exit__(self, kind, error, traceback):
        if error is not None:
            return
        names = [block.names for block in self.blocks]
        try:
            begin(names)
            self.run()
        finally:
            end(names)

    def run(self):
        """Let the blocks go on, in the order written, until all have ended."""
        while waiting := [block for block in self.blocks if not block.stack.dead]:
            able = [block for block in waiting if block.ready()]
            if not able:
                raise Waiting("; ".join(f"{block.names._label} waits for {block.waits_for}" for block in waiting))
            able[0].stack.switch()

    def wait(self, ready, waits_for):
        """In a block: let the others go on until it can."""
        block = next(block for block in self.blocks if block.stack is getcurrent())
        block.ready, block.waits_for = ready, waits_for
        while not ready():
            getcurrent().parent.switch()

    def let_others_run(self):
        """In a block: go on when every other has ended, or waits."""
        block = next(block for block in self.blocks if block.stack is getcurrent())
        self.wait(lambda: not any(each.ready() for each in self.blocks if each is not block and not each.stack.dead), "others")


class Taken:
    """A block that is left out where it stands."""

    def __init__(self, together, value):
        self.together, self.value = together, value
        self.ready, self.waits_for = lambda: True, ""

    def __enter__(self):
        self.frame = sys._getframe(1)
        self.statement = find(self.frame)
        self.skipping = Skipping(self.frame)
        return self.value

    def __exit__(self, kind, error, traceback):
        assert self.skipping.end(error), "the block ran where it stands"
        if self.statement.target is not None:
            target = Names(self.statement.target, self.frame, self.together.wait, "target")
            target.bound[ENTERED] = self.value
            target.run()
            end([target])
        self.names = Names(self.statement.body, self.frame, self.together.wait, f"block {len(self.together.blocks) + 1}")
        self.stack = greenlet(self.names.run)
        self.names.frame = lambda: self.stack.gr_frame
        self.together.blocks.append(self)
        return True


class InPlace:
    """What Python itself does: blocks run where they stand."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def invoke(self, value=None):
        """A block that runs now."""
        return contextlib.nullcontext(value)


numbers = itertools.count()


def execute(text, together=Together, into=None, local=None, **names):
    """Run a module, whose text is found as a notebook cell's is; its names, which are those of `into` where that is given."""
    filename = f"<cell {next(numbers)}>"
    linecache.cache[filename] = len(text), None, text.splitlines(True), filename
    names = {"__name__": "a_module", "Together": together, **names} if into is None else into
    exec(compile(text, filename, "exec", dont_inherit=True), names, local)
    return names


PLAIN = bool, int, float, str, bytes, list, tuple, set, dict, type(None)


def values(names):
    """The names that have a plain value, and no other."""
    return {name: value for name, value in names.items() if isinstance(value, PLAIN) and not name.startswith("__")}
