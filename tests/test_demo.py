"""The page in the browser computes what the network does, without requests to other servers."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time

import numpy as np
import pytest
import torch
from browser import Tab, served
from conftest import call
from PIL import Image

import danet
from danet.config.build import checked_config, load_saved
from danet.errors import InputError
from danet.export import demo
from danet.visualization.attention import Point, position_maps, queries_and_keys

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

FILES = {name: name.encode() for name in demo.RUNTIME["files"]}
"""Contents that stand in for those of the package."""
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
PACKAGE = demo.RUNTIME["package"]


def pack(path, files):
    """Writes a .tgz as npm does."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A .tgz of FILES, which are taken for those of the package."""
    monkeypatch.setitem(demo.RUNTIME, "files", DIGESTS)
    return pack(tmp_path / "package.tgz", FILES)


def plant_npm(folder, script, monkeypatch):
    """Puts a program named npm before all others."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_runtime_comes_from_a_tgz_a_folder_of_the_package_or_its_files(stand_in, tmp_path):
    with tarfile.open(stand_in) as archive:
        archive.extractall(tmp_path, filter="data")
    for source in (stand_in, tmp_path / "package", tmp_path / "package" / "dist"):
        assert demo.find_runtime(str(source)) == FILES


def test_without_a_setting_npm_fetches_the_version_that_was_tested(stand_in, tmp_path, monkeypatch):
    script = f'[ "$1 $2" = "pack {PACKAGE}" ] && cp {stand_in} .'
    plant_npm(tmp_path / "bin", script, monkeypatch)
    assert demo.find_runtime(None) == FILES


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: pack(p, {**FILES, sorted(FILES)[0]: b"other"}),
            "is not that of onnxruntime-web@1",
        ),
        (lambda p: pack(p, {}), "filename 'package/dist/.*' not found"),
        (cut, "not a .tgz|not a gzip file|ended before|could not be opened|unexpected end"),
        (lambda p: p.write_text("x"), "not a .tgz"),
        (lambda p: p.unlink(), "there is no such file or folder"),
        (lambda p: (p.unlink(), p.mkdir()), "there is no ort-wasm.* in /"),
    ],
    ids=["another version", "another package", "cut off", "no archive", "missing", "empty folder"],
)
def test_a_runtime_that_was_not_tested_is_refused(stand_in, tmp_path, spoil, message):
    spoil(stand_in)
    with pytest.raises(InputError, match=message) as caught:
        demo.find_runtime(str(stand_in))
    text = str(caught.value)
    assert text.startswith(f"demo_runtime={stand_in}: ")
    assert f"npm pack {PACKAGE}" in text
    assert "\n" not in text


def test_without_npm_or_network_one_line_says_what_to_fetch(stand_in, tmp_path, monkeypatch):
    plant_npm(tmp_path / "bin", "echo 'npm error network is down' >&2; exit 1", monkeypatch)
    said = (
        r"demo=true needs onnxruntime-web@[\d.]+: npm error network is down; download https://reg"
    )
    with pytest.raises(InputError, match=said):
        demo.find_runtime(None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        InputError, match=r"No such file or directory: 'npm'; download .* demo_runtime=FILE$"
    ):
        demo.find_runtime(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["demo=true", "formats=[]"],
            "demo=true runs model.onnx: formats=[] lacks onnx",
        ),
        (
            ["demo=true", "formats=[onnx]", "size=[48,96]"],
            "demo=true: the page takes pictures of any size; leave size out",
        ),
        (["demo_runtime=x.tgz"], "demo_runtime is for the page of demo=true; set that as well"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(network, capsys, settings, message):
    call("export", f"checkpoint={network}", *settings, code=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# The folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The real package: what DEMO_RUNTIME names, else what npm fetches."""
    if "DEMO_RUNTIME" in os.environ:
        return os.environ["DEMO_RUNTIME"]
    try:
        return str(demo._pack(str(tmp_path_factory.mktemp("package")), PACKAGE))
    except OSError as error:
        pytest.skip(f"npm does not fetch {PACKAGE}: {error}")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """The output of one call of the tool, with FILES in the place of the package."""
    output = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.RUNTIME, "files", DIGESTS)
        source = pack(tmp_path_factory.mktemp("npm") / "package.tgz", FILES)
        typed = [f"checkpoint={tiny_checkpoint}", f"output={output}", "sizes=[[48,96]]"]
        call("export", *typed, "demo=true", f"demo_runtime={source}")
    return output


