"""An extraction by several workers, here without a cluster: who makes which shard, and what becomes of it where workers die."""

import filecmp
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from nnsight_eager import ExtractError, LanguageModel

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")

TEXTS = ["The Eiffel Tower is in the city of", "Paris", "The Colosseum is in the city of", "Rome", "When Mary and John went"]
POINTS = ["transformer.h.*", "lm_head"]


class Ray:
    """What Ray does with workers, in this process: a call is made when it is waited for; `deaths` are of the first shards."""

    def __init__(self, deaths=()):
        import ray

        self.exceptions = ray.exceptions
        self.deaths, self.made, self.killed = [*deaths], [], []

    def workers(self, kind, arguments, gpus):
        def begin():
            try:
                worker = kind(*(travelled(each) for each in arguments))
            except Exception as error:
                self.deaths.insert(0, died(error))
                return SimpleNamespace(ready=Method(None, "ready"))
            return SimpleNamespace(ready=Method(worker, "ready"), make=Method(worker, "make"))

        return begin

    def wait(self, references, num_returns):
        return references[-1:], references[:-1]

    def get(self, reference):
        if reference.args:
            self.made.append(reference.args[1])
        if (reference.args or reference.worker is None) and self.deaths and (error := self.deaths.pop(0)) is not None:
            raise error
        try:
            return getattr(reference.worker, reference.name)(*reference.args)
        except Exception as error:
            raise self.exceptions.RayTaskError("make", "", error) from None

    def kill(self, worker):
        self.killed.append(worker)


class Method:
    def __init__(self, worker, name):
        self.worker, self.name = worker, name

    def remote(self, *args):
        reference = Method(self.worker, self.name)
        reference.args = args
        return reference


def died(cause=None):
    """What Ray raises for an actor that has died; where its `__init__` has raised, that is the cause."""
    import ray

    error = ray.exceptions.RayActorError()
    if cause is not None:
        error.cause = cause
    return error


def travelled(value):
    import pickle

    from ray import cloudpickle

    return pickle.loads(cloudpickle.dumps(value))


@pytest.fixture
def model(folder):
    return LanguageModel(folder("gpt2"), dispatch=True)


@pytest.fixture
def on(monkeypatch):
    """Have workers be those of a `Ray` of this process."""
    from contextlib import nullcontext

    from nnsight_eager.remote import cluster

    def on(ray):
        monkeypatch.setattr(cluster, "ray_module", lambda: ray)
        monkeypatch.setattr(cluster, "workers", ray.workers)
        monkeypatch.setattr(cluster, "here", lambda count: nullcontext())
        return ray

    return on


def extracted(model, out, **options):
    return model.extract(TEXTS, POINTS, out, batch_tokens=16, shard_bytes=2000, **options)


def same_files(one, other):
    names = sorted(each.name for each in one.iterdir())
    assert names == sorted(each.name for each in other.iterdir())
    assert len(names) > 3
    return filecmp.cmpfiles(one, other, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("saved", [True, False], ids=["loaded where it comes from", "sent"])
def test_workers_write_what_one_process_does_and_are_ended(model, on, tmp_path, saved):
    if not saved:
        model = LanguageModel(model._module, tokenizer=model.tokenizer)
    model.edit(lambda: model.transformer.h[0].mlp.output.mul_(0.5), inplace=True)
    extracted(model, tmp_path / "one")
    ray = on(Ray())
    extracted(model, tmp_path / "several", workers=2)
    assert same_files(tmp_path / "one", tmp_path / "several")
    assert len(ray.killed) == 2
    assert sorted(ray.made) == [*range(len(ray.made))]


def test_what_a_dead_worker_was_at_is_made_by_another(model, on, tmp_path):
    extracted(model, tmp_path / "one")
    here = on(Ray(deaths=[died(), None, died()]))
    extracted(model, tmp_path / "several", workers=2)
    assert same_files(tmp_path / "one", tmp_path / "several")
    assert len(here.made) == len({*here.made}) + 2  # two were begun twice
    assert len(here.killed) == 4


def test_an_extraction_whose_workers_keep_dying_is_given_up_and_goes_on_when_called_again(model, on, tmp_path):
    on(Ray(deaths=[None, died(), died(), died(), died()]))
    with pytest.raises(ExtractError) as caught:
        extracted(model, tmp_path / "several", workers=2)
    assert str(caught.value).startswith("4 workers have died, and the extraction is given up: The actor experienced an error")
    assert "Called again it goes on where it was" in str(caught.value)
    again = on(Ray())
    extracted(model, tmp_path / "several", workers=1)
    extracted(model, tmp_path / "one")
    assert same_files(tmp_path / "one", tmp_path / "several")
    assert len(again.made) == len([*(tmp_path / "one").glob("shard-*")]) - 1


def test_what_a_worker_raises_is_raised_here(model, on, tmp_path, monkeypatch):
    from nnsight_eager.extraction import Extraction

    def full(*_):
        raise OSError(28, "No space left on device")

    on(Ray())
    monkeypatch.setattr(Extraction, "make", full)
    with pytest.raises(OSError, match="No space left on device"):
        extracted(model, tmp_path / "several", workers=2)


def test_other_weights_than_those_here_are_refused(model, on, tmp_path):
    here = on(Ray())
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.add_(1)  # what is loaded from the folder has not changed
    with pytest.raises(ExtractError, match="The weights that a worker has loaded are not those of the model here"):
        extracted(model, tmp_path / "several", workers=2)
    assert here.made == []


def test_an_edit_that_is_a_block_and_a_count_of_workers_that_is_none_are_refused(model, on, tmp_path):
    on(Ray())
    with pytest.raises(ExtractError) as caught:
        extracted(model, tmp_path / "none", workers=0)
    assert str(caught.value) == "`workers` was given 0.\nGive a whole number of at least 1."
    with model.edit(inplace=True):
        model.transformer.h[0].output *= 2
    with pytest.raises(ExtractError, match="is a block, which cannot be sent to workers"):
        extracted(model, tmp_path / "block", workers=2)
