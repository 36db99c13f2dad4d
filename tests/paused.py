"""A coroutine in the middle, for tests of what becomes of it."""

from nnsight_eager.coroutine import Closed, Coroutine


class Thing:
    """Something that can be referred to weakly."""


def paused(events, name="work"):
    """A coroutine that is paused and says how it ends."""

    def work():
        try:
            coroutine.pause("paused")
            events.append(f"{name} went on")
        except Closed:
            events.append(f"{name} was closed")
            raise
        finally:
            events.append(f"{name} ended")

    coroutine = Coroutine(work)
    coroutine.resume()
    return coroutine
