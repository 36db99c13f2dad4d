"""The command that serves a model: on a running cluster, or on one of this machine that it starts.

python -m nnsight_eager serve openai-community/gpt2 --name gpt2
"""

import argparse
import os
import signal
import tempfile
import threading
from typing import Any

from ..errors import RemoteError
from . import cluster
from .serving import Server
from .sessions import Limits
from .together import FirstRank


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(
        prog="python -m nnsight_eager serve",
        description="Hold a model on a Ray cluster for `nnsight_eager.connect`, until this command is ended.",
    )
    made.add_argument("model", help="a model's name or folder")
    made.add_argument("--name", required=True, help="what clients call it")
    made.add_argument("--address", help="a running cluster; one of this machine alone is started where none is given")
    made.add_argument("--cpus", type=float, default=1, help="processors to reserve for each rank (default: 1)")
    made.add_argument("--gpus", type=float, default=0, help="accelerators to reserve for each rank (default: 0)")
    made.add_argument("--cluster-cpus", type=int, help="processors of a cluster that is started (default: all)")
    made.add_argument("--store-mb", type=int, help="shared memory of a cluster that is started (default: Ray's)")
    made.add_argument("--tp", type=int, default=1, help="ranks to divide the model among, an actor each (default: 1)")
    made.add_argument("--device-map", help='as for `LanguageModel`, such as "auto"')
    made.add_argument("--dtype", help='as torch spells it, such as "bfloat16"')
    made.add_argument("--attn-implementation", help="as for `LanguageModel`")
    made.add_argument(
        "--silence-limit", type=float, default=Limits().silence, help="seconds until a client is taken for dead (default: 15)"
    )
    made.add_argument(
        "--idle-limit", type=float, default=Limits().idle, help="seconds until an untouched run is closed (default: 1800)"
    )
    made.add_argument("--memory-limit-mb", type=float, help="what one client's runs and handles may hold (default: no limit)")
    made.add_argument(
        "--batch-rows", type=int, default=Limits().rows, help="rows of a forward pass that functions may share (default: 32)"
    )
    return made


def serve(arguments: list[str]) -> int:
    """Serve until the command is ended."""
    options = parser().parse_args(arguments)
    if options.tp < 1 or (options.tp > 1 and options.device_map):
        raise RemoteError(
            f"`--tp {options.tp}`{' with `--device-map`' * bool(options.device_map)} cannot be served.",
            "`--tp N` divides each layer among N ranks, `--device-map auto` spreads layers over the devices of one actor.",
        )
    ended = threading.Event()
    with tempfile.TemporaryDirectory(prefix=f"nnsight_eager-{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        _hold(options, ended, folder)
    return 0


def _hold(options: argparse.Namespace, ended: threading.Event, folder: str) -> None:
    """Hold the model until the command is ended; the folder is there for as long."""
    try:
        address = _cluster(options)
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has put its own there
            signal.signal(number, lambda *_: ended.set())
        cluster.refuse_without_room(options.tp * options.cpus, options.tp * options.gpus)
        actor = _placed(options, folder)
        cluster.wait_for(actor, options.name, ended)
        if not ended.is_set():
            print(f'`{options.name}` is served: nnsight_eager.connect("{options.name}", address="{address}")', flush=True)
        ended.wait()
        cluster.end(actor)
    finally:
        cluster.leave()


def _placed(options: argparse.Namespace, folder: str) -> Any:
    """The actor that is served, alone or the first of several ranks."""
    given = options.model, options.name, _loading(options), _limits(options)
    each = options.cpus, options.gpus
    if options.tp == 1:
        return cluster.place(Server, options.name, given, *each)
    return cluster.place(FirstRank, options.name, (*given, options.tp, *each, folder), *each)


def _cluster(options: argparse.Namespace) -> str:
    if options.address:
        cluster.join(options.address)
        return str(options.address)
    store = None if options.store_mb is None else options.store_mb * 2**20
    return cluster.start(options.cluster_cpus, None, store)


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords for `LanguageModel`."""
    named = ("device_map", "dtype", "attn_implementation")
    return {name: value for name in named if (value := getattr(options, name)) is not None}


def _limits(options: argparse.Namespace) -> Limits:
    memory = None if options.memory_limit_mb is None else int(options.memory_limit_mb * 1e6)
    return Limits(options.silence_limit, options.idle_limit, memory, options.batch_rows)