@pytest.mark.slow
def test_the_program_of_the_page_gives_classes_queries_and_keys(folder, tiny_checkpoint):
    session = ort.InferenceSession(folder / "demo" / demo.NETWORK)
    model = danet.load_model(tiny_checkpoint)
    for size in ((48, 96), (75, 61)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        given = {"image": image.transpose(2, 0, 1)[None]}
        classes, queries, keys = session.run(["classes", "queries", "keys"], given)
        assert classes.dtype == np.uint8
        assert (classes[0] == danet.predict(model, image)).mean() > 0.999
        for found, expected in zip((queries, keys), queries_and_keys(model, image), strict=True):
            torch.testing.assert_close(torch.from_numpy(found)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_folder_is_whole_and_names_no_other_host(folder):
    page = folder / "demo"
    text = (page / "index.html").read_text()
    linked = set(re.findall(r'(?:src|href)="([^"]+)"', text)) - {"data:,"}
    assert {"demo.js", "viewer.js", "page.css", "demo.css", "onnxruntime_LICENSE.txt"} <= linked
    assert all((page / name).is_file() for name in linked)
    assert "Copyright (c) Microsoft" in (page / "onnxruntime_LICENSE.txt").read_text()
    assert {name: (page / name).read_bytes() for name in FILES} == FILES
    written = [
        path.read_text() for path in page.iterdir() if path.suffix in (".html", ".js", ".css")
    ]
    assert not [url for part in written for url in re.findall(r"https?://(?!localhost)", part)]
    facts = json.loads(re.search(r'id="viewer-data">(.*?)</script>', text)[1])
    assert len(facts["classes"]) == len(facts["palette"]) == 16
    assert all((page / name).is_file() for name in facts["files"])
    assert "mean IoU 25.00 %" in text
    model = danet.load_model(folder)
    example = sorted(page.glob("example_*.png"))[0]
    assert danet.predict(model, example).shape == (48, 96)


# The page


JPEG_TURNED = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}


@pytest.fixture(scope="module")
def site(folder, package, tmp_path_factory):
    """The address of the page with the real runtime and more pictures, and its folder."""
    place = shutil.copytree(folder / "demo", tmp_path_factory.mktemp("site") / "demo")
    for name, data in demo.find_runtime(package).items():
        (place / name).write_bytes(data)
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (61, 110, 4), dtype=np.uint8)
    noise[:9, :, 3] = 0
    Image.fromarray(noise, "RGBA").save(place / "alpha.png")
    Image.fromarray(noise[..., 0], "L").save(place / "grey.png")
    Image.fromarray(noise[..., :3]).save(place / "turned.jpg", **JPEG_TURNED)
    Image.fromarray(noise[..., :3]).resize((1400, 700)).save(place / "large.png")
    (place / "text.png").write_text("no picture")
    with served(place) as address:
        yield address, place


@pytest.fixture
def tab(site, tmp_path):
    """A tab of a browser that reaches no other host."""
    tab = Tab(tmp_path / "profile")
    yield tab
    tab.close()


STATUS = "document.getElementById('status')"


def visit(tab, site, query=""):
    """Opens the page; returns its status when it has one."""
    tab.send("Page.navigate", url=f"{site[0]}/{query}")
    done = f"{STATUS}.className === 'error' || /pixels in|Ready/.test({STATUS}.textContent)"
    tab.wait(f"document.readyState === 'complete' && ({done})")
    return tab.run(f"{STATUS}.textContent")


def classes_of(tab):
    """Returns the classes that the page computed, (H, W)."""
    code = "(({width, height, classes}) => [height, width, ...classes])(demo.picture)"
    height, width, *classes = tab.run(code)
    return np.array(classes, np.uint8).reshape(height, width)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["example_0.png", "alpha.png", "grey.png", "turned.jpg"])
def test_the_browser_predicts_what_danet_predicts(tab, site, tiny_checkpoint, name):
    model = danet.load_model(tiny_checkpoint)
    expected = danet.predict(model, site[1] / name)
    status = visit(tab, site, f"?picture={name}")
    height, width = expected.shape
    assert status.startswith(f"{width} x {height} pixels in ")
    found = classes_of(tab)
    assert found.shape == expected.shape
    # Decoders of JPEG differ by a level here and there.
    assert (found == expected).mean() >= (0.97 if name.endswith("jpg") else 0.999)
    assert tab.problems == []
    network = f"{site[0]}/{demo.NETWORK}"  # modules may come from the browser's memory
    end = time.monotonic() + 10
    while network not in tab.asked and time.monotonic() < end:
        tab.read(0.5)  # on a busy machine events of the worker come late
    assert network in tab.asked
    assert all(url.startswith(site[0]) for url in tab.asked)


