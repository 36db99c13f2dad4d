"""The activations of a data set, written to a folder batch by batch; what is killed goes on where it was.

    extraction = Extraction(model, prepare, modules, rows, Options(batch_tokens=8192, dtype=None, shard_bytes=2**28))
    extraction.write(Path("folder"))

A file is written beside its place, flushed and moved there, so it is whole or absent. The index comes first and says what each
shard will hold; a shard has whole batches, and the batches follow from the request. So whoever comes after a kill makes the
missing shards of the same forward passes, and they are the same to the bit, where torch computes the same twice: on one
machine, with as many threads, without dropout.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from .activations import INDEX, Form, Index, index_of, key_of, shard_path
from .batching import is_routed
from .dataset import Batch, Row, batched, sharded
from .digests import digest, plain, weights
from .errors import ExtractError
from .model import NNsight
from .nested import described, first_tensor
from .paths import spelled
from .progress import progress
from .shard import Shard, shard_at
from .visits import OUTPUT, Visit, Watcher

Prepare = Callable[[list[Row]], dict[str, Any]]
"""The keywords of a forward pass on rows of ids, `input_ids` and `attention_mask` `[batch, seq]` among them."""

Share = Callable[[Path, list[int], Mapping[str, Form], Callable[[int], None]], None]
"""Has the shards of some numbers made in a folder."""

Values = Callable[[Batch, Mapping[str, Form]], dict[str, torch.Tensor]]
"""Gives what each point gives for the tokens of a batch."""

SURVEYED: Final = 13
"""How many tokens tell what there is to store: a number that no model has heads or experts of."""

BESIDE: Final = dict.fromkeys(("row", "position", "token"), Form((), "int64"))
"""What a shard has for each token beside its points."""


class Options(NamedTuple):
    """How a data set is divided, and in what dtype floating point values are stored; `None` for the model's."""

    batch_tokens: int
    dtype: torch.dtype | None
    shard_bytes: int


