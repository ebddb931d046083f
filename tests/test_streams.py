"""Of a live source the newest frame is predicted and others are counted; a pipe loses none."""

import io
import itertools
import json
import os
import re
import signal
import struct
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import call
from PIL import Image

import danet
from danet.errors import InputError
from danet.plain import without_credentials
from danet.prediction import streams
from danet.prediction.predict import Prediction
from danet.prediction.results import Results
from danet.prediction.sources import Picture, Source
from danet.prediction.streams import Live, find_stream, split_pictures
from danet.visualization.overlay import Legend

SIZE = (48, 96)
SECRET = "s3cret"


class Camera:
    """Stands in for cv2.VideoCapture: each opening plays the next of some clips, then nothing.

    A frame is grey, of the value in the clip, and comes with a permit. The first opening is that
    of ``find_stream``, which reads none.
    """

    clips: list
    permits: threading.Semaphore
    opened: list

    def __init__(self, *arguments):
        Camera.opened.append(arguments)
        self._frames = iter(Camera.clips.pop(0) if Camera.clips else ())

    def isOpened(self):
        return True

    def get(self, key):
        return {cv2.CAP_PROP_FPS: 25.0}.get(key, -1.0)

    def grab(self):
        self._frame = next(self._frames, None)
        return self._frame is not None and Camera.permits.acquire(timeout=5)

    def retrieve(self):
        return True, np.full((*SIZE, 3), self._frame, np.uint8)


@pytest.fixture
def camera(monkeypatch):
    Camera.clips, Camera.permits, Camera.opened = [(), range(250)], threading.Semaphore(0), []
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(streams, "_PAUSE", 0.0)
    return Camera


class Always:
    """A permit whenever one is asked for, a hundred a second."""

    def acquire(self, timeout):
        time.sleep(timeout / 500)
        return True


def play(patch):
    """Puts an endless stand-in where OpenCV would open a camera or a stream."""
    Camera.clips, Camera.permits, Camera.opened = [(), itertools.cycle([9])], Always(), []
    patch.setattr(cv2, "VideoCapture", Camera)


def come(live, count):
    """Lets frames come and waits until all are there."""
    number = live.number + count
    for _ in range(count):
        Camera.permits.release()
    end = time.monotonic() + 5
    while live.number < number:
        assert time.monotonic() < end
        time.sleep(0.001)


def value(picture):
    return int(picture.image[0, 0, 0])


def test_a_slow_network_gets_the_newest_frame_and_the_others_are_counted(camera):
    live = Live(find_stream("0", None), frames=3)
    pictures = iter(live)
    camera.permits.release()
    found = [next(pictures)]
    for count in (4, 1):
        come(live, count)
        found.append(next(pictures))
    assert [value(picture) for picture in found] == [0, 4, 5]
    assert [picture.name for picture in found] == [
        "camera0/000000",
        "camera0/000004",
        "camera0/000005",
    ]
    camera.permits.release(2)
    assert list(pictures) == []
    assert live.taken == 3
    assert live.number >= 6


def test_a_fast_network_gets_every_frame_and_waits_for_the_next(camera):
    live = Live(find_stream("0", None), frames=5)
    pictures = iter(live)
    for number in range(5):
        threading.Timer(0.02, camera.permits.release).start()
        assert value(next(pictures)) == number
    camera.permits.release()
    assert list(pictures) == []
    assert live.taken == 5


def test_a_broken_stream_is_opened_again_and_its_frames_are_counted_on(camera, capsys):
    camera.clips[1:] = [[7, 8], (), (), [9], (), (), (), (), ()]
    camera.permits.release(9)
    live = Live(find_stream("rtsp://a:b@host/x", None))
    *pictures, problem = list(live)
    assert value(pictures[-1]) == 9
    assert pictures[-1].name == "host_x/000002"
    assert isinstance(problem, InputError)
    assert str(problem) == "rtsp://host/x: lost after 3 frames and 5 tries to open it again"
    # Once for the first look, once to begin, twice in vain, and once more; then five times.
    assert len(camera.opened) == 1 + 1 + 3 + 5
    assert live.number == 3
    warning = "warning: rtsp://host/x: no frame came; opening it again\n"
    assert capsys.readouterr().err == 2 * warning


