"""What VS Code does to debug a script: a client of the Debug Adapter Protocol, over a socket on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

from small_models import FOLDER

PATIENCE = 60


class Client:
    """Requests and their answers; events are kept until somebody waits for them."""

    def __init__(self, connection):
        self._file = connection.makefile("rwb")
        self._number = 0
        self._events = []

    def ask(self, command, **arguments):
        """Send a request and wait for its answer."""
        number = self.send(command, **arguments)
        while True:
            message = self._read()
            if message["type"] == "response" and message["request_seq"] == number:
                assert message["success"], message
                return message.get("body") or {}
            self._events.append(message)

    def send(self, command, **arguments):
        self._number += 1
        message = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        text = json.dumps(message).encode()
        self._file.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
        self._file.flush()
        return self._number

    def event(self, *kinds):
        """The next event of one of these kinds."""
        while True:
            for each in self._events:
                if each.get("event") in kinds:
                    self._events.remove(each)
                    return each
            self._events.append(self._read())

    def _read(self):
        length = 0
        while line := self._file.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name == b"Content-Length" else length
        assert length, "the debugger has gone away"
        return json.loads(self._file.read(length))


class Debugged:
    """A script under the debugger: where it stops, by the text of the line, and what is there."""

    def __init__(self, client, script):
        self._client, self._script = client, str(script)
        self._lines = script.read_text().splitlines()

    def begin(self, *marked):
        """Run to the first of the lines that are marked with these comments."""
        client = self._client
        client.ask("initialize", adapterID="test", pathFormat="path", linesStartAt1=True, columnsStartAt1=True)
        # What an installed package is to VS Code, the one that is tested here has to be called: not the user's code.
        rules = [{"path": f"{FOLDER}/nnsight_eager/**", "include": False}]
        client.send("attach", justMyCode=True, rules=rules)
        client.event("initialized")
        numbers = [number for number, line in enumerate(self._lines, 1) if line.endswith(tuple(f"# {mark}" for mark in marked))]
        client.ask("setBreakpoints", source={"path": self._script}, breakpoints=[{"line": number} for number in numbers])
        client.ask("configurationDone")
        return self._stop()

    def __call__(self, command):
        """`next`, `stepIn`, `stepOut` or `continue`: the marks of the frames where it stops then; nothing where it ends."""
        self._client.ask(command, threadId=self._thread)
        return self._stop()

    def _stop(self):
        event = self._client.event("stopped", "terminated")
        if event["event"] == "terminated":
            return []
        self._thread = event["body"]["threadId"]
        self._frames = self._client.ask("stackTrace", threadId=self._thread)["stackFrames"]
        assert {each["source"]["path"] for each in self._frames} == {self._script}, "frames that are not the user's"
        return [self._lines[each["line"] - 1].partition("# ")[2] for each in self._frames]

    def variables(self):
        """The local variables of the innermost frame, as they are shown."""
        scopes = self._client.ask("scopes", frameId=self._frames[0]["id"])["scopes"]
        shown = self._client.ask("variables", variablesReference=scopes[0]["variablesReference"])["variables"]
        return {each["name"]: each for each in shown}

    def inside(self, variable):
        """What opens when one clicks on a variable."""
        shown = self._client.ask("variables", variablesReference=variable["variablesReference"])["variables"]
        return {each["name"]: each["value"] for each in shown}

    def evaluate(self, expression):
        """An expression that is watched."""
        return self._client.ask("evaluate", expression=expression, frameId=self._frames[0]["id"], context="watch")["result"]


@contextmanager
def debugged(script):
    """Run a script under debugpy; what it has printed is in `.printed` afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["-Xfrozen_modules=off", "-m", "debugpy", "--listen", f"127.0.0.1:{port}", "--wait-for-client", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    output = script.with_suffix(".out")  # a file: debugpy's adapter, which outlives the script, would keep a pipe open
    with output.open("w") as file:
        running = subprocess.Popen([sys.executable, *command], env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        with _connected(running, port) as connection:
            session = Debugged(Client(connection), script)
            yield session
        running.wait(timeout=PATIENCE)
        session.printed = output.read_text()
    finally:
        running.kill()
        running.wait()


def _connected(running, port):
    for _ in range(PATIENCE * 10):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        except OSError:
            assert running.poll() is None, "debugpy has ended"
            time.sleep(0.1)
    raise TimeoutError("debugpy does not answer")
