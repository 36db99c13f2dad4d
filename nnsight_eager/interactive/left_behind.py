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
atexit.register(_exiting.set)  # IPython clears its names at exit, before the interpreter says that it ends


def close_and_say(run: Run, why: str) -> None:
    """Close the run and warn at the user's line; at exit, where every run is left behind, neither."""
    if not run.open or _exiting.is_set() or sys.is_finalizing():
        return
    place = "" if run.at is None else f", paused at `{spelled(run.path_of(run.at.module), run.at.kind)}`,"
    run.close()
    say(f"The run held by hand{place} has been closed: {why}")


def say(sentence: str) -> None:
    """Warn at the user's line, each time: all lines of a prompt are line 1, and a second warning there would be left out."""
    frame = user_frame(2)
    warnings.warn_explicit(sentence, UserWarning, frame.f_code.co_filename, frame.f_lineno, registry={})
