"""A program in a terminal of its own, typed into line by line as a person does."""

import os
import re
import signal
import sys
from contextlib import contextmanager

import pexpect
from small_models import FOLDER

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\].*?\x07|\r")


class Terminal:
    """`shown = terminal("n")` types a line and gives what is shown until the next prompt."""

    def __init__(self, arguments, prompt, environment):
        self.prompt = prompt
        self.child = pexpect.spawn(
            sys.executable,
            [*map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(FOLDER), "TERM": "dumb", "OMP_NUM_THREADS": "1", **environment},
            encoding="utf-8",
            timeout=40,
            dimensions=(60, 160),
        )
        self.begun = self.until(prompt)

    def __call__(self, line):
        self.child.sendline(line)
        shown = self.until(self.prompt)
        return shown.partition("\n")[2]  # the line itself is echoed

    def until(self, pattern):
        self.child.expect(pattern)
        return CODES.sub("", self.child.before)

    def ends_with(self, line):
        """What is shown when the line has ended the program."""
        self.child.sendline(line)
        shown = self.until(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == 0, shown
        return shown.partition("\n")[2]


@contextmanager
def terminal(*arguments, prompt, **environment):
    running = Terminal(arguments, prompt, environment)
    try:
        yield running
    finally:
        if running.child.isalive():  # it is asked first, and what it has to write at its end is written
            running.child.kill(signal.SIGTERM)
            running.child.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=10)
        running.child.close(force=True)


def ipython(tmp_path, *options, prompt=r"\r\n(In \[\d+\]: |ipdb> )", **environment):
    """IPython, with settings of nobody's."""
    arguments = ["-m", "IPython", "--no-banner", "--no-confirm-exit", "--colors=nocolor", "--HistoryManager.enabled=False"]
    environment = {"IPYTHONDIR": str(tmp_path), **environment}
    return terminal(*arguments, *options, prompt=prompt, **environment)
