"""`connect`: a model on a server, as a tree of envoys without weights.

model = nnsight_eager.connect("llama", address="10.0.0.1:6379")
with model.trace("The Eiffel Tower is in the city of"):
    hidden = model.model.layers[5].output           # the forward on the server is paused here; its tensor has come
    model.model.layers[5].output = hidden * 0       # goes there when the forward goes on
model.submit(function, prompts).result()            # next to the model, where nothing travels
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch

from ..errors import RemoteError
from ..invokes import Division
from ..language import LanguageModel
from ..loading import skeleton
from ..run import Call
from ..trace import Trace
from ..tree import Envoy, Tree
from ..visits import INPUT, OUTPUT, Kind
from . import cluster
from .addresses import Paths
from .extracting import RemoteActivations, extracted
from .jobs import Future, by_value
from .line import Line
from .packing import packed, unpacked
from .refs import Ref, name_of_ref
from .runs import RemoteRun
from .traces import RemoteTrace
from .wire import VERSION, Description


class RemoteTree(Tree):
    """What the envoys of one model on a server share: also the line to it."""

    __slots__ = ("line",)

    def __init__(self, tree: Tree, line: Line) -> None:
        """The same as `tree`."""
        super().__init__(tree.root, tree.memory, tree.bound_to)
        self.edits, self.model = tree.edits, tree.model
        self.line = line


class RemoteEnvoy(Envoy):
    """A module of a model on a server, seen through its points."""

    _tree: RemoteTree

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Apply the module, on the server, to values from here or there: `model.lm_head(model.transformer.ln_f(hidden))`."""
        if hook:
            return self._run().apply(self._module, args, kwargs, self._path)
        return unpacked(self._tree.line.call("call", self._own_path, packed((args, kwargs), places=name_of)))

    @property
    def output_ref(self) -> Ref:
        """A handle of the output (its first tensor), which stays on the server until `.get()`: `layer.output_ref.norm()`."""
        return self._ref(OUTPUT)

    @property
    def input_ref(self) -> Ref:
        """A handle of the input (the first tensor of the arguments), which stays on the server until `.get()`."""
        return self._ref(INPUT)

    def _ref(self, kind: Kind) -> Ref:
        run: Any = self._run()
        return run.ref(run.ask(self._module, kind, self._path, bring=False), kind)  # type: ignore[no-any-return]

    @classmethod
    def _of(cls, module: torch.nn.Module, path: str, tree: Tree) -> Envoy:
        assert isinstance(tree, RemoteTree)
        return RemoteEnvoy(module, path, tree)


