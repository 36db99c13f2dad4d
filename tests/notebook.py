"""A Jupyter kernel that is sent cells as a notebook sends them, and a browser that shows what comes back."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from small_models import FOLDER

SECONDS = 120
"""How long a cell, the start of a kernel or a page may take."""


class Cell:
    """What a cell has given: its value and what it displayed, as mimebundles, what it printed, its error."""

    def __init__(self):
        self.shown, self.printed, self.error = [], "", ""

    @property
    def text(self):
        return self.shown[-1]["text/plain"]

    @property
    def html(self):
        return self.shown[-1]["text/html"]


class Kernel:
    """A kernel process, and the messages to it."""

    def __init__(self, client):
        self._client = client

    def run(self, code):
        """Send a cell, wait until it has run, and fail where it failed."""
        cell = self.try_(code)
        assert not cell.error, cell.error
        return cell

    def try_(self, code):
        """Send a cell and wait until it has run."""
        sent, cell = self._client.execute(code), Cell()
        while True:
            message = self._client.get_iopub_msg(timeout=SECONDS)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != sent:
                continue
            if kind in ("execute_result", "display_data"):
                cell.shown.append(content["data"])
            elif kind == "stream":
                cell.printed += content["text"]
            elif kind == "error":
                cell.error = f"{content['ename']}: {content['evalue']}"
            elif kind == "status" and content["execution_state"] == "idle":
                return cell

    def complete(self, code):
        """What the Tab key offers at the end of the code."""
        return self._answer(self._client.complete(code))["matches"]

    def inspect(self, code):
        """What Shift-Tab shows at the end of the code."""
        return self._answer(self._client.inspect(code))["data"].get("text/plain", "")

    def _answer(self, sent):
        while True:
            message = self._client.get_shell_msg(timeout=SECONDS)
            if message["parent_header"].get("msg_id") == sent:
                return message["content"]


@contextmanager
def kernel(folder):
    """A kernel of this Python, with the package under test, listening on loopback alone; it is gone afterwards."""
    from jupyter_client.manager import KernelManager

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(FOLDER), str(Path(__file__).parent))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    manager = KernelManager(ip="127.0.0.1", connection_file=str(folder / "kernel.json"))
    manager.start_kernel(env=environment, cwd=str(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=SECONDS)
        yield Kernel(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()  # it is asked first, and what it has to write at its end is written
        manager.cleanup_resources()
        manager.context.destroy(linger=0)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser that is here, if one is."""


def page_of(*displays, title="as it was"):
    """Displays one below the other, on white and beside that on black, as notebooks have them."""
    column = '<div style="background:{};color:{};flex:1;padding:16px;min-width:0">' + "<hr>".join(displays) + "</div>"
    both = column.format("#fff", "#222") + column.format("#111", "#ddd")
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        f'<body style="margin:0;display:flex;min-height:100vh;font-family:sans-serif">{both}'
    )


def in_browser(page, *options):
    """What the browser answers when it is given a page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "page.html"
        file.write_text(page)
        done = subprocess.run(
            [
                BROWSER,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                f"--user-data-dir={folder}/profile",
                *options,
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


if sys.platform != "linux":
    BROWSER = None
