"""What IPython understands after `%load_ext nnsight_eager`: each magic is one line over a function of a held run.

    %trace model "The Eiffel Tower is in"        # run = model.trace("The Eiffel Tower is in").start()
    %step 3                                      # run.step(3)
    %to transformer.h.5.mlp                      # run.to("transformer.h.5.mlp")
    %until has_nan                               # run.until(has_nan)

`%%trace model "..."` runs the cell as the body of a trace.
"""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from IPython.core.completer import CompletionContext, SimpleCompletion, context_matcher
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class

from ..errors import NnsightEagerError
from ..paths import dotted, example
from ..trace import Trace
from ..tracebacks import at_the_users_line
from ..visits import INPUT, OUTPUT
from . import predicates
from .display import Edits, Where
from .held import HeldRun

TYPED: Final = re.compile(r"\s*%(to|back|until)\s+(\S+\s+)?(\S*)")
"""A line with a magic that takes a point or a predicate: the magic, a point, and what is typed of the next word."""

WRITTEN_WRONG: Final = (SyntaxError, NameError, AttributeError)
"""What Python raises for an expression that is mistyped."""

MAGICS: Final = {
    r"model\.trace\([^`]*\)\.start\(\)": '`%trace model "a prompt"`',
    r"run\.(step|over|out|finish|where)\(\)": r"`%\1`",
    r'run\.(restart\(\)|back_to\(model, "input"\))': "`%back`",
    r"run\.(to|back)(_to)?\(\.\.\.\)": r"`%\1 PATH`",
}
"""What errors say to write, and the magic for it."""

BACK: Final = r'run\.back_to\(model([^`,]+?)(?:, "(\w+)")?\)'
"""The same of going back to a point: the module, and the kind where it is said."""

TRACE: Final = "_nnsight_eager_trace"
"""The name that a cell's trace has while the cell runs."""


