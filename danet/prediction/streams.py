"""Cameras and streams, of which the newest frame counts, and pictures on standard input.

A thread reads a live source and keeps the newest frame, so the source never waits for the network
and a result is late by one frame and one pass at most. A pipe waits, and so does an address that
states its number of frames, which is a file: of these nothing is dropped.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Container, Iterator
from datetime import datetime, timezone
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import cv2
from tqdm import tqdm

from danet.distributed.signals import STOP, Signals
from danet.errors import InputError
from danet.prediction.sources import Picture, Source, open_video, read_pictures

_TRIES, _PAUSE = 5, 2.0  # how often a broken stream is opened again, and the seconds before each


def find_stream(wanted: str, pipe: BufferedReader | None) -> Source | None:
    """Return the camera, stream or pipe of pictures that a setting names, None if it is none.

    Its password is in ``address`` only. Raises InputError if it does not open.
    """
    start = pipe.peek(1) if wanted == "-" and pipe else b""
    scheme, _, rest = wanted.partition("://")
    # A password stands before an @, in a query, or in a part of the path with "=".
    place = re.split(r"[?#]|/[^/?#]*=", rest.rpartition("@")[2])[0]
    if start[:1] in (b"\xff", b"\x89"):  # JPEG, PNG; no UTF-8
        shown, name = "-", "stdin"
    elif b"\0" in start:
        raise InputError("images=-: found neither JPEG or PNG pictures nor paths, one per line")
    elif wanted.isdecimal() and not Path(wanted).exists():
        shown = name = f"camera{int(wanted)}"
    elif rest:
        shown, name = f"{scheme}://{place}", re.sub(r"[^\w-]+", "_", place)[:100] or scheme
    else:
        return None
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    source = Source(Path(name), name, {"source": shown, "started": now}, address=wanted)
    if wanted == "-":
        return source
    if not (capture := open_video(source)).isOpened():
        raise InputError(f"images={shown}: OpenCV could not open it; is it there and not in use?")
    return source._replace(is_live=capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 0)


class Live:
    """Iterates over the newest pictures of a live source.

    It ends after ``frames`` pictures, on SIGINT or SIGTERM, or with an error if the source is lost.
    """

    def __init__(self, source: Source, frames: int | None = None) -> None:
        self.number = self.taken = 0  # frames that came, and those that were yielded
        self.seconds, self.delays = 0.0, deque[float](maxlen=1000)
        self._source, self._frames, self._newest = source, frames, deque[Picture](maxlen=1)
        self._came, self._closed = Event(), Event()

    def _read(self) -> None:
        """Read all frames, in the size of the first, and open the source again where it breaks."""
        size, start, tries = None, 0.0, 0
        while tries <= _TRIES and not self._closed.wait(_PAUSE * (tries > 0)):
            for item in read_pictures([(self._source, ())], max_pixels=0):
                if self._closed.is_set() or not isinstance(item, Picture):
                    break
                now, size, tries = time.time(), size or item.image.shape[1::-1], 0
                image, name = cv2.resize(item.image, size), self._source.frame(self.number)
                self._newest.append(item._replace(name=name, image=image, time=now))
                start = start or now
                self.number, self.seconds = self.number + 1, now - start
                self._came.set()
            if tries == 0 and not self._closed.is_set():
                shown = self._source.version["source"]
                tqdm.write(f"warning: {shown}: no frame came; opening it again", file=sys.stderr)
            tries += 1

    def __iter__(self) -> Iterator[Picture | InputError]:
        """Yield a picture; when the next one is asked for, its results are written."""
        reader, start, slot = Thread(target=self._read, daemon=True), 0.0, -1
        with Signals() as signals:
            reader.start()
            signals.callback(reader.join)
            signals.callback(self._closed.set)
            while self.taken != self._frames and not signals.take() & STOP:
                is_over = not reader.is_alive()
                self._came.wait(0 if is_over else 0.1)
                self._came.clear()
                if self._newest:
                    picture = self._newest.popleft()
                    start, self.taken = start or picture.time, self.taken + 1
                    due = max(slot + 1, round((picture.time - start) * picture.rate))
                    # A longer pause is no more than ten seconds of the overlay.
                    still, slot = min(due - slot - 1, round(10 * picture.rate)), due
                    yield picture._replace(still=still)
                    self.delays.append(time.time() - picture.time)
                elif is_over:
                    lost = f"lost after {self.number} frames and {_TRIES} tries to open it again"
                    yield InputError(f"{self._source.version['source']}: {lost}")
                    return


def piped_pictures(source: Source, pipe: BufferedReader) -> Iterator[tuple[Source, Container[str]]]:
    """Yield each picture of a pipe as a file, which is there until the next is asked for."""
    with TemporaryDirectory(prefix="stdin") as folder:
        for number, data in enumerate(split_pictures(pipe)):
            path = Path(folder, f"{number:06d}")
            path.write_bytes(data)
            yield source._replace(path=path, name=source.frame(number)), ()
            path.unlink()


def split_pictures(pipe: BufferedReader) -> Iterator[bytes]:
    """Yield the bytes of each JPEG and PNG that follow one another, cut off or not.

    A JPEG ends with a marker outside its segments, which may hold a thumbnail (ITU-T T.81, B.1).
    """
    data = bytearray()
    while ahead := pipe.peek(1):
        code = b""
        if not data and ahead[:1] == b"\x89":
            data += pipe.read(8)
            while data[-8:-4] != b"IEND" and (head := pipe.read(8)):
                data += head + pipe.read(int.from_bytes(head[:4], "big") + 4)
            code = b"\xd9"
        else:
            data += pipe.read(ahead.find(b"\xff") + 1 or len(ahead))
            while data[-1:] == b"\xff" and (code := pipe.read(1)) == b"\xff":
                data += code  # fill
            if code == b"\xd8" and len(data) > 1:  # another starts: this one was cut off
                yield bytes(data[:-1])
                data[:-1] = b""
            data += code
            if code > b"\x01" and not b"\xd0" <= code <= b"\xd9":  # all but these have a length
                data += (size := pipe.read(2)) + pipe.read(max(0, int.from_bytes(size, "big") - 2))
        if code == b"\xd9":
            yield bytes(data)
            data.clear()
    if data:
        yield bytes(data)
