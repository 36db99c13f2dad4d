"""Begin a run, end it whatever happens.

with model.trace("The Eiffel Tower is in the city of") as tracer:
    hidden = model.transformer.h[5].output
tracer.result
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType, FunctionType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .backward import Backward, BackwardBlocks
from .batching import Given, divided
from .bodies import Barrier, Body
from .cache import Cache, Keep, Positions
from .compat import add_save_to_builtins
from .current import enter, leave, opening_frames
from .distributed.first import OneOfRanks
from .entering import is_entered
from .errors import InputError, InvokeError, RunEndedError, RunError, StepError
from .invokes import Division, Invoke, InvokeInPlace, Invokes, outside_invokes
from .paths import spelled
from .run import Call, Run, Stop
from .shared import SharedRun
from .steps import Steps
from .tracebacks import at_the_users_line, for_the_reader
from .tree import Envoy, Tree
from .tuples import explain
from .visits import Forward, Watcher

if TYPE_CHECKING:
    from .interactive.held import HeldRun


class Trace(OneOfRanks):
    """One call of the model, begun by `with` and ended when the block is left, however it is left.

    `tracer.model` is the model's tree bound to this run, `tracer.result` what the call returns, `tracer.iter[...]` a loop over
    the steps of a generation, `tracer.stop()` an early end, `tracer.invoke(...)` one of several inputs.
    """

    __slots__ = ("_blocks_of_backward", "_call", "_division", "_invokes", "_name", "_results", "_run", "_tree", "_view")
    by_hand = False  # held by hand, and so to be led: what `start()` gives, wherever the model runs

    def __init__(self, tree: Tree, name: str, call: Call | None, division: Division | None) -> None:
        """Nothing runs before the block is entered, or `result` is asked for.

        Without a `call` the trace has no input of its own and is divided into invokes; without a `division` it cannot be.
        """
        self._tree, self._name, self._call, self._division = tree, name, call, division
        self._run: Run | None = None
        self._invokes: Invokes | None = None
        self._results: list[Any] | None = None
        self._view: Envoy | None = None
        self._blocks_of_backward = BackwardBlocks()

    def __enter__(self) -> "Trace":
        if (self._run is not None and self._run.open) or (self._invokes is not None and self._invokes.open):
            raise RunError("This trace is open already.", "Call `model.trace(...)` once more for a second run.")
        add_save_to_builtins()
        self._run = self._view = self._invokes = self._results = None
        frames = opening_frames()
        if self._call is None:
            self._divide(frames)
        else:
            self._begin(self._run_of(self._call), frames)
        self._blocks_of_backward.allow_in(*[frame.f_code for frame in frames])
        return self

    def __del__(self) -> None:
        if isinstance(run := getattr(self, "_run", None), SharedRun):
            run.__del__()  # the stack that an edit is paused on holds it, so it is not collected by itself

    @at_the_users_line
    def start(self, keep: bool = True) -> "HeldRun":
        """Begin the run and hold it by hand: paused before the first module, it stays open across cells and prompt lines.

            run = model.trace("The Eiffel Tower is in").start()
            run.step()                                  # `run.back_to`, `run.fork`: see `HeldRun`
        With `keep` the outputs of completed modules are kept, so that going back and forking need not compute them again.
        """
        from .interactive.held import HeldRun

        return HeldRun.begun(self, keep)

    @at_the_users_line
    def fork(self, keep: bool = True) -> "HeldRun":
        """Raise: what a fork is led by has to be kept from the start."""
        raise RunError(
            "This trace keeps nothing that it could be forked by.",
            "Write `model.trace(..., keep=True)`, or hold the run by hand: `model.trace(...).start()` forks as it is.",
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for_the_reader(traceback)  # the reader's own lines remain
        try:
            return self._leave(error)  # type: ignore[return-value]  # `bool`, and a checker would take names for unbound
        except BaseException as raised:
            raised.__traceback__ = for_the_reader(raised.__traceback__)
            raise
        finally:
            self._blocks_of_backward.end()

    def _leave(self, error: BaseException | None) -> bool:
        """End whatever has been begun; whether `error` has thereby done what it was raised for."""
        if self._invokes is None:
            return self._end(error)
        leave(self._invokes)
        if self._results is None and error is None:
            self._run_invokes(self._invokes)
        else:
            self._invokes.open = False
        return False

    def _run_of(self, call: Call, make: Callable[..., Forward] | None = None) -> Run:
        """A run of the code of one block, with the model's stored edits."""
        if self._tree.edits:
            return SharedRun(self._tree.root, call, self._tree.memory, (), self._tree.edits, make or self._tree.forward)
        return Run(self._tree.root, call, self._tree.memory, make or self._tree.forward)

    def _begin(self, run: Run, frames: Iterable[FrameType]) -> None:
        """Make `run` the one that points mean where these frames open the trace."""
        self._run = run
        self._view = None
        enter(run, frames)

    def _end(self, error: BaseException | None) -> bool:
        """End the run; whether `error` has thereby done what it was raised for."""
        run = self._opened()
        if error is None:
            try:
                run.finish()
            finally:
                leave(run)
                run.close()
            return False
        explain(error, run)
        leave(run)
        try:
            run.close()
        except Exception as closing:
            # The reader's own error comes first; what the model's `finally` blocks raised is noted on it.
            error.add_note(f"While the forward pass was closed it raised {type(closing).__name__}: {closing}")
        return isinstance(error, Stop) and error.run is run

    # Invokes

    def invoke(self, *inputs: Any, rows: Any = ..., **keywords: Any) -> Any:
        """Give the trace one of several inputs, with a block of its own that sees its rows.

            with model.trace() as tracer:
                with tracer.invoke("The Eiffel Tower is in"):
                    hidden = model.transformer.h[5].hidden          # [1, seq, hidden]

                @tracer.invoke("The Colosseum is in")               # or tracer.invoke(prompt, function)
                def patched():
                    model.transformer.h[5].hidden = hidden
                    return model.lm_head.output
            patched.result

        The inputs become one batch, and the blocks run when the trace ends. Names that a block binds are there afterwards; a
        block that reads a name an earlier one has yet to bind waits for it. `tracer.invoke()` without input sees all rows, and
        so does one with `rows=None`. With `model.trace(batched=False)` each block runs in place, with a forward pass of its
        own. Raises `InvokeError` where a block cannot run elsewhere (it has a `return`, or no source).
        """
        if rows not in (..., None):
            raise InvokeError(f"`rows={rows!r}` is not known.", "`rows=None` lets the invoke see all rows; else leave it out.")
        if self._invokes is None:
            self._divide(opening_frames())
        function = inputs[-1] if inputs and callable(inputs[-1]) and not isinstance(inputs[-1], torch.nn.Module) else None
        inputs = inputs if function is None else inputs[:-1]
        given = Given(inputs, keywords) if inputs or keywords else None
        assert self._division is not None
        assert self._invokes is not None
        together = self._division.batched
        invoke: Any = Invoke(self._invokes, given, rows is None) if together else InvokeInPlace(self, given)
        if isinstance(function, FunctionType):
            self._blocks_of_backward.allow_in(function.__code__)
        return invoke if function is None else invoke(function)

    def backward(
        self,
        loss: torch.Tensor,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Backward:
        """The backward pass of `loss`: at once, or, entered by `with`, as far as gradients are read in the block.

            with tracer.backward(loss):
                model.transformer.h[5].output_grad          # [batch, seq, hidden]; the last layer first
                hidden.grad = hidden.grad * 2               # of any tensor that was read in the trace

        The arguments are those of `torch.Tensor.backward`. `with loss.backward():` is the same where it is written in the block
        of the trace itself; this also works in functions that the block calls.
        """
        running = Backward(loss, partial(loss.backward, gradient, retain_graph, create_graph, inputs))
        if not is_entered(sys._getframe(1)):
            running.run()
        return running

    def cache(
        self,
        modules: Any = None,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
        positions: Positions = None,
    ) -> Cache:
        """Keep what modules return, from here on, without pausing.

            with model.trace("The Eiffel Tower") as tracer:
                cache = tracer.cache(modules=["transformer.h.*.mlp", model.lm_head], positions=-1)
            cache["transformer.h.0.mlp"].output        # [batch, 1, hidden]
            cache.transformer.h[0].mlp.output

        `modules` are envoys or paths, `*` standing for any one name; all modules where it is `None`. `positions` (an index, a
        slice or a list) chooses from dimension 1 of every `[batch, seq, ...]` tensor of three dimensions before it is stored;
        in a padded batch they count padding, so count from the end where it is on the left.
        In an invoke the cache keeps the invoke's rows. Raises `PathError` for a path that names no module.
        """
        keep = Keep(device, dtype, detach, include_output, include_inputs, positions)
        return self._keeping(Envoy(self._tree.root, "", self._tree)._chosen(modules), keep, modules is not None)

    def _keeping(self, chosen: dict[str, torch.nn.Module], keep: Keep, named: bool) -> Cache:
        """A cache of these modules from here on; `named` says that somebody has named them."""
        cache = Cache(own=self._tree.memory.aliases.own)

        def watch(run: Run) -> None:
            for path, module in chosen.items():
                run.watch(module, cache.watcher(path, keep, run.view(path), named=named))

        if self._run is None and self._invokes is not None:
            self._invokes.at_begin.append(watch)
        else:
            watch(self._opened())
        return cache

    def watch(self, module: torch.nn.Module, watcher: Watcher) -> None:
        """From here on have `watcher` called with each visit of the module, at its input and its output, without pausing."""
        self._opened().watch(module, watcher)

    def barrier(self, parties: int) -> Barrier:
        """A place where `parties` invokes wait for each other: call it in each of them; it can be used again and again."""
        return Barrier(parties, self._running_body)

    def _running_body(self) -> Body | None:
        """The body that calls this; nothing where invokes run one after another."""
        run = self._opened()
        if not isinstance(run, SharedRun):
            return None
        body = run.running()
        if body is None:
            raise outside_invokes()
        return body

    def _divide(self, frames: Iterable[FrameType]) -> None:
        """Be a trace of invokes from now on, which a trace that has begun to run on its own cannot be."""
        run = self._run
        if self._division is None or (run is not None and run.begun):
            raise InvokeError(
                "This trace has an input of its own, so it cannot have invokes.",
                "Write `with model.trace() as tracer:` and give each prompt to `tracer.invoke(...)`.",
            )
        if run is not None:
            leave(run)
            run.close()
            self._run = None
        elif self._call is not None:
            self._opened()
        self._invokes = Invokes(self._tree.root)
        self._results = None if self._division.batched else []
        enter(self._invokes, frames)

    def _run_invokes(self, invokes: Invokes) -> None:
        """Run the model once on all inputs, and every body with it."""
        assert self._division is not None
        try:
            bodies = invokes.bodies()
            given = [invoke.given for invoke in invokes.written if invoke.given is not None]
            if not given:
                raise InputError(
                    "The trace has no input.",
                    'Pass a prompt, as in `model.trace("The Eiffel Tower")`, or give one to `tracer.invoke(...)` in its block.',
                )
            call, sizes = self._division.batch(given)
            rows = iter(divided(sizes))
            for invoke, body in zip(invokes.written, bodies, strict=True):
                own = next(rows) if invoke.given is not None else None
                body.rows = None if invoke.all_rows else own
            invokes.open = False
            run = SharedRun(self._tree.root, call, self._tree.memory, bodies, self._tree.edits, self._tree.forward)
            self._begin(run, opening_frames())
            for begin in invokes.at_begin:
                begin(run)
            self._end(None)
        finally:
            invokes.export()

    def begin_alone(self, given: Given | None) -> Run:
        """Begin a forward pass of its own for one invoke, whose block runs where it stands."""
        assert self._division is not None
        assert self._invokes is not None
        if not self._invokes.open:
            raise InvokeError("This trace has ended.", "Write each invoke directly in its trace's block.")
        if given is None:
            raise InvokeError(
                "`tracer.invoke()` without input sees the rows of all invokes, and with `batched=False` each runs alone.",
                "Leave `batched=False` away, or give the invoke an input.",
            )
        if self._run is not None and self._run.open:
            raise InvokeError("An invoke was opened inside another.", "Write each invoke directly in its trace's block.")
        call, _ = self._division.batch([given])
        run = self._run_of(call)
        self._begin(run, opening_frames())
        return run

    def end_alone(self, error: BaseException | None) -> bool:
        """End the forward pass of one invoke."""
        done = self._end(error)
        if self._results is not None and (error is None or done):
            self._results.append(self._opened().result if error is None else None)  # a stopped pass has no result
        return done

    @property
    def model(self) -> Envoy:
        """The model's tree bound to this run, for two runs side by side: `b.model.h[3].output = a.model.h[3].output`."""
        if self._view is None:
            self._view = Envoy(self._tree.root, "", Tree(self._tree.root, self._tree.memory, self._opened()))
        return self._view

    @property
    @at_the_users_line
    def result(self) -> Any:
        """What the model call returns: inside the block the rest of it runs first; without a block, all of it.

        With invokes it is the whole batch's; with `batched=False` a list of each invoke's.
        """
        if self._run is None and self._invokes is None:
            with self:
                pass
        if self._results is not None and not (self._run is not None and self._run.open):
            return self._results
        return self._opened().result

    @result.setter
    def result(self, value: Any) -> None:
        self._opened().result = value

    @property
    def iter(self) -> Steps:
        """The steps of a generation: `for step in tracer.iter[2:8:2]:`; the loop ends when generation ends."""
        return Steps(self._opened())

    def all(self) -> Iterator[int]:
        """All steps, as `tracer.iter[:]`."""
        return self.iter[:]

    def next(self, step: int = 1) -> None:
        """Run on to the next step, or by so many; what is asked from here on is asked of that step."""
        run = self._opened()
        if step < 1:
            raise StepError(f"`tracer.next({step})` would not go forward.", "A model runs its steps in order: `tracer.next()`.")
        run.to_step(run.step + step)

    def stop(self) -> None:  # not `NoReturn`: what is behind the block is reached
        """Close the forward pass and leave the block: nothing behind this point is computed."""
        run = self._opened()
        if not run.open:
            raise RunEndedError("This trace has ended already.", "Call `tracer.stop()` inside its `with` block.")
        raise Stop(run)

    def _opened(self) -> Run:
        """The run, which begins when the block is entered."""
        if self._run is None and self._invokes is not None:
            raise outside_invokes()
        if self._run is None:
            raise RunError(
                "This trace has not begun.", "Write `with model.trace(...) as tracer:` and use `tracer` in the block."
            )
        return self._run

    def __repr__(self) -> str:
        run = self._run
        if run is None:
            count = 0 if self._invokes is None else len(self._invokes.written)
            begun = "not begun; it is begun by `with`" + " or `.result`" * (self._call is not None)
            state = f"{count} invoke{'s' * (count > 1)}" if count else begun
        elif run.at is not None:
            state = f"paused at {spelled(run.path_of(run.at.module), run.at.kind)}, step {run.step}"
        else:
            state = "closed" if run.cut_short else "finished" if run.finished or not run.open else "at the start"
        return f"<{self._name} of {type(self._tree.root).__name__}: {state}>"
