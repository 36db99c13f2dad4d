"""A run that is on a server, as its points see it: they ask it what they ask a `Run`.

    run = RemoteRun(line, root, call, paths)
    visit = run.ask(layer, "output", "layer")        # the remote forward goes on to there; its tensor is brought
    run.replace(visit, hidden * 0, "layer")          # sent when the run goes on
    run.finish()

The forward stays paused on the server between two calls. A call goes there only where the run is to go on, or where something
is read that was not brought. An error that is raised there is raised here, at the user's line.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, NoReturn

import torch

from ..changes import Change, change
from ..errors import RemoteError, RunEndedError
from ..inside import Part
from ..paths import spelled
from ..run import Call
from ..visits import FIRST, INPUT, Kind, Which
from .addresses import Paths
from .line import Line, Lost
from .packing import Packed, packed, unpacked
from .refs import Ref
from .visits import RemoteVisit
from .wire import Answer, At, Begin, Message

LEADING: Final = ("nothing", "ask", "to_step", "by_hand", "finish")
"""The verbs that take a run on."""
REPEATED: Final = (*LEADING, "bring", "rest")
"""The verbs that are said again where a run is repeated: what is brought gets numbers on the server."""
START: Final = At(None, "", 0, False, 0, False, False)


class RemoteRun:
    """One model call in progress on a server."""

    def __init__(
        self,
        line: Line,
        root: torch.nn.Module,
        paths: Paths,
        call: Call,
        edits: list[tuple[Any, ...]],
        name_of: Callable[[Any], Hashable],
        by_hand: bool | None = None,
        retries: int = 0,
    ) -> None:
        """Nothing is sent yet. `name_of` gives the name of what the server has, `retries` how often a lost run is repeated."""
        self.root = root
        self.open = True
        self.cut_short = False
        self.changes: list[Change] = []
        self.at: RemoteVisit | None = None
        self._line = line
        self._paths = paths
        self._name_of = name_of
        self._number = line.number()
        self._call = call
        self._retries = retries
        self._log: list[Message] = []
        self._before: list[tuple[str, tuple[Any, ...]]] = []
        self._parts: dict[Hashable, Any] = {}
        self._failed_with = ""
        self._state = START
        self._caches = 0
        self._begin: Begin | None = Begin(
            call.name,
            packed((call.args, call.kwargs), places=name_of),
            by_hand,
            _seed() if call.name != "forward" else None,
            packed(edits, places=name_of) if edits else None,
        )

    @classmethod
    def forked(cls, earlier: "RemoteRun", number: int, at: At) -> "RemoteRun":
        """A run that the server has forked from another."""
        run = cls.__new__(cls)
        run.__dict__.update(
            vars(earlier), _number=number, changes=[*earlier.changes], _before=[], _log=[], _parts={}, _begin=None, _caches=0
        )
        run._arrived(at)
        return run

    # Asking

    def ask(self, module: torch.nn.Module, kind: Kind, path: str, which: Which = FIRST, bring: bool = True) -> RemoteVisit:
        """Have the forward run on to a visit, and bring what is asked for."""
        at = self.at
        if at is not None and at.module is module and not which and (at.kind == kind or kind == INPUT):
            return at
        value = self._send("ask", self._paths.address(module), kind, path, which, kind if bring else "")
        visit = self.at
        assert visit is not None
        if value is not None:
            visit.has_brought(value)
        return visit

    def to_step(self, step: int) -> bool:
        """Run on to the start of `step`; `False` where the model ends before it begins."""
        return bool(self._send("to_step", step))

    def apply(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> NoReturn:
        """A module of one's own is on this side only."""
        raise RemoteError(
            f"`{spelled(path)}(..., hook=True)` is a call in the model's forward pass, which runs on a server.",
            "Leave `hook=True` away, or do it next to the model: `model.submit(function)`.",
        )

    def watch(self, module: torch.nn.Module, watcher: Any) -> NoReturn:
        """A watcher is called at each visit, and a visit here is a message."""
        raise RemoteError(
            "A watcher cannot look at a run on a server.", "Use `tracer.cache(...)`, or `model.submit(function)`."
        )

    def given(self, module: torch.nn.Module) -> NoReturn:
        """Gradients do not travel."""
        raise no_gradients()

    def part(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The part of this key."""
        if key not in self._parts:
            self._parts[key] = make()
        return self._parts[key]

    def listen(self, part: Part) -> None:
        """Have the owner of `part` call its parts apart from here on, before any of them is asked for."""
        self._before.append(("listen", (self._paths.address(part),)))

    def runs_on(self, stack: Any) -> bool:
        """No stack of this process is one of the run's."""
        return False

    def path_of(self, module: torch.nn.Module) -> str:
        """Where a module or a part stands."""
        return module.path if isinstance(module, Part) else self._paths.path(module)

    @property
    def step(self) -> int:
        """The step the model is in, counted from 0."""
        return self._state.step

    @property
    def begun(self) -> bool:
        """Whether the model call has begun."""
        return self._state.begun

    @property
    def finished(self) -> bool:
        """Whether the model call has ended."""
        return self._state.finished

    # Editing

    def replace(self, visit: RemoteVisit, value: Any, path: str) -> None:
        """Have the model go on with `value` at the visit it is paused at."""
        before = visit.replace(value)
        self.changes.append(change(path, visit.kind, self.step, before, value))

    def skip(self, visit: RemoteVisit, value: Any, path: str) -> None:
        """Leave out the forward of the module the model is about to enter, and go on with `value` as its output."""
        visit.skip(value)
        self.changes.append(change(path, "skip", self.step, None, value))

    # Caches, handles, and runs held by hand

    def cache(self, paths: Iterable[str], keep: Any, named: bool) -> int:
        """Have a cache filled from here on; its number."""
        self._before.append(("cache", ([*paths], keep, named)))
        self._caches += 1
        return self._caches - 1

    def ask_cache(self, verb: str, *args: Any) -> Any:
        """Something of a cache, also after the run has ended."""
        return self._send(verb, *args, closed=True)

    def ref(self, visit: RemoteVisit, kind: Kind) -> Ref:
        """A handle of the first tensor at a visit."""
        return Ref(self._line, *self._send("value", kind))

    def begin_by_hand(self) -> None:
        """Begin a run that is held by hand; it is paused before the first module."""
        self._send("nothing")

    def lead(self, name: str, *args: Any) -> None:
        """Have a run that is held by hand led somewhere."""
        self._send("by_hand", name, *args)

    def look(self, verb: str, *args: Any) -> Any:
        """Something that is looked at."""
        value = self._send(verb, *args, closed=True)
        return unpacked(value, there=self._here) if isinstance(value, Packed) else value

    def fork(self) -> "RemoteRun":
        """A second run at the same place."""
        number = self._line.number()
        return RemoteRun.forked(self, number, self._send("fork", number))

    # Ending

    @property
    def result(self) -> Any:
        """What the model call has returned; the rest of it runs first."""
        self._refuse_ended()
        return unpacked(self._send("result", closed=True))

    @result.setter
    def result(self, value: Any) -> None:
        self._refuse_ended()
        self._send("set_result", packed(value, places=self._name_of), closed=True)

    def finish(self) -> None:
        """Let the model run to its end; what it returns stays there until it is read."""
        self._refuse_ended()
        if self.open:
            self._send("finish")

    def close(self) -> None:
        """End the run wherever it is."""
        if not self.open:
            return
        self.open, self.at = False, None
        self.cut_short = not self.finished
        if self.cut_short and self._begin is None:
            self._line.close_run(self._number)

    def _refuse_ended(self) -> None:
        if self._failed_with:
            raise RunEndedError(
                f"This run has ended: its forward pass raised `{self._failed_with}`.",
                "Open a new trace to run the model again.",
            )
        if self.cut_short:
            raise RunEndedError(
                "This run was closed before its end, so it has no result.", "Open a new trace to run the model."
            )

    def __del__(self) -> None:
        if getattr(self, "_begin", None) is None and hasattr(self, "_number"):
            self._line.forget("run", self._number)

    # Inside

    def _send(self, verb: str, *args: Any, closed: bool = False) -> Any:
        """Send a message and take in its answer."""
        if not self.open and not closed:
            raise RunEndedError("This run has ended.", "Read points inside the `with` block, or open a new trace.")
        args = tuple(self._paths.address(each) if isinstance(each, torch.nn.Module) else each for each in args)
        writes = self.at.writes() if self.at is not None else None
        message = Message(self._number, self._begin, self._before, writes, verb, args)
        self._begin, self._before = None, []
        if self._retries and (verb in REPEATED or message.begin is not None or writes is not None):
            self._log.append(message)
        try:
            answer = self._line.go(message)
        except Lost as gone:
            answer = self._again(gone, message)
        if answer.error is not None:
            self._raise(answer)
        if verb in LEADING:
            self._arrived(answer.at)
        return answer.value

    def _arrived(self, at: At) -> None:
        """The run is somewhere else now."""
        self._state = at
        if self.at is not None:
            self.at.over = True
        self.at = None
        if at.address is not None:
            self.at = RemoteVisit(self._module_at(at), at, self._send, self._name_of, self._here)

    def _here(self, name: tuple[str, str]) -> Any:
        """What is here under a name: a module of the tree."""
        return self._paths.module(name[1])

    def _module_at(self, at: At) -> torch.nn.Module:
        """The module or the part of one that the run is paused at."""
        assert at.address is not None
        path, part, _ = at.address
        if part:
            found = next((each for each in self._parts.values() if self._paths.address(each) == at.address), None)
            if found is not None:
                return found  # type: ignore[no-any-return]
        return self._paths.module(path)

    def _again(self, gone: Lost, message: Message) -> Answer:
        """Repeat the run, which is lost, as far as it had come, and then what was asked; else tell that it is lost."""
        what = f"run {self._number} (`{self._call.name}`){self._place()}"
        while self._retries:
            self._retries -= 1
            try:
                return self._repeat(message)
            except Lost as again:
                gone = again
        self.open, self.cut_short = False, True
        raise self._line.lost(gone, what) from None

    def _repeat(self, message: Message) -> Answer:
        """Say again all that has taken the run on, edits included."""
        self._line.wait_until_back()
        messages = self._log if any(each is message for each in self._log) else [*self._log, message]
        answer = None
        for each in messages:
            answer = self._line.go(each)
            if answer.error is not None:
                break
        assert answer is not None
        return answer

    def _place(self) -> str:
        """Where the run was, for a message."""
        at = self.at
        if at is None:
            return ", which had not come to a point"
        return f", paused at `{spelled(self.path_of(at.module), at.kind)}`"

    def _raise(self, answer: Answer) -> NoReturn:
        """Raise what was raised on the server, with the edits that were made here."""
        error = answer.error
        assert error is not None
        if answer.at.finished and not self._state.finished:
            self._failed_with = type(error).__name__
            for each in self.changes:
                error.add_note(f"Edited before: {each}")
            self._state = answer.at
            self.at = None
        raise error


def no_gradients() -> RemoteError:
    """What an ask for a gradient is refused with."""
    return RemoteError(
        "Gradients do not travel: what was read of a model on a server is a copy.",
        "Run the backward pass next to the model: `model.submit(function)`, whose traces have gradients.",
    )


def _seed() -> int:
    """Where the random numbers of a run begin: after those of this process, so that `torch.manual_seed` holds for both."""
    return int(torch.randint(2**31, ()))
