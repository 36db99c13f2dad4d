"""`NNsight`: the root envoy for any `nn.Module`.

model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
with model.trace(torch.randn(1, 4)):
    hidden = model[0].output
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from .aliases import Aliases, Rename
from .batching import Given, joined, with_shared
from .cache import Cache, Positions
from .compiled import tell, written, written_function
from .constants import ablate, steer
from .ears import Memory
from .edits import Edit, EditBlock
from .errors import EditError, InputError
from .invokes import Division
from .paths import spelled
from .points import Points
from .run import Call
from .scan import Map, Scan, map_of
from .signatures import takes
from .trace import Trace
from .tracebacks import at_the_users_line
from .tree import Envoy, Tree

CACHE_OPTIONS: Final = ("device", "dtype", "detach", "include_output", "include_inputs", "positions")


class NNsight(Envoy):
    """The root of the envoys of any module; `trace` runs it."""

    def __init__(self, module: torch.nn.Module, rename: Rename | None = None) -> None:
        """Wrap `module`, which is not changed: outside a trace it runs at its own speed.

            model = NNsight(module, rename={"transformer.h": "layers", GPT2MLP: "mlp", "*.attn": "attention"})
            model.layers[2].attention           # the same envoy as `model.transformer.h[2].attn`

        `rename` gives modules other names, which paths, messages and caches know too: a key is a path, `*` standing for any one
        name, or a class. Raises `PathError` for a name that is taken.
        """
        if not isinstance(module, torch.nn.Module):
            raise InputError(
                f"`{type(self).__name__}(...)` was given `{type(module).__name__}`, which is not a `torch.nn.Module`.",
                "Pass the module itself; `LanguageModel` also takes a model's name or folder.",
            )
        given, module = module, written(module)
        super().__init__(module, "", Tree(module, Memory(Aliases(module, rename, type(self), Envoy))))
        if module is not given:
            self._tree.memory.told = True
            tell("model")
        self._tree.model = weakref.ref(self)

    def trace(
        self, *args: Any, fn: str | Callable[..., Any] | None = None, batched: bool = True, keep: bool = False, **kwargs: Any
    ) -> Trace:
        """Run the model on the arguments with its insides open.

            with model.trace(x) as tracer:
                hidden = model.layers[3].output       # the forward pass is paused here
                model.layers[3].output = hidden * 0
            tracer.result

        `fn` names another method to call (`fn="encode"`) or is any callable that runs the model. Without arguments the trace
        takes them from its invokes; `batched=False` gives each invoke a forward pass of its own. With `keep` the trace can be
        forked: `other = tracer.fork()`. `model.trace(...).start()` holds the run by hand.
        """
        call = self._call(fn, args, kwargs)
        trace = self._new_trace(call.name, call if args or _needs_none(call) else None, self._division(call, batched))
        return self._kept(trace) if keep else trace

    def _new_trace(self, name: str, call: Call | None, division: Division | None) -> Trace:
        """A trace of one call, or of one that is divided into invokes."""
        return Trace(self._tree, name, call, division)

    @staticmethod
    def _kept(trace: Trace) -> Trace:
        """The trace as one that can be forked."""
        from .interactive.kept import KeptTrace

        return KeptTrace(trace)

    @at_the_users_line
    def cache(self, *inputs: Any, modules: Any = None, **options: Any) -> Cache:
        """Run the model and keep what its modules return: a trace with nothing in it but `tracer.cache`.

            cache = model.cache("The Eiffel Tower", modules="transformer.h.*", positions=-1)
            cache["transformer.h.5"].output

        Options are those of `tracer.cache`; what else is given goes to `trace`.
        """
        keep = {name: options.pop(name) for name in CACHE_OPTIONS if name in options}
        with self.trace(*inputs, **options) as tracer:
            cache = tracer.cache(modules, **keep)
        return cache

    def session(self) -> contextlib.AbstractContextManager["NNsight"]:
        """A group of traces, as nnsight has it: `with model.session():`.

        Nothing needs it: a value read in one trace is an ordinary variable in the next.
        """
        return contextlib.nullcontext(self)

    def scan(self, *args: Any, **kwargs: Any) -> Scan:
        """The forward pass on fake tensors: shapes, types and devices, no values, and no weights needed.

        with model.scan(x):
            print(model.layers[3].output.shape)
        """
        return Scan(self._tree, self._call(None, args, kwargs))

    def map(self, *args: Any, **kwargs: Any) -> Map:
        """The modules that the forward pass runs, in order, with the shapes and types of what goes in and comes out.

        print(model.map("The Eiffel Tower is in"))       # a table; `.rows` has it as data
        """
        return map_of(self.scan(*args, **kwargs), dict(self._module.named_modules()), self._tree.memory.aliases)

    def edit(self, function: Callable[[], Any] | None = None, *, inplace: bool = False) -> Any:
        """An edit that every later trace and generation of the model begins with, once in each step.

            with model.edit() as edited:                        # `edited` is the same model with the edit
                model.transformer.h[5].mlp.output *= 0
            with edited.trace("The Eiffel Tower"):              # before its own reads, and before invokes
                ...

            handle = model.edit(function, inplace=True)         # a function needs no source; the model itself is edited
            handle.remove()                                     # or `model.clear_edits()`

        Given a function, it returns the edited model, or with `inplace` a handle, which is also what the `as` of a block gets.
        Raises `InvokeError` where a block cannot be taken out of its place.
        """
        edited = self if inplace else self._view()
        edit = Edit(edited._tree.edits)
        block = EditBlock(edit, edit if inplace else edited)
        return block if function is None else block(function)

    def steer(self, layer: Envoy | str, vector: torch.Tensor, scale: float = 1.0, positions: Positions = None) -> Edit:
        """Add `scale * vector` to what a layer gives, in every run from here on: a steering vector.

            with model.steer(model.transformer.h[6], vector, scale=4):      # for these traces; or keep the handle
                model.generate("I think that", max_new_tokens=10).result

        `vector` is `[hidden]`, or anything that broadcasts to `[batch, seq, hidden]`. `positions` (an index, a slice or a list)
        chooses tokens of each prompt, padding not counted; without them every position of every step is steered. (Turner et al.
        2023, Activation Addition, arXiv:2308.10248.)
        """
        at = self._place(layer, "steer")
        label = f"steer `{spelled(at._path)}`"
        edit, settings = Edit(self._tree.edits), (vector, scale, positions)
        return edit.store(label, lambda: lambda: steer(at, vector, scale, positions), settings, gives=edit)

    def ablate(self, layer: Envoy | str, value: Any = 0, positions: Positions = None) -> Edit:
        """Replace what a module gives by a constant in every run from here on.

            handle = model.ablate(model.transformer.h[5].mlp)               # zero ablation
            handle = model.ablate(model.transformer.h[5].mlp, "mean")       # the mean over the batch's tokens

        `value` is a number, `"mean"`, or a tensor that broadcasts to the output, such as a mean over a data set. Positions are
        those of `steer`.
        """
        if isinstance(value, str) and value != "mean":
            raise EditError(f"`ablate` was given {value!r}.", 'Give a number, a tensor or `"mean"`.')
        at = self._place(layer, "ablate")
        label = f"ablate `{spelled(at._path)}`"
        edit, settings = Edit(self._tree.edits), (value, positions)
        return edit.store(label, lambda: lambda: ablate(at, value, positions), settings, gives=edit)

    def _place(self, given: Any, given_to: str) -> Any:
        """The place that an envoy, an operation or a path is."""
        if isinstance(given, Points):
            return given
        if isinstance(given, str):
            return self[given]
        raise EditError(
            f"`{given_to}` was given a `{type(given).__name__}`, which is no place in the model.",
            "Give an envoy, an operation, or a path: `model.transformer.h[5]`.",
        )

    def clear_edits(self) -> None:
        """Take away every edit of the model."""
        self._tree.edits.clear()

    def _view(self) -> "NNsight":
        """The same model with edits of its own, beginning with those it has."""
        view = copy.copy(self)
        view._children = {}
        view._tree = Tree(self._module, self._tree.memory)
        view._tree.model = weakref.ref(view)
        view._tree.edits = [*self._tree.edits]
        view._tree.forward = self._tree.forward
        return view

    def _notes(self) -> list[str]:
        aliases = [f"{spelled(name)} is {spelled(own)}" for name, own in self._tree.memory.aliases]
        return [*aliases, *map(repr, self._tree.edits)]

    def batch(self, inputs: Sequence[Given]) -> tuple[Given, list[int]]:
        """How the inputs of several invokes become one call: the arguments of that call, and the rows of each input.

        Each input has `args` and `kwargs`. Tensors are concatenated along dimension 0, and everything else must be the same in
        all inputs; override this in a subclass for what needs padding, or keeps its rows elsewhere. Raises `BatchError`.
        """
        return joined(inputs)

    def _division(self, call: Call, batched: bool) -> Division | None:
        """How a trace of this call is divided into invokes, unless it has arguments that tell what to run on."""
        if call.args:
            return None

        def together(inputs: Sequence[Given]) -> tuple[Call, list[int]]:
            given, sizes = self.batch(inputs)
            args, kwargs = with_shared(given, call.kwargs)
            return call._replace(args=args, kwargs=kwargs), sizes

        return Division(together, batched)

    def _call(self, fn: str | Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """What a trace runs."""
        if fn is None or fn == "forward":
            return Call("forward", self._module, args, kwargs)
        if isinstance(fn, str):
            method = getattr(self._module, fn, None)
            if not callable(method):
                raise InputError(self._unknown(fn), '`fn="..."` names a method of the model, or is a callable that runs it.')
            return Call(fn, written_function(method), args, kwargs)
        if not callable(fn):
            raise InputError(
                f"`fn` was given {fn!r}.", '`fn="..."` names a method of the model, or is a callable that runs it.'
            )
        return Call(getattr(fn, "__qualname__", type(fn).__qualname__), written_function(fn), args, kwargs)


def _needs_none(call: Call) -> bool:
    """Whether the call can be made with the keywords alone."""
    function = call.function.forward if isinstance(call.function, torch.nn.Module) else call.function
    return takes(function, call.kwargs)