class Extraction:
    """One request: these points of this model on these rows."""

    def __init__(
        self,
        model: NNsight,
        prepare: Prepare,
        modules: Mapping[str, torch.nn.Module],
        rows: list[Row],
        options: Options,
    ) -> None:
        """Nothing runs yet; what can be refused before is refused here."""
        refuse_unusable(modules, options)
        self.model = model
        self._prepare = prepare
        self._modules = modules
        self._rows = rows
        self._lengths = [len(row) for row in rows]
        self._options = options
        self.batches: list[Batch] = batched(self._lengths, options.batch_tokens)  # the rows of each forward pass
        self._surveyed: dict[str, Form] | None = None
        self._request = self._requested()

    def write(self, folder: Path, share: Share | None = None) -> None:
        """Make what is missing in `folder`; nothing runs where all is there. With `share` others make it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ExtractError(f"`{folder}` is a file.", "Give a folder, which need not exist yet.") from None
        with _alone_in(folder):
            index = self._index_in(folder)
            for part in folder.glob("shard-*.part"):  # of whoever was killed: nobody else is at work here
                part.unlink()
            missing = index.missing(folder)
            if not missing:
                return
            done = sum(self._lengths) - sum(map(index.tokens_in, missing))
            with progress("Extracting", sum(self._lengths), done, "tokens") as advance:
                if share is not None:
                    share(folder, missing, index.points, advance)
                    return
                for number in missing:
                    self.make(folder, number, index.points, advance)

    def make(
        self,
        folder: Path,
        number: int,
        points: Mapping[str, Form],
        advance: Callable[[int], None],
        values: Values | None = None,
    ) -> None:
        """Make one shard, which holds the same whoever makes it; with `values` something else has the forward passes run."""
        batches = self._shards(points)[number]
        tokens = sum(self._lengths[row] for batch in batches for row in batch)
        with shard_at(shard_path(folder, number), _stored(points), tokens) as shard:
            self._fill(shard, batches, points, advance, values or self.values)

    def survey(self) -> dict[str, Form]:
        """What there is to store, found out once."""
        if self._surveyed is None:
            self._surveyed = self._survey()
        return self._surveyed

    def check_weights(self) -> None:
        """Raise where the model's weights are not those that the request was made with."""
        if weights(self.model._module) != self._request["weights"]:
            raise ExtractError(
                "The weights that a worker has loaded are not those of the model here.",
                "Save the model with `save_pretrained`, and load it from that folder; or leave `workers` away.",
            )

    def _index_in(self, folder: Path) -> Index:
        """What the folder will hold, if that is what this extraction would put there."""
        index = index_of(folder) or self._begun(folder)
        differing = [name for name, value in self._request.items() if index.request.get(name) != value]
        if differing:
            raise ExtractError(
                f"`{folder}` holds the activations of another request, with other {' and '.join(differing)}.",
                "Give another folder, or remove this one.",
            )
        return index

    def _begun(self, folder: Path) -> Index:
        """Find out what the folder will hold, and write that down."""
        if any(folder.glob("shard-*.safetensors")):
            raise ExtractError(f"`{folder}` has shards and no `{INDEX}`.", "Give a new folder, or empty this one.")
        points = self.survey()
        shards = [[row for batch in shard for row in batch] for shard in self._shards(points)]
        index = Index(type(self.model._module).__name__, self._request, points, self._lengths, shards)
        _write(folder / INDEX, index.written().encode())
        return index

    def _requested(self) -> dict[str, Any]:
        """What has to be the same for an extraction to go on; each is named in a refusal."""
        return {
            "texts": digest(self._rows),
            "points": sorted(self._modules),
            "dtype": str(self._options.dtype),
            "batch_tokens": self._options.batch_tokens,
            "shard_bytes": self._options.shard_bytes,
            "weights": weights(self.model._module),
            "edits": [[edit.label, digest([*map(plain, edit.settings)])] for edit in self.model._tree.edits],
        }

    def _shards(self, points: Mapping[str, Form]) -> list[list[Batch]]:
        """The batches of each shard."""
        token = sum(form.nbytes for form in _stored(points).values())
        return sharded(self.batches, self._lengths, self._options.shard_bytes // token)

    def _survey(self) -> dict[str, Form]:
        """What there is to store, in the order the model comes by it, from a whole forward pass on a few tokens."""
        seen: dict[str, list[torch.Tensor | None]] = {}
        keywords = self._prepare([self._rows[self.batches[0][0]][:SURVEYED]])
        with torch.no_grad(), self.model.trace(**keywords) as tracer:
            for path, module in self._modules.items():
                tracer.watch(module, _noted(seen, path))
        for path in self._modules:
            visits = len(seen.get(path, ()))
            if visits != 1:
                raise ExtractError(
                    f"`{spelled(path)}` runs {visits} times in a forward pass, so it has no one value for each token.",
                    "Ask for modules that run once, such as the layers.",
                )
        return {path: self._form(path, value, keywords["attention_mask"].shape) for path, (value,) in seen.items()}

    def _form(self, path: str, value: torch.Tensor | None, shape: torch.Size) -> Form:
        """What is stored of a point that gave `value`."""
        if value is None or value.shape[:2] != shape:
            raise _not_by_token(path, value, shape)
        dtype = self._options.dtype if self._options.dtype is not None and value.is_floating_point() else value.dtype
        return Form(tuple(value.shape[2:]), str(dtype).removeprefix("torch."))

    def _fill(
        self, shard: Shard, batches: list[Batch], points: Mapping[str, Form], advance: Callable[[int], None], values: Values
    ) -> None:
        """Write the batches one after another, no padding."""
        for batch in batches:
            for path, value in values(batch, points).items():
                shard.add(key_of(path), value)
            lengths = [self._lengths[row] for row in batch]
            shard.add("row", torch.tensor([row for row in batch for _ in self._rows[row]]))
            shard.add("position", torch.cat([*map(torch.arange, lengths)]))
            shard.add("token", torch.tensor([token for row in batch for token in self._rows[row]]))
            advance(sum(lengths))

    def values(self, batch: Batch, points: Mapping[str, Form]) -> dict[str, torch.Tensor]:
        """What each point gives for the tokens of a batch, `[tokens, ...]`; the forward is stopped behind the last."""
        keywords = self._prepare([self._rows[row] for row in batch])
        mask = keywords["attention_mask"].bool()
        values = {}
        with torch.no_grad(), self.model.trace(**keywords) as tracer:
            for path, form in points.items():
                hidden = (self.model[path] if path else self.model).hidden
                if hidden.shape != (*mask.shape, *form.shape):
                    raise _not_by_token(path, hidden, mask.shape)
                # Chosen by the mask it is a copy, which the model cannot change any more.
                values[path] = hidden[mask.to(hidden.device)].to("cpu", form.torch_dtype)
            tracer.stop()
        return values


def _stored(points: Mapping[str, Form]) -> dict[str, Form]:
    """The tensors of a shard."""
    return {**BESIDE, **{key_of(path): form for path, form in points.items()}}


def refuse_unusable(modules: Mapping[str, torch.nn.Module], options: Options) -> None:
    """Raise for what can be seen to be wrong before the model runs."""
    for name in ("batch_tokens", "shard_bytes"):
        given = getattr(options, name)
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ExtractError(f"`{name}` was given {given!r}.", "Give a whole number of at least 1.")
    if options.dtype is not None and not (isinstance(options.dtype, torch.dtype) and options.dtype.is_floating_point):
        raise ExtractError(f"`dtype` was given {options.dtype!r}.", "Give a floating point type, such as `torch.float16`.")
    if not modules:
        raise ExtractError("There are no points to extract.", 'Name some: `points=["transformer.h.*"]`.')
    for path in filter(is_routed, modules):
        raise ExtractError(
            f"`{spelled(path)}` is an expert of a mixture: it gets some tokens only, and not in their places.",
            "Ask for the module around the experts.",
        )


def _noted(seen: dict[str, list[torch.Tensor | None]], path: str) -> Watcher:
    """A watcher that notes what a module gives at each visit."""

    def watch(visit: Visit) -> None:
        if visit.kind is OUTPUT:
            seen.setdefault(path, []).append(first_tensor(visit.value))

    return watch


def _not_by_token(path: str, value: torch.Tensor | None, shape: Sequence[int]) -> ExtractError:
    what = "no tensor" if value is None else described(value)
    return ExtractError(
        f"`{spelled(path)}` gives {what} for tokens {list(shape)} ([batch, seq]), so it has no value for each token.",
        "Ask for modules that give `[batch, seq, ...]`, such as the layers.",
    )


def _write(path: Path, content: bytes) -> None:
    """Have the file whole in its place, or not at all, whatever happens on the way."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let no other process write in `folder` meanwhile; the system lifts the lock of one that is killed."""
    with (folder / ".lock").open("a") as lock:
        if sys.platform != "win32":  # where two at once would write the same files twice
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ExtractError(
                    f"Another process is extracting to `{folder}`.", "Wait for it, or give another folder."
                ) from None
        yield
