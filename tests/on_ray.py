"""A cluster of this machine that serves a model by the command of the README, and ends with all its processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from small_models import FOLDER


def below(process):
    """The processes that a process has begun, directly or not."""
    found = [process]
    for parent in found:
        for each in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(each.read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(each.parent.name))
    return found[1:]


def alive(process):
    """Whether a process runs, and is not one that has ended and that nobody has asked about."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def serving(folder, name, where, *options):
    """Serve a model in a folder under a name; the address, and the process of the command."""
    command = [sys.executable, "-m", "nnsight_eager", "serve", str(folder), "--name", name, "--cluster-cpus", "4"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    arguments = [*command, "--store-mb", "100", *options]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment, cwd=where)
    try:
        line = server.stdout.readline()
        found = re.search(rf'`{name}` is served: nnsight_eager.connect\("{name}", address="(127\.0\.0\.1:\d+)"\)', line)
        assert found, line
        yield found[1], server.pid
    finally:
        from nnsight_eager.remote import cluster

        cluster.leave()
        processes = below(server.pid)
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        finally:
            until = time.monotonic() + 20
            while any(map(alive, processes)) and time.monotonic() < until:
                time.sleep(0.1)
            left = [each for each in processes if alive(each)]
            for each in [*left, server.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            server.stdout.close()
    assert not left
