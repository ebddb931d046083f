"""A headless Chromium that tests talk to through a pipe, in its own protocol (CDP)."""

import json
import os
import shutil
import subprocess

_SIZE = {"width": 1200, "height": 900, "deviceScaleFactor": 1, "mobile": False}


def find():
    """Returns the path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Page:
    """A file in a browser without windows and without network."""

    def __init__(self, path, profile):
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        options = (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-dev-shm-usage"),
            *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"),
        )
        start = f'exec "$@" 3<&{reads} 4>&{writes}'  # what the browser reads from and writes to
        command, quiet = ["bash", "-c", start, "bash", find(), *options], subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(reads, writes), stderr=quiet)
        os.close(reads)
        os.close(writes)
        self._rest, self._number, self._session, self.events = b"", 0, {}, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for part in ("Page", "Runtime", "Network"):
            self.ask(f"{part}.enable")
        self.resize()
        self.ask("Page.navigate", url=path.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def ask(self, method, **parameters):
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            piece = os.read(self._from, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """Evaluates JavaScript and returns plain values."""
        wanted = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self.ask("Runtime.evaluate", **wanted)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def resize(self, **size):
        """Makes the window as large as requested, or 1200 x 900."""
        self.ask("Emulation.setDeviceMetricsOverride", **{**_SIZE, **size})

    def problems(self):
        """Returns errors on the console and requests that went anywhere."""
        found = [(event["method"], event["params"]) for event in self.events]
        sent = [one["request"]["url"] for kind, one in found if kind == "Network.requestWillBeSent"]
        outside = [url for url in sent if not url.startswith(("file:", "data:"))]
        return outside + [one for kind, one in found if kind == "Runtime.exceptionThrown"]

    def close(self):
        """Ends the browser."""
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(20)
