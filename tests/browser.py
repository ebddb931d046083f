"""A headless Chromium, driven over its own pipe: no driver and no package is needed."""

import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium():
    """Returns the path of a browser, or says why the test cannot run."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if not found:
        pytest.skip("there is no chromium; on Debian and Ubuntu: apt install chromium")
    return found


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The server of ``python -m http.server``, without its log."""

    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    """Yields the address of a server of the files of a folder."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Tab:
    """A page in a browser that reaches 127.0.0.1 and no other host.

    ``asked`` has the addresses of all its requests and of those of its workers, ``problems`` its
    exceptions, violations of its policy among them.
    """

    def __init__(self, profile):
        command = [
            *(find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *(
                "--disable-dev-shm-usage",
                "--remote-debugging-pipe",
                "--enable-unsafe-swiftshader",
                "--hide-scrollbars",
            ),
            *(
                f"--user-data-dir={profile}",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ),
        ]
        self.asked, self.problems, self.number, self.rest = [], [], 0, b""
        to_browser, self.output = os.pipe()
        self.input, from_browser = os.pipe()

        # The browser reads commands at descriptor 3 and answers at 4; bash puts them there.
        line = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, *command],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True
        )

    def write(self, method, session=None, **params):
        """Sends a command without waiting; returns its number."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self.output, json.dumps(message).encode() + b"\0")
        return self.number

    def send(self, method, **params):
        """Sends a command and returns its result."""
        number = self.write(method, self.session, **params)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            for found in self.read(end - time.monotonic()):
                if found.get("id") == number:
                    assert "error" not in found, found["error"]
                    return found["result"]
        raise TimeoutError(method)

    def read(self, seconds):
        """Returns the messages that have come; notes requests and problems in all of them."""
        if not select.select([self.input], [], [], seconds)[0]:
            return []
        *whole, self.rest = (self.rest + os.read(self.input, 2**20)).split(b"\0")
        messages = [json.loads(text) for text in whole]
        for message in messages:
            params = message.get("params", {})
            match message.get("method"):
                case "Network.requestWillBeSent":
                    self.asked.append(params["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.problems.append(params["exceptionDetails"]["text"])
                case "Log.entryAdded" if params["entry"]["level"] == "error":
                    self.problems.append(params["entry"]["text"])
                case "Target.attachedToTarget":  # a worker, which waits until it is watched
                    for command in ("Network.enable", "Runtime.runIfWaitingForDebugger"):
                        self.write(command, params["sessionId"])
        return messages

    def run(self, expression):
        """Returns the value of a piece of JavaScript, awaited if it is a promise."""
        found = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression, seconds=60):
        """Waits until an expression is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < end, f"still false: {expression}"
            time.sleep(0.05)
        return value

    def close(self):
        """Ends the browser."""
        self.write("Browser.close")
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            os.close(self.output)
            os.close(self.input)
