"""`Envoy`: a module seen through its points, in a tree that mirrors the model's own names.

layer = model.transformer.h[5]      # an envoy
layer.mlp.output                    # a point of its child
layer.ln_1.weight                   # anything else is the module's own
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .compiled import written
from .current import current, outside
from .ears import Memory
from .errors import EditError, NnsightEagerError, OutsideTraceError, PathError, SourceError
from .further import AtNextVisit
from .nested import described
from .outline import Outline, Row, Seen
from .paths import example, in_every_layer, matching, near, spelled
from .points import Points
from .run import Run
from .source import Source, source_of
from .tracebacks import for_the_reader
from .visits import Forward, Kind, Visit


def children(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """A module's children by name; a scripted module keeps them in a container of its own, a compiled one in the module."""
    own = written(module)._modules
    return own if isinstance(own, dict) else dict(own.items())


class Tree:
    """What all envoys of one model share: its root, what its runs remember, and the run they are bound to, if any."""

    __slots__ = ("bound_to", "edits", "forward", "held", "memory", "model", "root")

    def __init__(self, root: torch.nn.Module, memory: Memory, bound_to: Run | None = None) -> None:
        self.root = root
        self.bound_to = bound_to
        self.memory = memory
        self.edits: list[Any] = []  # what every run begins with
        self.forward: Callable[..., Forward] = Forward  # makes the coroutine of a run
        self.held: Callable[[], Any] = _nothing  # the run that was last held by hand, weakly
        self.model: Callable[[], Any] = _nothing  # the root envoy, weakly, since it holds its tree

    def run(self) -> Run:
        """The run that points of this tree belong to."""
        return self.bound_to or current(self.root)

    def rows(self, at: str) -> list[Row]:
        """The modules at and below a path, with what is known of the run that points belong to, or of the last one by hand."""
        run, held = self._open_run(), self.held()
        if held is not None and (run is None or run is held._run):
            return held._rows(at)  # type: ignore[no-any-return]
        states = {} if run is None or run.at is None else {id(run.at.module): "paused"}
        return Seen(self.root, states, other_name=self.memory.aliases.shown).rows(at)

    def _open_run(self) -> Run | None:
        """The run that points of this tree belong to, if there is one."""
        try:
            run = self.run()
        except NnsightEagerError:
            return None
        return run if isinstance(run, Run) and run.open else None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is another model: no run is open in it, and what was learned speaks of other modules.
        return Tree, (self.root, Memory(self.memory.aliases))


def _nothing() -> None:
    """A tree of one run, which stores nothing."""


