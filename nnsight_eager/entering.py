"""Whether a call is what a `with` statement enters, told from the instructions around it.

is_entered(sys._getframe(1))                     # in the function called: `with f(x):`, or just `f(x)`
enters_call_of("backward", frame.f_code)         # whether `with ….backward(…):` is written anywhere in the code
"""

import dis
import itertools
from types import CodeType, FrameType
from typing import Final

from .texts import Known

CALLS: Final = ("CALL", "CALL_KW", "CALL_FUNCTION_EX")


def is_entered(frame: FrameType) -> bool:
    """Whether a `with` statement will enter what `frame` is calling."""
    return frame.f_lasti in _entered.of(frame.f_code)


def enters_call_of(name: str, code: CodeType) -> bool:
    """Whether a `with` statement in this code, or in a function that it makes, enters what some call of `name` gives."""
    return name in _called_and_entered.of(code)


def _calls_entered(code: CodeType) -> frozenset[int]:
    """The calls whose value a `with` statement enters: each from its instruction to the next, since frames count caches too."""
    pairs = itertools.pairwise(dis.get_instructions(code))
    calls = (pair for pair in pairs if pair[1].opname == "BEFORE_WITH" and pair[0].opname in CALLS)
    return frozenset(place for call, following in calls for place in range(call.offset, following.offset))


def _names_entered(code: CodeType) -> frozenset[str]:
    """The names in code that enters calls: which of them it calls there is not looked at."""
    names = frozenset(code.co_names) if _entered.of(code) else frozenset[str]()
    return names.union(*(_called_and_entered.of(each) for each in code.co_consts if isinstance(each, CodeType)))


_entered: Final = Known(_calls_entered)
_called_and_entered: Final = Known(_names_entered)
