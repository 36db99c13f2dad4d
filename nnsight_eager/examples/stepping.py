"""A session at the prompt: a forward pass held open, walked through, edited, forked and gone back in.

The lines are typed into a shell, one after another, and what is shown is drawn as it looks in a terminal. `until(has_nan)`
names the first place where there is a NaN; the fork goes on from layer 20 without computing what is below it again.
"""

import argparse
import io
import re
import sys
from code import InteractiveConsole
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnsight_eager import HeldRun, LanguageModel, demo, has_nan
from nnsight_eager.examples.command import loaded, refused

SESSION = """\
run = model.trace("The Eiffel Tower is in the city of").start()
run.to(model.model.layers[20])                        # on to this layer's output, and wait there
other = run.fork()                                    # a second run at the same place
other.model.model.layers[21].mlp.output *= -4         # edited in this one only
guess = lambda run: model.tokenizer.decode(run.finish().logits[0, -1].argmax())
guess(run), guess(other)
run.back_to(model.model.layers[5])                    # nothing runs backwards: another forward pass, led to here
model.model.layers[5].output[0, 3, 7] = float("nan")
run.until(has_nan)
run.where()
"""


def typed(model: LanguageModel, session: str) -> list[tuple[str, str]]:
    """Each line of a session, and what a shell shows for it."""
    shown: list[tuple[str, str]] = []

    def show(value: Any) -> None:
        if value is not None:
            shown[-1] = shown[-1][0], repr(value)

    shell, hook = InteractiveConsole({"model": model, "has_nan": has_nan}), sys.displayhook
    sys.displayhook = show
    try:
        for line in session.splitlines():
            shown.append((line, ""))
            shell.push(line)
    finally:
        sys.displayhook = hook
        for each in shell.locals.values():
            if isinstance(each, HeldRun):
                each.close()  # left behind it would say so
    return shown


def drawn(shown: Sequence[tuple[str, str]], out: Path) -> None:
    """A session as a picture of a terminal."""

    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.syntax import Syntax
    from rich.text import Text

    console = Console(record=True, width=124, file=io.StringIO(), force_terminal=True)
    for line, answer in shown:
        console.print(Syntax(f">>> {line}", "python", theme="ansi_dark", background_color="default"))
        if answer:
            console.print(Text(answer))
    without_fonts = re.sub(r"@font-face {{.*?}}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # they would be fetched
    console.save_svg(str(out), title="python", code_format=without_fonts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Type the session and save its picture."""
    parser = argparse.ArgumentParser(
        prog="python -m nnsight_eager.examples.stepping", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("stepping.svg"), help="the picture's file (default: %(default)s)")
    options = parser.parse_args(arguments)
    shown = typed(loaded(demo.folder()), SESSION)
    for line, answer in shown:
        print(f">>> {line}", *([answer] if answer else []), sep="\n")
    try:
        drawn(shown, options.out)
    except OSError as error:
        return refused(f"`{options.out}` cannot be written: {error.strerror or error}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