class Envoy(Points):
    """A module seen through its points: `.output`, `.input`, `.inputs`, `.hidden`, `.skip(value)`, `.next()`.

    Children have the model's own names; a child whose name is taken (`output` in BERT) is `layer.output_`, and any child is
    `layer["output"]`. What is neither is the module's own (`.weight`, `.config`). Looking at an envoy never runs the model.
    """

    def __init__(self, module: torch.nn.Module, path: str, tree: Tree) -> None:
        self._module = module
        self._own_path = path
        self._path = tree.memory.aliases.shown(path)  # as it is written
        self._tree = tree
        self._children: dict[str, Envoy] = {}

    def _run(self) -> Run:
        return self._tree.run()

    def _visit(self, kind: Kind) -> Visit:
        # One look into the dictionary: an attribute of a class with `__getattr__` costs ten times a plain one.
        own = self.__dict__
        tree = own["_tree"]
        try:
            run = tree.bound_to or current(tree.root)
        except OutsideTraceError:
            raise outside(f"`{spelled(own['_path'], kind)}`") from None
        return run.ask(own["_module"], kind, own["_path"])

    def _failed(self, error: BaseException) -> None:
        super()._failed(error)
        if isinstance(error, AttributeError):
            self.__dict__["_raised"] = error  # by the model; Python takes it for a missing property: see `__getattr__`

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Apply the module, in or out of a trace, without touching the run: `model.lm_head(model.transformer.ln_f(hidden))`.

            model.transformer.h[0].adapter = autoencoder                          # a module of one's own, now in the tree
            layer.hidden = model.transformer.h[0].adapter(layer.hidden, hook=True)

        With `hook=True` the model's forward pass, paused at a point, makes the call: caches, edits and other invokes see
        `adapter.output` like that of any module, and the call runs in the model's torch settings.
        """
        if hook:
            return self._run().apply(self._module, args, kwargs, self._path)
        return self._module(*args, **kwargs)

    def next(self) -> "NextEnvoy":
        """This module's next visit after now, in whatever step: `layer.next().output`.

        For a module that a step visits several times, and for the next token of a generation. The answer stays with that one
        visit: keep it in a variable to read and then replace.
        """
        return NextEnvoy(self._module, self._path, self._tree)

    @property
    def source(self) -> Source:
        """The operations inside the module's forward: `print(attn.source)`, `attn.source.self_c_proj_0.output`.

        Calls and assignments, each a point with `.output`, `.input`, `.inputs`, `.skip(value)`, `.next()` and, for what it
        calls, `.source`. A run has to know of them before it comes to the forward. Raises `SourceError` where the forward has
        no Python source.
        """
        return source_of(self._module, self._path, self._tree)

    def edit(self, function: Callable[[], Any] | None = None, *, inplace: bool = False) -> Any:
        """`NNsight.edit` of the model that this is a part of: `with model.transformer.h[5].edit(inplace=True):`."""
        model = self._tree.model()
        if model is None:
            raise EditError(f"`{spelled(self._path)}` is not reached through its model here.", "Write `model.edit(...)`.")
        return model.edit(function, inplace=inplace)

    def _point_at(self, module: torch.nn.Module) -> None:
        """Stand for `module` from now on, and let every envoy below stand for the module of its own path in it."""
        self._module = module
        if not self._path:
            self._tree.root = module
            self._tree.memory = Memory(self._tree.memory.aliases)
        for name, child in self._children.items():
            below = children(module).get(name)
            if below is not None:
                child._point_at(below)

    # The module's own structure

    def _child(self, name: str) -> "Envoy":
        """The child called `name`; looked up each time, since a model's modules can be exchanged."""
        return self._envoy_of(name, children(self._module)[name])

    def _envoy_of(self, name: str, module: torch.nn.Module | None) -> "Envoy":
        """The child called `name`, which is this module."""
        assert module is not None
        child = self._children.get(name)
        if child is None or child._module is not module:
            path = f"{self._own_path}.{name}" if self._own_path else name
            child = self._children[name] = type(self)._of(module, path, self._tree)
        return child

    @classmethod
    def _of(cls, module: torch.nn.Module, path: str, tree: Tree) -> "Envoy":
        return Envoy(module, path, tree)

    @property
    def _other_names(self) -> Mapping[str, str]:
        """The names that `rename` gives here."""
        return self._tree.memory.aliases.at(self._own_path)

    def _by_other_name(self, name: str) -> "Envoy":
        """The envoy, below this one, of another name."""
        envoy, depth = self, self._own_path.count(".") + 1 if self._own_path else 0
        for own in self._other_names[name].split(".")[depth:]:
            envoy = envoy._child(own)
        return envoy

    def _has_child(self, name: str) -> bool:
        return children(self.__dict__["_module"]).get(name) is not None

    def __getattr__(self, name: str) -> Any:
        # IPython probes underscored names on everything it shows.
        if name.startswith("_"):
            raise AttributeError(name)
        # Python comes here as well when a property has raised an `AttributeError`, which is the model's and not about a name.
        raised = self.__dict__.pop("_raised", None)
        if raised is not None and isinstance(getattr(type(self), name, None), property):
            try:
                raise raised
            except AttributeError as error:
                error.__traceback__ = for_the_reader(error.__traceback__)
                raise
            finally:
                del raised
        module = children(self.__dict__["_module"]).get(name)
        if module is not None:
            return self._envoy_of(name, module)
        if name.endswith("_") and self._has_child(name[:-1]):
            return self._child(name[:-1])
        if name in self._other_names:
            return self._by_other_name(name)
        try:
            return self._as_envoy(self._own(name))
        except AttributeError as error:
            error.__traceback__ = for_the_reader(error.__traceback__)
            raise

    def _own(self, name: str) -> Any:
        """What the module itself has under this name."""
        try:
            return getattr(self._module, name)
        except AttributeError:
            # With an object Python would make a suggestion of its own, behind ours.
            raise AttributeError(self._unknown(name), name=name, obj=None) from None

    def _as_envoy(self, value: Any) -> Any:
        """A module of this tree as its envoy (`model.base_model`), anything else as it is."""
        if not isinstance(value, torch.nn.Module):
            return value
        path = next((path for path, module in self._tree.root.named_modules() if module is value), None)
        return value if path is None else Envoy(value, path, self._tree)

    def __setattr__(self, name: str, value: Any) -> None:
        ours = getattr(type(self), name, None)
        try:
            if name.startswith("_") or isinstance(ours, property) or (hasattr(type(self), name) and not callable(ours)):
                object.__setattr__(self, name, value)
            elif callable(ours):
                where = spelled(self._path, name)
                raise EditError(f"`{where}` is a method and cannot be assigned.", f"Call it: `{where}(...)`.")
            else:
                self._exchange(name, value)
        except BaseException as error:
            error.__traceback__ = for_the_reader(error.__traceback__)
            raise

    def _exchange(self, name: str, value: Any) -> None:
        """Give the module another child, or another value of its own."""
        child = name[:-1] if name.endswith("_") and self._has_child(name[:-1]) else name
        if name in self._other_names:
            above, _, own = self._other_names[name].rpartition(".")
            setattr(self._tree.root.get_submodule(above), own, value)
        elif isinstance(value, torch.nn.Module) or hasattr(self._module, child):
            setattr(self._module, child, value)
        else:
            raise EditError(self._unknown(name), "The points of a module are `output`, `input`, `inputs`, `hidden`, `skip`.")

    def _unknown(self, name: str) -> str:
        """What to say of a name that is neither a point nor a child nor an attribute of the module."""
        names = [each for each in dir(self) if not each.startswith("_")]
        return f"`{spelled(self._path)}` ({type(self._module).__name__}) has no `{name}`{near(name, names)}"

    def __getitem__(self, key: Any) -> Any:
        """`h[5]`, `h[-1]`, `h[2:5]` (a list), `layer["output"]`, `model["transformer.h.5"]`."""
        try:  # not by `at_the_users_line`: behind a decorated `__getitem__` IPython completes nothing
            if isinstance(key, str):
                return self._below(key)
            below = children(self._module)
            names = list(below)
            if isinstance(key, slice):
                return [self._child(name) for name in names[key]]
            try:
                name = names[key]
            except IndexError:
                raise IndexError(f"`{spelled(self._path)}` has {len(names)} modules; there is no [{key}].") from None
            return self._envoy_of(name, below[name])
        except (KeyError, IndexError) as error:
            error.__traceback__ = for_the_reader(error.__traceback__)
            raise

    def _below(self, path: str) -> "Envoy":
        """The envoy at a path from here."""
        envoy = self
        for name in path.split("."):
            if not envoy._has_child(name) and name not in envoy._other_names:
                raise KeyError(envoy._unknown(name))
            envoy = envoy._child(name) if envoy._has_child(name) else envoy._by_other_name(name)
        return envoy

    def _chosen(self, modules: Any) -> dict[str, torch.nn.Module]:
        """The modules that a user names: `None` for all, envoys, modules, paths with `*` for any one name, lists of these."""
        own = dict(self._module.named_modules(remove_duplicate=False))
        if modules is None:
            return own
        chosen: dict[str, torch.nn.Module] = {}
        for each in modules if isinstance(modules, (list, tuple, set)) else [modules]:
            chosen |= self._named(each, own)
        return chosen

    def _named(self, each: Any, own: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        """Those of its `own` modules that an envoy, a module or a path names."""
        aliases, kind = self._tree.memory.aliases, type(self._module).__name__
        if isinstance(each, (Envoy, torch.nn.Module)):
            module = each._module if isinstance(each, Envoy) else each
            paths = [path for path, one in own.items() if one is module]
            if not paths:
                raise PathError(
                    f"What was given, a `{type(module).__name__}`, is no module of this `{kind}`.",
                    "Give envoys of this model, looked up since its modules were last exchanged.",
                )
            written = getattr(each, "_own_path", "")
            return {written if written in paths else paths[0]: module}
        path = str(each)
        found = matching(self._module, path, aliases.at) or matching(self._module, path.removeprefix("model."), aliases.at)
        if not found:
            shown = [aliases.shown(each) for each in own]
            such_as = in_every_layer(example(shown))
            given = f"`{path}`" if isinstance(each, str) else f"What was given, {described(each)},"
            raise PathError(
                f"{given} names no module of `{kind}`{near(path, [*own, *shown])}",
                "Give envoys, or paths as in `print(model)`, with `*` for any one name"
                + (f": `{such_as}`." if such_as else "."),
            )
        return found

    def __len__(self) -> int:
        return len(self._module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        modules = {id(module): name for name, module in children(self._module).items()}
        for each in self._module:  # type: ignore[attr-defined]
            yield self._child(modules[id(each)]) if id(each) in modules else each

    def __contains__(self, key: object) -> bool:
        return key in children(self._module)

    def __dir__(self) -> list[str]:
        taken = (f"{name}_" for name in children(self._module) if hasattr(type(self), name))
        return sorted({*super().__dir__(), *dir(self._module), *self._other_names, *taken})

    def __repr__(self) -> str:
        return repr(self._outline())

    def _repr_html_(self) -> str | None:
        return self._outline()._repr_html_()

    def __rich__(self) -> Outline:
        return self._outline()

    def _outline(self) -> Outline:
        """What is shown of it: the modules with their repeats as one line, where the run is paused, and further notes."""
        return Outline(lambda: self._tree.rows(self._own_path), self._notes)

    def _notes(self) -> list[str]:
        """What is to be said below the modules."""
        return []


class NextEnvoy(AtNextVisit, Envoy):
    """A module at its next visit after now: what `envoy.next()` gives."""

    @property
    def source(self) -> Source:
        """The operations of the visit that was met, as in `for visit in block.visits(): visit.source`."""
        if self._met is None:
            raise SourceError(
                f"`{spelled(self._path, 'source', further=True)}` is of a visit that the run has not come to.",
                f"Ask the operation for its next visit: `{spelled(self._path, 'source')}.name_0.next().output`.",
            )
        return super().source

    @classmethod
    def _of(cls, module: torch.nn.Module, path: str, tree: Tree) -> "Envoy":
        return NextEnvoy(module, path, tree)