@magics_class
class HeldRunMagics(Magics):  # type: ignore[misc]
    """`%trace`, `%step`, `%over`, `%out`, `%to`, `%until`, `%where`, `%back`, `%edits`, `%finish`."""

    @line_cell_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def trace(self, line: str, cell: str | None = None) -> HeldRun | None:
        """`%trace model "a prompt"`: hold a run by hand, as `run`; `%%trace model "a prompt"`: run the cell in a trace.

        What follows the model is what `model.trace(...)` takes; `%trace model.generate "a prompt", max_new_tokens=5` generates.
        """
        called, _, given = line.strip().partition(" ")
        if not called:
            raise UsageError('Write the model and its input: `%trace model "The Eiffel Tower is in"`.')
        method = "" if called.endswith((".trace", ".generate")) else ".trace"
        with _told(*WRITTEN_WRONG):
            trace = self.shell.ev(f"{called}{method}({given})")
        if cell is None:
            with _told():
                run = self.shell.user_ns["run"] = trace.start()
            return run  # type: ignore[no-any-return]
        self._run_in(trace, cell)
        return None

    def _run_in(self, trace: Any, cell: str) -> None:
        """Run a cell as the body of `with trace as tracer:`, at its own lines."""
        source = self.shell.transform_cell(cell)
        body = ast.parse(source).body or [ast.Pass()]
        context = ast.withitem(ast.Name(TRACE, ast.Load()), ast.Name("tracer", ast.Store()))
        module = ast.fix_missing_locations(ast.Module([ast.With([context], body, lineno=1, col_offset=0)], []))
        file = self.shell.compile.cache(source, self.shell.execution_count, raw_code=cell)
        self.shell.user_ns[TRACE] = trace
        try:
            exec(compile(module, file, "exec"), self.shell.user_ns)
        finally:
            del self.shell.user_ns[TRACE]

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def step(self, line: str) -> HeldRun:
        """`%step` or `%step 3`: on to the next point, into the module's children."""
        if line and not line.isdecimal():
            raise UsageError(f"`%step` takes a number, and was given `{line}`.")
        with _told():
            return self._run.step(int(line or 1))

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def over(self, line: str) -> HeldRun:
        """`%over`: on past the module that is about to run."""
        _refuse_more(line, "over")
        with _told():
            return self._run.over()

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def out(self, line: str) -> HeldRun:
        """`%out`: on to the output of the module around this one."""
        _refuse_more(line, "out")
        with _told():
            return self._run.out()

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def to(self, line: str) -> HeldRun:
        """`%to transformer.h.5.mlp` or `%to transformer.h.5.mlp input`: on to a point."""
        with _told():
            return self._run.to(*self._point(line, "to"))

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def until(self, line: str) -> HeldRun:
        """`%until has_nan`: on to the first value that satisfies an expression such as `norm_above(100)`."""
        if not line:
            raise UsageError("Write what to stop at: `%until has_nan`, `%until norm_above(100)`.")
        with _told(*WRITTEN_WRONG):
            predicate = eval(line, {**vars(predicates), **self.shell.user_ns})
        with _told():
            return self._run.until(predicate)

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def where(self, line: str) -> Where:
        """`%where`: where the run is paused, in the tree and in the model's own source."""
        return self._run.where()

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def back(self, line: str) -> HeldRun:
        """`%back transformer.h.2`: back to a point; `%back` alone to the start."""
        with _told():
            return self._run.back_to(*self._point(line, "back")) if line else self._run.restart()

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def edits(self, line: str) -> Edits:
        """`%edits`: what was changed."""
        return self._run.edits

    @line_magic  # type: ignore[untyped-decorator]
    @at_the_users_line
    def finish(self, line: str) -> HeldRun:
        """`%finish`: to the end; `run.result` is what the model returns."""
        _refuse_more(line, "finish")
        with _told():
            self._run.finish()
        return self._run

    def _point(self, line: str, magic: str) -> list[Any]:
        """A path and, where it is written, `input`, `output` or `pattern`."""
        words = line.split()
        if not 1 <= len(words) <= 2:
            path = example(self._run.paths()) or "PATH"
            raise UsageError(f"Write one path: `%{magic} {path}`, or `%{magic} {path} input`.")
        return words

    @property
    def _run(self) -> HeldRun:
        """The run that `%trace` has begun, or that the user has called `run`."""
        run = self._held
        if run is None:
            raise UsageError('No run is held as `run`: begin one with `%trace model "a prompt"`.')
        return run

    @property
    def _held(self) -> HeldRun | None:
        """The run that is called `run`, if one is; on a server its calls are the same."""
        run = self.shell.user_ns.get("run")
        return run if isinstance(run, Trace) and run.by_hand else None  # type: ignore[return-value]

    @context_matcher()  # type: ignore[untyped-decorator]
    def completions(self, context: CompletionContext) -> dict[str, Any]:
        """What the Tab key offers behind `%to`, `%back` and `%until`, and nothing else there: `%to 0.` is no number."""
        typed = TYPED.fullmatch(context.text_until_cursor)
        found = self._go_on_with(*typed.groups()) if typed else []
        begun = max(0, len(typed[3]) - len(context.token)) if typed else 0  # what of the word is not in IPython's token
        return {"completions": [SimpleCompletion(each[begun:]) for each in found], "suppress": bool(found)}

    def _go_on_with(self, magic: str, path: str | None, begun: str) -> list[str]:
        """The words that go on from what is typed of one."""
        if magic == "until":
            words = [*predicates.__all__]
        elif path:
            words = [INPUT, OUTPUT]
        else:
            words = [] if self._held is None else self._held.paths()
        return [word for word in words if word.startswith(begun) and not word.startswith("_")]


@contextmanager
def _told(*also: type[Exception]) -> Iterator[None]:
    """Have what is refused, and these further errors, said in its sentences, without a traceback through IPython."""
    told: tuple[type[Exception], ...] = (NnsightEagerError, *also)
    try:
        yield
    except told as error:
        if isinstance(error, SyntaxError):  # as text it has the line of a file that nobody has written
            raise UsageError(f"This is no Python expression: {error.msg}.") from None
        raise UsageError(in_magics(str(error))) from None


def in_magics(sentences: str) -> str:
    """What an error says to write, as a magic where there is one: `%back h.2 input` for `run.back_to(model.h[2], "input")`."""
    for python, magic in MAGICS.items():
        sentences = re.sub(f"`{python}`", magic, sentences)
    return re.sub(f"`{BACK}`", _back, sentences)


def _back(written: re.Match[str]) -> str:
    words = "%back", dotted(written[1]).removeprefix("."), written[2]
    return f"`{' '.join(filter(None, words))}`"


def _refuse_more(line: str, magic: str) -> None:
    """Raise where something stands behind a magic that takes nothing."""
    if line:
        raise UsageError(f"`%{magic}` takes nothing, and was given `{line}`.")


def load(shell: InteractiveShell) -> None:
    """Add the magics to a shell."""
    magics = HeldRunMagics(shell)
    shell.register_magics(magics)
    shell.Completer.custom_matchers.append(magics.completions)
