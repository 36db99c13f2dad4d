"""A server in this process, to which everything travels as it does to another: a client and a server without a cluster."""

import pickle
from concurrent.futures import ThreadPoolExecutor

from nnsight_eager.remote.line import Line
from nnsight_eager.remote.model import RemoteModel
from nnsight_eager.remote.serving import Server
from nnsight_eager.remote.sessions import Limits
from nnsight_eager.remote.wire import answer_meant, message_sent


def travelled(value):
    """The value as it comes out on the other side."""
    from ray import cloudpickle

    return pickle.loads(cloudpickle.dumps(value))


class LineHere(Line):
    """A line to a server in this process; `sent` counts what goes over it, by verb or method."""

    def __init__(self, server, owner="somebody"):
        super().__init__(server.name, actor=None)
        self.server = server
        self._opened = server.open(owner)
        self.sent = []
        self.threads = ThreadPoolExecutor()

    def go(self, message):
        self.sent.append(message.verb)
        return answer_meant(travelled(self.server.go(travelled(message_sent(self._opened.session, message)))))

    def call(self, method, *args):
        self.sent.append(method)
        return self.came_of(*travelled(getattr(self.server, method)(self._opened.session, *travelled(args))), method)

    def control(self, method, *args):
        return travelled(getattr(self.server, method)(*travelled(args)))

    def submit(self, job, sent):
        return self.threads.submit(self.server.run_function, self._opened.session, job, travelled(sent))

    def await_function(self, reference, timeout):
        return travelled(reference.result(timeout))

    def close_run(self, run):
        self.sent.append("close")
        self.server.close(self._opened.session, run)

    def close(self):
        self.server.leave(self._opened.session)
        self.threads.shutdown()


def served(folder, **limits):
    """A server of the model in a folder; clients in its own process give no signs of life."""
    return Server(str(folder), "tiny", {}, Limits(**{"silence": 1e6, **limits}))


def client(server, owner="somebody"):
    """A client of it."""
    line = LineHere(server, owner)
    return RemoteModel(line, travelled(server.describe()))