def test_a_stream_that_comes_back_in_another_size_keeps_the_first(camera, monkeypatch):
    sizes = iter([(48, 96), (24, 24)])
    monkeypatch.setattr(
        camera, "retrieve", lambda _: (True, np.full((*next(sizes), 3), 5, np.uint8))
    )
    camera.clips[1:] = [[1], [2]]
    live = Live(find_stream("0", None), frames=2)
    pictures = iter(live)
    for _ in range(2):
        camera.permits.release()
        assert next(pictures).image.shape == (*SIZE, 3)


def test_a_stream_of_another_clock_has_25_frames_a_second(camera, monkeypatch):
    camera.permits.release(4)
    for stated, rate in ((90000.0, 25.0), (0.0, 25.0), (-1.0, 25.0), (12.5, 12.5)):
        camera.clips = [(), [1]]
        rates = {cv2.CAP_PROP_FPS: stated}
        monkeypatch.setattr(camera, "get", lambda _, key, rates=rates: rates.get(key, -1.0))
        assert next(iter(Live(find_stream("0", None)))).rate == rate


def test_the_video_of_an_overlay_shows_a_frame_until_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(Live, "_read", lambda _: None)
    version = {"source": "camera0", "started": ""}
    source = Source(Path("camera0"), "camera0", version, address="0", is_live=True)
    live = Live(source)
    pictures, read = iter(live), []
    # At 25 frames a second 0.2 s are five; of a longer pause ten seconds are shown; and three
    # that came at once are behind their time until there is a gap.
    for number, seconds in enumerate((0.0, 0.21, 30.0, 30.01, 30.02, 30.2)):
        image = np.full((*SIZE, 3), 40 * number, np.uint8)
        picture = Picture(source.frame(number), source, image, 25.0, time=1e9 + seconds)
        live._newest.append(picture)
        read.append(next(pictures))
    assert [picture.still for picture in read] == [0, 4, 250, 0, 0, 2]
    legend = Legend(["a"], [(0, 0, 0)], 0.0)
    with Results(
        tmp_path, ["overlay"], origin={"network": 1, "evaluation": 1}, legend=legend
    ) as to:
        for picture in read:
            to.write(picture, Prediction(np.zeros(SIZE, np.uint8)))
    capture = cv2.VideoCapture(str(tmp_path / "overlay/camera0.mp4"))
    shown = []
    while (frame := capture.read()[1]) is not None:
        shown.append(frame.mean())
    assert capture.get(cv2.CAP_PROP_FPS) == 25
    times = [5, 251, 1, 1, 3, 1]
    assert np.allclose(shown, np.repeat(np.arange(0, 240, 40), times), atol=3)


class Chunks(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data, seed=0):
        self._data, self._random = io.BytesIO(data), np.random.default_rng(seed)

    def readable(self):
        return True

    def readinto(self, buffer):
        found = self._data.read(min(len(buffer), int(self._random.integers(1, 400))))
        buffer[: len(found)] = found
        return len(found)


def piped(data, seed=0):
    return io.BufferedReader(Chunks(data, seed))


def encoded(kind, number, *settings):
    image = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return cv2.imencode(kind, image, settings)[1].tobytes()


def with_thumbnail():
    """Returns a JPEG with another in its EXIF, and with fill bytes before a marker."""
    thumbnail = encoded(".jpg", 9)
    # An empty IFD0; IFD1 has the place (44) and the length of the thumbnail.
    tags = ((0x201, 4, 1, 44), (0x202, 4, 1, len(thumbnail)))
    exif = b"MM\0*" + struct.pack(">IHIH", 8, 0, 14, 2)
    exif += b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(4)
    exif = b"Exif\0\0" + exif + thumbnail
    plain = encoded(".jpg", 5)
    assert b"\xff\xd9" in exif
    segment = b"\xff\xff\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    return plain[:2] + segment + plain[2:]


