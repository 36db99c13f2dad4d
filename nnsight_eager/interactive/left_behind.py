"""What is said of a run that is held by hand and closed without having been asked to.

close_and_say(run, "another was started.")
# UserWarning: The run held by hand, paused at `model.h[2].output`, has been closed: another was started.
"""

import atexit
import sys
import threading
import warnings

from ..changes import user_frame
from ..paths import spelled
from ..run import Run

_exiting = threading.Event()
atexit.register(_exiting.set)


def close_and_say(run: Run, why: str) -> None:
    """Close the run and warn at the user's line; at exit, where every run is left behind, neither."""
    if not run.open or _at_exit():
        return
    place = "" if run.at is None else f", paused at `{spelled(run.path_of(run.at.module), run.at.kind)}`,"
    run.close()
    say(f"The run held by hand{place} has been closed: {why}")


def _at_exit() -> bool:
    """Whether the interpreter ends, or IPython, which clears its names while it is still running."""
    if _exiting.is_set() or sys.is_finalizing():
        return True
    frame = user_frame(2) if "IPython" in sys.modules else None
    while frame is not None and frame.f_code.co_name != "_atexit_once":
        frame = frame.f_back
    return frame is not None


def say(sentence: str) -> None:
    """Warn at the user's line, each time: all lines of a prompt are line 1, and a second warning there would be left out."""
    frame = user_frame(2)
    warnings.warn_explicit(sentence, UserWarning, frame.f_code.co_filename, frame.f_lineno, registry={})
