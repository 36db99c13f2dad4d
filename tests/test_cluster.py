"""Being in a Ray cluster: which one, and what is said where it is not there. Ray is one that notes what it is asked."""

import signal
import sys
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import nnsight_eager
from nnsight_eager import RemoteError

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")


@pytest.fixture
def ray(monkeypatch):
    """A Ray that is in no cluster, serves `gpt2` and whose `init` may raise what `broken` is."""
    import ray as real

    state = SimpleNamespace(inside=False, calls=[], broken=None)

    def init(**options):
        state.calls.append(("init", options["address"]))
        if state.broken is not None:
            raise state.broken
        state.inside = True

    def shutdown():
        state.calls.append(("shutdown",))
        state.inside = False

    def get_actor(name, namespace):
        raise ValueError

    served = [{"name": "gpt2", "namespace": "nnsight_eager"}, {"name": "other", "namespace": "somebody's"}]
    state.ray = SimpleNamespace(
        init=init,
        shutdown=shutdown,
        is_initialized=lambda: state.inside,
        exceptions=real.exceptions,
        cloudpickle=real.cloudpickle,
        util=SimpleNamespace(list_named_actors=lambda _: served),
        get_actor=get_actor,
        cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0},
        wait=lambda waiting, timeout: (waiting, []),
        get=lambda waiting: (_ for _ in ()).throw(*waiting),
        get_runtime_context=lambda: SimpleNamespace(gcs_address="127.0.0.1:1"),
    )
    monkeypatch.setitem(sys.modules, "ray", state.ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return state


def test_who_is_in_no_cluster_is_in_one_of_this_machine_for_the_block_and_leaves_it(ray):
    from nnsight_eager.remote import cluster

    with pytest.raises(KeyError), cluster.here(2):
        assert ray.inside
        with cluster.here(2):  # who is in one stays in it
            pass
        assert ray.inside
        raise KeyError
    assert ray.calls == [("init", "local"), ("shutdown",)]


def test_a_cluster_that_the_environment_names_is_joined(ray, monkeypatch):
    from nnsight_eager.remote import cluster

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with cluster.here(2):
        assert ray.inside
    assert ray.calls == [("init", "auto"), ("shutdown",)]  # Ray reads the variable itself


@pytest.mark.parametrize(
    ("address", "where"), [("127.0.0.1:1", "at `127.0.0.1:1`"), (None, "that Ray finds by itself")], ids=["named", "found"]
)
def test_a_cluster_that_is_not_there_is_a_sentence(ray, address, where):
    ray.broken = ConnectionError("nobody listens\nand more lines")
    with pytest.raises(RemoteError) as caught:
        nnsight_eager.connect("gpt2", address)
    assert str(caught.value).splitlines()[0] == f"There is no cluster {where}: nobody listens"


def test_a_name_that_is_taken_or_unknown_is_a_sentence(ray):
    from nnsight_eager.remote import cluster

    with pytest.raises(RemoteError, match="The cluster serves a model called `gpt2` already"):
        cluster.place(object, "gpt2", (), 1, 0)
    with pytest.raises(RemoteError, match=r"The cluster serves no model called `other`; it serves `gpt2`\."):
        cluster.found("other")


def test_a_model_that_cannot_be_loaded_is_a_sentence(ray):
    import ray as real

    from nnsight_eager.remote import cluster

    error = real.exceptions.RayActorError()
    actor = SimpleNamespace(describe=SimpleNamespace(remote=lambda: error))
    with pytest.raises(RemoteError) as caught:
        cluster.wait_for(actor, "gpt2", threading.Event())
    assert str(caught.value).startswith("`gpt2` could not be served: The actor experienced an error")


def test_the_command_joins_the_cluster_that_it_is_given(ray, monkeypatch):
    from nnsight_eager.remote import cluster, command

    def placed(kind, name, arguments, cpus, gpus):
        assert (name, cpus, gpus) == ("llama", 2.0, 1.0)
        assert arguments[2] == {"dtype": "bfloat16"}
        assert arguments[3].memory == 5_000_000
        raise RemoteError("as far as that", "")

    monkeypatch.setattr(cluster, "place", placed)
    given = ["folder", "--name", "llama", "--address", "10.0.0.1:6379", "--cpus", "2", "--gpus", "1"]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(RemoteError, match="as far as that"):
            command.serve([*given, "--dtype", "bfloat16", "--memory-limit-mb", "5"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ray.calls == [("init", "10.0.0.1:6379"), ("shutdown",)]


def test_more_than_the_cluster_has_is_refused_instead_of_waited_for(ray):
    from nnsight_eager.remote import cluster

    cluster.refuse_without_room(4, 1)
    for cpus, gpus in ((5, 0), (1, 2)):
        with pytest.raises(RemoteError, match="The cluster has 4 processors and 1 accelerators, and"):
            cluster.refuse_without_room(cpus, gpus)


def test_a_server_of_another_version_is_refused(ray, monkeypatch, folder):
    from remote_in_process import LineHere, served

    from nnsight_eager.remote import model

    server = served(folder("gpt2"))
    described = server.describe()
    monkeypatch.setattr(model, "Line", lambda name, actor: LineHere(server))
    monkeypatch.setattr(model.cluster, "found", lambda name: None)
    monkeypatch.setattr(server, "describe", lambda: described._replace(version=described.version + 1))
    with pytest.raises(RemoteError) as caught:
        nnsight_eager.connect("gpt2", "10.0.0.1:6379")
    assert "Install the same version of nnsight_eager on both sides." in str(caught.value)