class RemoteModel(LanguageModel):
    """A language model on a server: its tree, tokenizer and configuration are here, its weights and its runs there."""

    _tree: RemoteTree
    _of = RemoteEnvoy._of

    def __init__(self, line: Line, told: Description) -> None:
        """Build the tree from the configuration alone."""
        attention = getattr(told.config, "_attn_implementation", None)
        module = skeleton(told.config, **({"attn_implementation": attention} if attention else {}))
        if told.generation_config is not None:
            module.generation_config = told.generation_config
        super().__init__(module, tokenizer=told.tokenizer, rename=told.rename)
        self._tree = RemoteTree(self._tree, line)
        self._paths = Paths(module)

    def trace(self, *inputs: Any, retries: int = 0, **keywords: Any) -> RemoteTrace:
        """Run one forward pass on the server with its insides open; inputs and keywords are those of `LanguageModel.trace`.

            with model.trace("The Eiffel Tower is in the city of", retries=1):
                hidden = model.transformer.h[5].output

        Where the server dies, a run is repeated up to its place as often as `retries` says, with the edits made so far.
        """
        trace = super().trace(*inputs, **keywords)
        assert isinstance(trace, RemoteTrace)
        trace.retries = retries
        return trace

    def generate(self, *inputs: Any, retries: int = 0, **keywords: Any) -> RemoteTrace:
        """Generate on the server with the insides of every step open; `retries` as in `trace`."""
        trace = super().generate(*inputs, **keywords)
        assert isinstance(trace, RemoteTrace)
        trace.retries = retries
        return trace

    def submit(self, function: Callable[..., Any], *args: Any, retries: int = 0, **kwargs: Any) -> Future:
        """Run `function(model, *args, **kwargs)` next to the model, where its trace is local; only what it returns travels.

            def last_norms(model, prompts):
                norms = []
                for number, prompt in enumerate(prompts):
                    nnsight_eager.report(number, len(prompts), "prompts")
                    with model.trace(prompt):
                        norms.append(model.transformer.h[-1].output[:, -1].norm().item())
                return norms

            future = model.submit(last_norms, prompts)
            future.progress, future.result()

        The model in it is the same one, with the edits made here; gradients, invokes and hooks work as for any local model. The
        function is sent by value, with what it refers to; packages that it imports have to be installed there. Where the server
        dies it runs from its start once more, as often as `retries` says. A function that only reads and edits one forward pass
        can share it with others: `model.trace(prompt).submit(function)`.
        """
        return self._submit(function, args, kwargs, None, retries)

    def _submit(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Any, retries: int
    ) -> Future:
        with by_value(function):
            sent = packed((function, args, kwargs, self._edits(), inputs), places=self._name_of)
        return Future(self._tree.line, sent, getattr(function, "__name__", "function"), retries)

    def extract(self, texts: Any, points: Any, out: Any, *, retries: int = 0, **options: Any) -> Any:
        """`LanguageModel.extract` next to the model: the folder is one of the server's, and nothing travels but the texts.

        What is given back reads the folder: here, where it is on a file system that both sides see, else through the server.
        Where the server dies it goes on from where it was, as often as `retries` says.
        """
        paths = [*self._chosen(() if points is None else points)]
        return extracted(partial(self.submit, retries=retries), texts, paths, out, options)

    def activations(self, folder: str) -> RemoteActivations:
        """The activations in a folder of the server's, brought a text at a time."""
        return RemoteActivations(self.submit, folder)

    def status(self) -> dict[str, Any]:
        """Who is connected to the server, what runs are paused where and hold how much, and how long turns were waited for."""
        return self._tree.line.control("status")  # type: ignore[no-any-return]

    def disconnect(self) -> None:
        """Leave the server: runs and handles that this client has there are closed."""
        self._tree.line.close()

    def edit(self, function: Callable[[], Any] | None = None, *, inplace: bool = False) -> Any:
        """`NNsight.edit`, with a function, which is sent to the server at the begin of every run."""
        if function is None:
            raise RemoteError(
                "An edit of a model on a server runs there, so it cannot be a block.", "Write `model.edit(function)`."
            )
        return super().edit(function, inplace=inplace)

    def load_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """An adapter is loaded where the model is."""
        raise RemoteError(
            "An adapter changes the model for all who are connected.", "Serve a folder that has it, or load it in a function."
        )

    @staticmethod
    def _kept(trace: Trace) -> NoReturn:
        raise RemoteError(
            "`keep=True` is for models in this process.", "Write `run = model.trace(...).start()`, then `run.fork()`."
        )

    def _view(self) -> "RemoteModel":
        view = super()._view()
        view._tree = RemoteTree(view._tree, self._tree.line)
        assert isinstance(view, RemoteModel)
        return view

    def _name_of(self, each: Any) -> Any:
        return self._paths.name(each) or name_of(each)

    def _edits(self) -> list[tuple[Any, ...]]:
        return [(edit.label, edit._program, edit.settings) for edit in self._tree.edits]

    def _new_trace(self, name: str, call: Call | None, division: Division | None) -> Trace:
        return RemoteTrace(self._tree, name, call, division, self._begin, partial(_bound, self._tree.line), self._submit)

    def _begin(self, call: Call, by_hand: bool | None = None, retries: int = 0) -> RemoteRun:
        if call.name not in ("forward", "generate") and not callable(getattr(self._module, call.name, None)):
            raise RemoteError(
                f"`fn={call.name}` cannot be sent.", "Name a method of the model, or use `model.submit(function)`."
            )
        return RemoteRun(
            self._tree.line, self._module, self._paths, call, self._edits(), self._name_of, by_hand=by_hand, retries=retries
        )


def connect(name: str, address: str | None = None) -> RemoteModel:
    """The model that is served under this name: the same envoy tree, and no weights here.

        model = nnsight_eager.connect("llama", address="10.0.0.1:6379")

    `address` is that of the cluster; without one it is the cluster that this process is in, or that Ray finds on this machine.
    Raises `RemoteError` where there is no such cluster or model.
    """
    cluster.join(address)
    line = Line(name, cluster.found(name))
    told: Description = line.control("describe")
    if told.version != VERSION:
        raise RemoteError(
            f"The server of `{name}` speaks version {told.version}, and this is version {VERSION}.",
            "Install the same version of nnsight_eager on both sides.",
        )
    model = RemoteModel(line, told)
    weakref.finalize(model, line.close)
    return model


def name_of(each: Any) -> Any:
    """The name of what the server has already: a handle, the model, a part of it."""
    if isinstance(each, (RemoteModel, RemoteEnvoy)):
        return "model", each._own_path
    return name_of_ref(each)


def _bound(line: Line, tree: Tree) -> Envoy:
    """The tree bound to one run."""
    return RemoteEnvoy(tree.root, "", RemoteTree(tree, line))
