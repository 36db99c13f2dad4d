"""The server: an actor that holds a model, and the runs of all who are connected.

    server = Server(folder, "llama", options, Limits())
    opened = server.open("alice@laptop")
    server.go(message_sent(opened.session, Message(run=1, begin=..., verb="ask", ...)))      # an `Answer`, as it is sent

It is a plain class; `cluster.place` makes it an actor, whose methods Ray calls on threads of its own. Runs are independent
coroutines, each on its lane, and take turns at computing.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final

import torch

from ..errors import LoadError, RemoteError, RunEndedError
from ..interactive.held import HeldRun
from ..language import LanguageModel
from ..visits import Between
from .addresses import Paths
from .functions import Functions
from .holding import weights_of
from .lanes import Lanes
from .packing import Packed, form_of, packed, unpacked
from .ranks import Alone
from .served import ServedRun, device_of, told
from .sessions import Limits, Seat, Session, Sessions
from .wire import VERSION, Answer, At, Description, Message, Opened, answer_sent, message_meant

NOWHERE: Final = At(None, "", 0, False, 0, False, True)


class Server:
    """A model, and who is connected to it."""

    def __init__(
        self, name_or_folder: str, name: str, options: dict[str, Any], limits: Limits, ranks: Alone | None = None
    ) -> None:
        """Load the model; `options` are those of `LanguageModel`, `ranks` the actors that hold it together."""
        self.name = name
        self._ranks = ranks = Alone() if ranks is None else ranks
        self._model = model = LanguageModel(name_or_folder, dispatch=True, **options)
        self._rename = options.get("rename")
        self._paths = Paths(model._module)
        self._weights = weights_of(model._module)
        self._turns = ranks.turns
        self._lanes = Lanes()
        self._functions = Functions(model, ranks, limits.rows)
        self._sessions = Sessions(limits, model._view, self._close, lambda session: self._turns.forget(session.queued))
        self._life = uuid.uuid4().hex
        if ranks.answers:
            threading.Thread(target=self._watch, name="nnsight_eager watch", daemon=True).start()

    # Clients

    def describe(self) -> Description:
        """What a client builds its tree from."""
        module = self._model._module
        config, generation = getattr(module, "config", None), getattr(module, "generation_config", None)
        dtype = str(getattr(module, "dtype", "")).removeprefix("torch.")
        return Description(VERSION, self.name, config, self._model.tokenizer, generation, dtype, self._rename)

    def open(self, owner: str, number: int | None = None) -> Opened:
        """Let a client in."""
        session = self._sessions.open(owner, number)
        with self._ranks.alike("open", owner, session.number):
            pass
        return Opened(session.number, self._life, self._sessions.limits.silence / 4)

    def beat(self, session: int, forget: list[tuple[str, int]]) -> bool:
        """A sign of life, and what the client has no use for any more; `False` where it is not known."""
        try:
            found = self._sessions[session]
        except KeyError:
            return False
        if forget:
            self._ranks.take_away(found.when_quiet, partial(self._forget, found, forget))
        return True

    def _forget(self, session: Session, forget: list[tuple[str, int]]) -> None:
        with self._ranks.alike("beat", session.number, forget):
            for kind, number in forget:
                if kind == "ref":
                    session.refs.pop(number, None)
                else:
                    self._close(session, number, "was closed by its client")

    def leave(self, session: int) -> None:
        """The client goes, and what it has here goes with it."""
        found = self._sessions.shut(session)  # nothing begins for this client any more
        if found is not None:
            self._ranks.take_away(found.when_quiet, partial(self._end, session))

    def _end(self, session: int) -> None:
        with self._ranks.alike("leave", session):
            self._sessions.end(session)

    def status(self) -> dict[str, Any]:
        """Who is connected, what runs are paused where, and how long each client has waited for its turns, in seconds."""
        clients = []
        for session in self._sessions.all():
            session.look(self._weights)
            waits = sorted(self._turns.waits(session.queued))
            clients.append(
                {
                    "owner": session.owner,
                    "runs": {
                        number: {"at": repr(seat.run._trace), "bytes": seat.bytes, "idle": time.monotonic() - seat.touched}
                        for number, seat in [*session.seats.items()]
                        if not seat.ended
                    },
                    "handles": len(session.refs),
                    "bytes": session.nbytes(self._weights),
                    "turns": len(waits),
                    "median wait": waits[len(waits) // 2] if waits else 0.0,
                    "longest wait": waits[-1] if waits else 0.0,
                }
            )
        return {"name": self.name, "pid": os.getpid(), "life": self._life, "clients": clients}

    # Runs

    def go(self, sent: Any) -> Any:
        """Take a run as far as a message says; `None` where the client is not known, after a restart."""
        session, message = message_meant(sent)
        try:
            found = self._sessions[session]
            with found.under_way():
                return answer_sent(self._went(found, message, sent))
        except KeyError:
            return None

    def _went(self, found: Session, message: Message, sent: Any) -> Answer:
        """What comes of a message on all ranks."""
        limit = self._sessions.limits.memory
        try:
            if message.begin is not None and limit is not None:
                self._refuse_more(found, limit)
            with self._ranks.alike("go", sent) as call:
                answer = self._gone(found, message, call)
        except Exception as error:
            return Answer(NOWHERE, None, told(error))
        if limit is not None and not answer.at.finished and not isinstance(answer.value, At):
            answer = self._within_memory(found, message.run, answer, limit)
        return answer

    def _gone(self, found: Session, message: Message, call: int) -> Answer:
        """What came of a message."""
        if message.begin is None:
            seat = found.seat(message.run)
        else:
            self._close(found, message.run, "was lost on the way, and begun anew")
            seat = Seat(self._lanes.take())
            seat.lane.runs = 1  # type: ignore[union-attr]
        seat.busy = True
        try:
            answer: Answer = seat.do(self._in_turn, found, seat, message, call)
        except BaseException:
            if message.run not in found.seats:
                self._leave_lane(seat)
            raise
        finally:
            seat.busy, seat.touched = False, time.monotonic()
        if message.verb == "finish" and answer.error is None and not seat.run.by_hand:
            self._leave_lane(seat)
        if answer.error is not None and answer.at.finished and not seat.run.by_hand:
            self._close(found, message.run, "has ended: its forward pass has failed")
        if isinstance(answer.value, HeldRun):
            answer = answer._replace(value=self._forked(found, seat, answer.value, message))
        if not found.open:  # it has gone while this waited for its turn: what was seated since has nobody who will close it
            self._sessions.clear(found)
        return answer

    def _in_turn(self, session: Session, seat: Seat, message: Message, call: int) -> Answer:
        """On the lane: do what the message says when it is the client's turn; it may begin the run."""
        with self._turns.of(session.queued, call):
            if message.begin is not None:
                seat.run = ServedRun(session.model, message.begin, partial(session.lookup, session.model), self._paths)
                session.seats[message.run] = seat
            answer = seat.run.do(message)
            if message.verb == "value" and answer.error is None:
                number = session.keep(answer.value)
                answer = answer._replace(value=(number, form_of(answer.value)))
        if self._sessions.limits.memory is not None:
            seat.bytes = seat.run.nbytes(self._weights)
        return answer

    def _forked(self, session: Session, seat: Seat, held: HeldRun, message: Message) -> At:
        """Seat a fork on the lane of the run it was forked from."""
        fork, lane = ServedRun.of(seat.run, held), seat.lane
        assert lane is not None
        lane.runs += 1
        (number,) = message.args
        taken = Seat(lane)
        taken.run = fork
        session.seats[number] = taken
        return lane.do(fork.at)  # type: ignore[no-any-return]

    def _close(self, session: Session, number: int, why: str) -> None:
        """End a run, on its lane, behind what it is doing."""
        seat = session.seats.pop(number, None)
        if seat is None:
            return
        session.ended[number] = why
        with self._ranks.alike("close", session.number, number):
            with contextlib.suppress(Exception):  # what the model's own `finally` blocks raise has no reader
                seat.do(seat.run.close)
            self._leave_lane(seat)

    def _leave_lane(self, seat: Seat) -> None:
        """The run does not live on its lane any more."""
        lane, seat.lane = seat.lane, None
        if lane is not None:
            lane.runs -= 1
            if not lane.runs:
                self._lanes.give(lane)

    def close(self, session: int, run: int) -> None:
        """End a run that its client is done with."""
        with contextlib.suppress(KeyError):  # the client is gone, and its runs with it
            found = self._sessions[session]
            self._ranks.take_away(found.when_quiet, partial(self._close, found, run, "has ended"))

    def _refuse_more(self, session: Session, limit: int) -> None:
        held = session.nbytes(self._weights)
        if held > limit:
            raise RemoteError(
                f"{len(session.seats)} runs and {len(session.refs)} handles of this client hold {_megabytes(held)} there; its "
                f"limit is {_megabytes(limit)}.",
                "Let some of them go: leave their blocks, `run.close()`, `del` handles.",
            )

    def _within_memory(self, session: Session, run: int, answer: Answer, limit: int) -> Answer:
        """The answer, or where the client now holds more than it may, an error: the run is closed."""
        held = session.nbytes(self._weights)
        if held <= limit:
            return answer
        self._close(session, run, "was closed: its client held more memory than it may")
        error = RunEndedError(
            f"Run {run} was closed: with it this client held {_megabytes(held)} on the server, more than its limit of "
            f"{_megabytes(limit)}.",
            "Run a shorter prompt or a smaller batch, or reduce next to the model: `model.submit(function)`.",
        )
        return Answer(NOWHERE, None, error)

    # Functions and handles

    def run_function(self, session: int, job: int, sent: Packed) -> tuple[str, Any]:
        """Run a function next to the model: "returned" and what, "raised" and what, or "unknown" for the client."""
        return self._answered(session, lambda found: self._functions.run(found, job, sent))

    def run_pass(self, asked: list[tuple[int, int, Packed]]) -> None:
        """Where rank 0 tells this one to: run the functions that share a pass there."""
        self._functions.run_pass([(self._sessions.or_stranger(session), job, sent) for session, job, sent in asked])

    def progress(self, session: int, job: int) -> tuple[int, int, str]:
        """How far a function has come: done, of how much, of what."""
        return self._functions.progress(session, job)

    def cancel(self, session: int, job: int) -> None:
        """Have a function end when it next lets the model go on, or says how far it has come."""
        self._sessions[session].cancelled.add(job)

    def call(self, session: int, path: str, sent: Packed) -> tuple[str, Any]:
        """Apply a module to values, beside every run."""
        return self._answered(session, lambda found: packed(self._applied(found, path, sent)), "call", path, sent)

    def _applied(self, session: Session, path: str, sent: Packed) -> Any:
        args, kwargs = unpacked(sent, device=device_of(self._model._module), there=partial(session.lookup, session.model))
        with self._functions.turn(session), torch.no_grad():
            return self._paths.module(path)(*args, **kwargs)

    def handled(self, session: int, number: int, operation: str, sent: Packed | None) -> tuple[str, Any]:
        """Do something with what a client has a handle of; a tensor that comes of it stays here, under a number of its own."""
        return self._answered(
            session, lambda found: self._handled(found, number, operation, sent), "handled", number, operation, sent
        )

    def _handled(self, session: Session, number: int, operation: str, sent: Packed | None) -> Any:
        tensor = session.kept(number)
        if sent is None:
            return packed(tensor)
        args, kwargs = unpacked(sent, device=tensor.device, there=partial(session.lookup, session.model))
        with self._functions.turn(session), torch.no_grad():
            function = args[0] if operation == "apply" else getattr(torch.Tensor, operation)
            value = function(tensor, *args[operation == "apply" :], **kwargs)
            if not isinstance(value, torch.Tensor) or not value.dim():
                return packed(value)
            if operation == "__getitem__":
                value = value.clone()  # a view would keep all of it
            return session.keep(value), form_of(value)

    def _answered(self, session: int, do: Callable[[Session], Any], *told_as: Any) -> tuple[str, Any]:
        """What came of doing something for a client; `told_as` is the method, and its arguments, that all ranks do then."""
        try:
            found = self._sessions[session] if self._ranks.answers else self._sessions.or_stranger(session)
            with found.under_way(), self._alike(session, *told_as):
                return self._tried(found, do)
        except KeyError:
            return "unknown", None

    def _alike(self, session: int, *told_as: Any) -> AbstractContextManager[Any]:
        return self._ranks.alike(told_as[0], session, *told_as[1:]) if told_as else nullcontext()

    def _tried(self, found: Session, do: Callable[[Session], Any]) -> tuple[str, Any]:
        try:
            return "returned", do(found)
        except Exception as error:
            return "raised", told(error)

    # Inside

    def _stand_together(self) -> Between:
        """Find out how the model is divided, which all ranks do at the same time; refused where it is not."""
        between = self._model._tree.memory.look_between(self._model._module, "forward")
        if between is None:
            raise LoadError(
                f"`{self.name}` is not divided among ranks: transformers has no plan for its architecture.",
                "Leave `--tp` away; `--device-map auto` spreads a model over the devices of one actor.",
            )
        return between

    def _watch(self) -> None:
        """Close what nobody will ask for any more."""
        every = min(self._sessions.limits.silence, self._sessions.limits.idle) / 4
        while True:
            time.sleep(every)
            self._sessions.close_silent(self.leave)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