@pytest.mark.slow
def test_pointing_at_a_pixel_shows_what_it_attends_to(tab, site, tiny_checkpoint):
    visit(tab, site, "?picture=example_0.png&pixel=70,30")
    model = danet.load_model(tiny_checkpoint)
    image = np.array(Image.open(site[1] / "example_0.png"))

    def check(x, y):
        weights = tab.run("Array.from(viewer.weights)")
        expected = position_maps(model, image, [Point(x, y)])[0].flatten().numpy()
        np.testing.assert_allclose(weights, expected, atol=1e-3)
        name = model.classes[danet.predict(model, image)[y // 8 * 8 + 4, x // 8 * 8 + 4]]
        assert f"predicted as {name}" in tab.run("document.getElementById('readout').innerText")

    check(70, 30)
    tab.run("document.getElementById('classes').scrollIntoView()")
    left, top, width, height = tab.run(
        "(({left, top, width, height}) => [left, top, width, height])"
        "(document.getElementById('classes').getBoundingClientRect())"
    )
    place = {"x": left + 0.21 * width, "y": top + 0.8 * height}
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
    assert tab.run("[viewer.x, viewer.y]") == [20, 38]
    check(20, 38)
    assert tab.run("document.getElementById('here').textContent").startswith("Pixel (20, 38): ")


@pytest.mark.slow
def test_a_picture_can_be_chosen_dropped_and_pasted(tab, site):
    visit(tab, site)
    root = tab.send("DOM.getDocument")["root"]["nodeId"]
    node = tab.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    tab.send("DOM.setFileInputFiles", nodeId=node, files=[str(site[1] / "grey.png")])
    tab.wait("demo.picture?.width === 110")
    for event, key, name in (
        ("DragEvent('drop'", "dataTransfer", "example_0.png"),
        ("ClipboardEvent('paste'", "clipboardData", "grey.png"),
    ):
        tab.run(
            f"fetch('{name}').then((answer) => answer.blob()).then((blob) => {{"
            " const data = new DataTransfer(); data.items.add(new File([blob], 'x.png'));"
            f" dispatchEvent(new {event}, {{ {key}: data }})); }})"
        )
        tab.wait(f"demo.picture.width === {96 if name.startswith('example') else 110}")


@pytest.mark.slow
def test_a_large_picture_is_made_smaller_and_the_page_says_so(tab, site):
    status = visit(tab, site, "?picture=large.png")
    assert "Made smaller: 1400 x 700 became 724 x 362." in status
    assert classes_of(tab).size <= 2**18


@pytest.mark.slow
def test_what_goes_wrong_is_one_line_and_the_next_picture_is_right(tab, site):
    assert (
        visit(tab, site, "?picture=text.png") == "This is not a picture that the browser can read."
    )
    tab.run("document.querySelector('.example').click()")
    tab.wait(f"/pixels in/.test({STATUS}.textContent) && {STATUS}.className === ''")
    assert classes_of(tab).shape == (48, 96)
    assert visit(tab, site, "?picture=none.png") == "There is no none.png beside this page."


@pytest.mark.slow
def test_without_position_attention_there_are_the_classes_alone(
    tab, package, tiny_checkpoint, tmp_path
):
    onnx = pytest.importorskip("onnx")
    text = """
        <ir_version: 10, opset_import: ["": 20]>
        g (uint8[B, 3, H, W] image) => (float[B, K, H, W] logits)
        { x = Cast <to=1> (image)  y = Neg(x)  logits = Concat <axis=1> (x, y) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    saved = load_saved(tiny_checkpoint)
    config = checked_config(saved, tiny_checkpoint)
    page = demo.write(tmp_path / "demo", saved, config, demo.find_runtime(package))
    assert "attend" not in (page / "index.html").read_text()
    with served(page) as address:
        visit(tab, (address,), "?picture=example_0.png")
        image = np.array(Image.open(page / "example_0.png"))
        assert (classes_of(tab) == image.argmax(axis=2)).all()
        assert tab.problems == []
        (page / demo.NETWORK).unlink()
        missing = visit(tab, (address,), "?picture=example_0.png&again")
    assert missing == f"{address}/{demo.NETWORK}: the server answers 404"


@pytest.mark.slow
def test_a_page_that_is_opened_as_a_file_asks_for_a_server(tab, site):
    tab.send("Page.navigate", url=(site[1] / "index.html").as_uri())
    tab.wait(f"{STATUS} && getComputedStyle({STATUS}).visibility === 'visible'")
    assert "python -m http.server" in tab.run(f"{STATUS}.textContent")


@pytest.mark.slow
def test_the_page_fits_a_phone_and_turns_a_picture(tab, site):
    tab.send(
        "Emulation.setDeviceMetricsOverride",
        width=390,
        height=844,
        deviceScaleFactor=2,
        mobile=True,
    )
    visit(tab, site, "?picture=example_0.png")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    before = tab.run("Array.from(demo.picture.pixels.data.slice(0, 3))")
    tab.run("document.getElementById('turn').click()")
    tab.wait("demo.picture.width === 48")
    corner = "Array.from(demo.picture.pixels.data.slice(4 * 47, 4 * 47 + 3))"
    assert tab.run(corner) == before
    unnamed = "[...document.querySelectorAll('img:not([alt]), canvas:not([aria-label])')].length"
    assert tab.run(unnamed) == 0