PICTURES = [
    encoded(".jpg", 0),
    with_thumbnail(),
    encoded(".png", 1),
    encoded(".jpg", 2, cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
    encoded(".png", 3),
    encoded(".jpg", 4),
]


@pytest.mark.parametrize("seed", range(5))
def test_a_pipe_is_split_where_pictures_end(seed):
    assert list(split_pictures(piped(b"".join(PICTURES), seed))) == PICTURES


def test_a_picture_that_is_cut_off_costs_no_other():
    jpeg, thumbnail, png, *_ = PICTURES
    for cut in (jpeg[: len(jpeg) // 2], thumbnail[:-9]):
        data = [cut, jpeg, png]
        assert list(split_pictures(piped(b"".join(data)))) == data
    for last in (png[:-3], png[:200], png[:3], jpeg[:-1], jpeg[:3], thumbnail[:90]):
        data = [jpeg, png, last]
        assert list(split_pictures(piped(b"".join(data)))) == data


def test_standard_input_is_a_list_unless_it_begins_with_a_picture():
    assert find_stream("-", piped(b"/data/a.png\n")) is None
    assert find_stream("-", piped("/데이터/a.png\n".encode())) is None
    assert find_stream("-", piped(b"")) is None
    for data in PICTURES:
        pipe = piped(data)
        assert find_stream("-", pipe).name == "stdin"
        assert pipe.read() == data  # looked at, not taken
    for data in (b"GIF89a\x20\x00", b"BM\x8a\x00\x00", b"a.png\x00b.png\x00"):
        with pytest.raises(InputError, match="neither JPEG or PNG pictures nor paths, one per"):
            find_stream("-", piped(data))


@pytest.mark.parametrize(
    ("address", "shown", "name"),
    [
        ("rtsp://user:s3cret@10.0.0.2:554/live", "rtsp://10.0.0.2:554/live", "10_0_0_2_554_live"),
        ("rtsp://user:s3/c?r#e=t@s3cret@cam/a.sdp", "rtsp://cam/a.sdp", "cam_a_sdp"),
        ("http://cam/video.mjpg?user=a&pwd=s3cret", "http://cam/video.mjpg", "cam_video_mjpg"),
        ("rtsp://cam/user=a&password=s3cret&channel=1.sdp", "rtsp://cam", "cam"),
        ("rtmp://user:s3cret@", "rtmp://", "rtmp"),
        ("udp://@:1234", "udp://:1234", "_1234"),
    ],
)
def test_a_password_is_in_no_name(camera, address, shown, name):
    source = find_stream(address, None)
    assert (source.version["source"], source.name) == (shown, name)
    assert SECRET not in f"{source.path} {source.name} {source.version}"
    assert source.is_live
    assert source.address == address
    assert camera.opened[-1][0] == address
    assert camera.opened[-1][2][1::2] == [10_000, 10_000]  # ms to open, and for each frame


@pytest.mark.parametrize(
    ("tool", "argument"),
    [
        ("visualize", "images=rtsp://user:s3cret@cam/a"),
        ("visualize", "images=http://cam/a?password=s3cret"),
        ("predict", "images=rtsp:/user:s3cret@cam/a"),
        ("eval", "rtsp://user:s3cret@cam/a"),
        ("predict", "--images=rtsp://user:s3/c@ret@cam/a"),
        ("predict", "-images=rtsp://user:s3cret@cam/a"),
        ("predict", "output=https://s3cret@cam/a"),
    ],
)
def test_a_password_is_in_no_message_of_a_tool(tool, argument, capsys):
    call(tool, "checkpoint=x.pt", argument, code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "cam/a" in said
    assert not re.search("s3|ret@", said)


def test_a_sweep_that_would_write_a_password_to_a_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call("predict", "-m", "checkpoint=x.pt", "images=rtsp://user:s3cret@cam/a", code=2)
    assert "--multirun: leave it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_addresses_keep_all_but_credentials():
    for text in ("hf://owner/name@v1: no", "C:/a@b/x.png", "a/?.png", "https://a.org/b: 3@4"):
        assert without_credentials(text) == text


def lines(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


class Server(BaseHTTPRequestHandler):
    """Serves /live, an endless MJPEG of 25 frames a second, and files."""

    folder: Path

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith("/live"):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            self.play()
            return
        path = self.folder / self.path.lstrip("/").partition("?")[0]
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        self.wfile.write(path.read_bytes())

    def play(self):
        for number in itertools.count():
            data = encoded(".jpg", number % 50)
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            try:
                self.wfile.write(head.encode() + data + b"\r\n")
            except OSError:  # the client has gone
                return
            time.sleep(0.04)


@pytest.fixture
def server(tmp_path):
    Server.folder = tmp_path
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture
def start(tiny_checkpoint, tmp_path, capfd):
    """Predicts into the folder "out" and returns all that is printed."""

    def started(images, *settings, output="out", code=0):
        typed = [f"checkpoint={tiny_checkpoint}", f"images={images}", "device=cpu", *settings]
        typed += [f"output={tmp_path / output}"] if output else []
        call("predict", *typed, code=code)
        return "".join(capfd.readouterr())

    return started


def test_a_stream_becomes_frames_a_video_and_lines_without_its_password(start, server, tmp_path):
    host = server.replace(".", "_").replace(":", "_")
    name, address = f"{host}_live", f"http://user:{SECRET}@{server}/live?pwd={SECRET}"
    printed = start(address, "frames=6", "write=[index,overlay]")
    output = tmp_path / "out"
    written = lines(output)
    names = [line["name"] for line in written]
    assert len(names) == 6
    assert names == sorted(set(names))
    assert names[0] == f"{name}/000000"
    assert {line["source"] for line in written} == {f"http://{server}/live"}
    times = [datetime.fromisoformat(line["time"]) for line in written]
    assert times == sorted(times)
    assert datetime.fromisoformat(written[0]["started"]) <= times[0]
    drawn = {
        path.relative_to(output / "index").as_posix() for path in output.rglob("index/*/*.png")
    }
    assert drawn == {f"{each}.png" for each in names}
    video = cv2.VideoCapture(str(output / f"overlay/{name}.mp4"))
    last = int(names[-1][-6:])
    assert 6 <= video.get(cv2.CAP_PROP_FRAME_COUNT) <= 2 * last + 25
    assert re.search(
        r"6 images in .*\n(\d+) frames came, [\d.]+ frames/s; \d+ were dropped", printed
    )
    everything = [*map(str, output.rglob("*")), printed]
    everything += [path.read_text() for path in output.glob("predictions.json*")]
    assert len(everything) > 10
    assert SECRET not in "".join(everything)

    # It cannot be continued: nothing of a later time is mixed in.
    refused = start(address, "frames=1", code=2)
    assert "; name another folder, or remove it" in refused
    assert SECRET not in refused
    assert lines(output) == written


def test_each_start_of_a_stream_has_a_folder_of_its_own(start, server, tiny_checkpoint):
    for _ in range(2):
        start(f"http://{server}/live", "frames=1", "write=[]", output=None)
    found = sorted(tiny_checkpoint.parent.glob("predict_127_0_0_1*"))
    assert [path.name[-2:] for path in found] == ["ve", "-2"]
    assert [len(lines(path)) for path in found] == [1, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stream_with_all_its_files_whole(start, server, tmp_path, number):
    path = tmp_path / "out/predictions.jsonl"

    def stop():
        while not path.exists() or path.read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    printed = start(f"http://{server}/live", "write=[overlay]")
    thread.join()
    assert "frames came" in printed
    assert "warning" not in printed.replace("warning: every", "")
    (video,) = (tmp_path / "out/overlay").iterdir()
    assert video.suffix == ".mp4"
    assert cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT) >= len(
        lines(tmp_path / "out")
    )


def test_a_video_at_an_address_loses_no_frame(start, server, tmp_path):
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, SIZE[::-1]
    )
    for grey in range(0, 240, 8):
        writer.write(np.full((*SIZE, 3), grey, np.uint8))
    writer.release()
    start(f"http://{server}/clip.mp4", "write=[overlay]", "batch_size=4")
    found = lines(tmp_path / "out")
    assert [line["name"][-6:] for line in found] == [f"{number:06d}" for number in range(30)]
    assert "time" not in found[0]
    (video,) = (tmp_path / "out/overlay").iterdir()
    assert cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT) == 30


def test_what_does_not_open_is_one_line(start, server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENCV_FFMPEG_LOGLEVEL")
    for images, shown in (
        ("63", "camera63"),
        (f"http://user:{SECRET}@{server}/missing", f"http://{server}/missing"),
        (f"rtsp://user:{SECRET}@127.0.0.1:9/live", "rtsp://127.0.0.1:9/live"),
        (f"rstp://user:{SECRET}@127.0.0.1:9/live", "rstp://127.0.0.1:9/live"),
    ):
        printed = start(images, code=2)
        assert printed.startswith(f"error: images={shown}: OpenCV could not open it")
        assert printed.count("\n") == 1
    assert os.environ["OPENCV_FFMPEG_LOGLEVEL"] == "-8"  # of a process that opened none before
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_a_stream_are_refused(start, server, tmp_path, monkeypatch):
    live = f"http://{server}/live"
    assert "batch_size=2: " in start(live, "batch_size=2", code=2)
    assert "write=[coco]: annotation tools read pictures, and" in start(
        live, "write=[coco]", code=2
    )
    assert "frames=0: expected at least 1" in start(live, "frames=0", code=2)
    start(live, "batch_size=1", "frames=1", "write=[index]")  # as these messages say
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "frames=2: a is no camera" in start(tmp_path / "a.png", "frames=2", code=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    os.replace("a.png", "7/a.png")
    assert "1 images in" in start("7")  # a folder of this name is no camera


def test_pictures_on_standard_input_are_those_of_files(
    start, tiny_checkpoint, tmp_path, monkeypatch
):
    data = [*PICTURES, PICTURES[0][:500]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped(b"".join(data))))
    printed = start("-", "write=[index,overlay]", code=2)
    assert "1 of 7 files could not be read whole, the others are done" in printed
    assert "\nstdin/000006: not a readable image" in printed
    model = danet.load_model(tiny_checkpoint)
    for number, one in enumerate(PICTURES):
        (tmp_path / "one").write_bytes(one)
        found = np.array(Image.open(tmp_path / f"out/index/stdin/{number:06d}.png"))
        assert np.array_equal(found, danet.predict(model, tmp_path / "one"))
        assert (tmp_path / f"out/overlay/stdin/{number:06d}.png").is_file()
    assert [line["name"] for line in lines(tmp_path / "out")] == [
        f"stdin/{number:06d}" for number in range(6)
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped(PICTURES[0])))
    assert "; name another folder, or remove it" in start("-", code=2)


def test_an_error_while_frames_come_ends_the_reader(camera):
    threads = threading.active_count()
    handler = signal.getsignal(signal.SIGTERM)
    pictures = iter(Live(find_stream("0", None)))
    camera.permits.release()
    next(pictures)
    assert threading.active_count() == threads + 1
    camera.permits.release()  # a frame that was waited for
    pictures.close()  # as a full disk would do
    assert threading.active_count() == threads
    assert signal.getsignal(signal.SIGTERM) == handler
