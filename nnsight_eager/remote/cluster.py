"""Ray, imported only here: join a cluster or start one, put a server on it, find one.

start(cpus=2)                                   # a cluster of this machine, which listens on the loopback only
join("10.0.0.1:6379")
actor = place(Server, "llama", arguments, cpus=1, gpus=0)
actor = found("llama")
"""

import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ..errors import RemoteError

NAMESPACE: Final = "nnsight_eager"
CALLS_AT_ONCE: Final = 64
"""How many calls of an actor are served at once; each waits for its turn on a thread of Ray's."""


def ray_module() -> Any:
    """Ray, or a sentence where it is not installed."""
    try:
        import ray
    except ImportError:
        raise RemoteError(
            "Models that run elsewhere need Ray, which is not installed.", 'Install it: `pip install "nnsight_eager[ray]"`.'
        ) from None
    return ray


def start(cpus: int | None = None, gpus: int | None = None, store_bytes: int | None = None) -> str:
    """Start a cluster of this machine alone, unless this process is in one; its address."""
    _as_on_this_machine()
    ray = ray_module()
    if not ray.is_initialized():
        options = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": store_bytes}
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            **{name: value for name, value in options.items() if value is not None},
        )
    return str(ray.get_runtime_context().gcs_address)


def join(address: str | None) -> Any:
    """Connect this process to a cluster; without an address to the one it is in already, or that Ray finds."""
    if address is not None and address.startswith(("127.0.0.1:", "localhost:")):
        _as_on_this_machine()
    ray = ray_module()
    if not ray.is_initialized():
        try:
            ray.init(address=address or "auto", namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"at `{address}`" if address else "that Ray finds by itself"
            raise RemoteError(
                f"There is no cluster {where}: {str(error).strip().splitlines()[0]}",
                "Start one: `python -m nnsight_eager serve NAME_OR_FOLDER --name ...` prints its address.",
            ) from None
    return ray


def leave() -> None:
    """Disconnect from the cluster; one that this process has started ends."""
    ray = ray_module()
    if ray.is_initialized():
        ray.shutdown()


def place(kind: type, name: str, arguments: tuple[Any, ...], cpus: float, gpus: float) -> Any:
    """Make an object of this class an actor that others find by its name; Ray starts it anew where it dies."""
    ray = ray_module()
    if any(each["name"] == name and each["namespace"] == NAMESPACE for each in ray.util.list_named_actors(True)):
        raise RemoteError(f"The cluster serves a model called `{name}` already.", "Give another `--name`.")
    groups = {"control": 4, "functions": CALLS_AT_ONCE}
    remote = ray.remote(concurrency_groups=groups)(kind).options(
        name=name,
        namespace=NAMESPACE,
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=CALLS_AT_ONCE,
    )
    return remote.remote(*arguments)


def refuse_without_room(cpus: float, gpus: float) -> None:
    """Raise where the cluster does not have so much in all: actors would wait for it for ever."""
    there = ray_module().cluster_resources()
    if there.get("CPU", 0) < cpus or there.get("GPU", 0) < gpus:
        raise RemoteError(
            f"The cluster has {there.get('CPU', 0):g} processors and {there.get('GPU', 0):g} accelerators, and {cpus:g} and "
            f"{gpus:g} are to be reserved.",
            "`--cpus` and `--gpus` are reserved for each rank; `--cluster-cpus` is what a cluster is started with.",
        )


def companion(kind: type, arguments: tuple[Any, ...], cpus: float, gpus: float) -> Any:
    """Make an actor that belongs to this one, and ends with it."""
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 4 * CALLS_AT_ONCE}
    return ray_module().remote(kind).options(**options).remote(*arguments)


def meeting_place(folder: str) -> str:
    """Where the ranks of a process group meet, of which this is the first: where all of the cluster is here, a file."""
    address = ray_module().util.get_node_ip_address()
    if address.startswith("127."):
        return f"file://{folder}/ranks-{uuid.uuid4().hex}"
    with socket.socket() as held:
        held.bind((address, 0))
        return f"tcp://{address}:{held.getsockname()[1]}"


def done_by(calls: list[Any]) -> None:
    """Wait for calls of companions; where one of these has died this process ends too, and Ray makes it anew."""
    try:
        ray_module().get(calls)
    except ray_module().exceptions.RayActorError:
        end_here()


def end_here() -> None:
    """End this process at once; Ray makes its actor anew."""
    os._exit(1)


def end_with(calls: list[Any]) -> None:
    """End this process as soon as one of these calls is lost."""
    threading.Thread(target=done_by, args=(calls,), name="nnsight_eager companions", daemon=True).start()


def wait_for(actor: Any, name: str, ended: Any) -> None:
    """Wait until the actor has loaded its model, or until that is not wanted any more."""
    ray = ray_module()
    waiting = actor.describe.remote()
    while not ended.is_set():
        ready, _ = ray.wait([waiting], timeout=0.5)
        if not ready:
            continue
        try:
            ray.get(ready)
            return
        except ray.exceptions.RayActorError as error:
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise RemoteError(f"`{name}` could not be served: {reason}", "Its model has to load where the actor is.") from None


def end(actor: Any) -> None:
    """End an actor for good."""
    ray_module().kill(actor, no_restart=True)


def found(name: str) -> Any:
    """The actor of this name; a sentence that names those there are."""
    ray = ray_module()
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        names = sorted(each["name"] for each in ray.util.list_named_actors(True) if each["namespace"] == NAMESPACE)
        served = f"it serves {', '.join(f'`{each}`' for each in names)}" if names else "it serves none"
        raise RemoteError(
            f"The cluster serves no model called `{name}`; {served}.",
            f"`python -m nnsight_eager serve NAME_OR_FOLDER --name {name} --address ...` puts one there.",
        ) from None


def workers(kind: type, arguments: tuple[Any, ...], gpus: float) -> Callable[[], Any]:
    """What begins an actor that works for this process alone; its arguments are kept by Ray once for all."""
    ray = ray_module()
    kept = [ray.put(each) for each in arguments]
    remote = ray.remote(kind).options(num_cpus=1, num_gpus=gpus, max_restarts=0)
    return lambda: remote.remote(*kept)


@contextmanager
def here(cpus: int) -> Iterator[None]:
    """Be in a cluster for this block: the one this process is in, that of `RAY_ADDRESS`, or one of this machine alone."""
    ray = ray_module()
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        join(None)
    else:
        start(cpus)
    try:
        yield
    finally:
        leave()


def _as_on_this_machine() -> None:
    """Have Ray take this machine's address to be 127.0.0.1, listen there only, and ask who connects for the user's token.

    Whoever reaches the ports of a cluster may run code on it. Ray (2.60) reads both when it is imported; the first is meant for
    machines on which it makes no clusters. The token is one that Ray makes and keeps for the user.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "ray" in sys.modules and not ray_module().is_initialized():
        from ray._private import ray_constants

        raylet: Any = sys.modules["ray._raylet"]
        ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", False)
        raylet.Config.initialize("")
