"""Rasters of any size become class maps at the same place on the earth, window by window."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from conftest import call
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from torch import nn

import danet
from danet.bands import bands_of
from danet.errors import InputError, StorageError
from danet.evaluation.inference import Sliding, Whole
from danet.prediction import raster as raster_module
from danet.prediction.predict import predict
from danet.prediction.raster import open_raster, predict_raster, read_window
from danet.prediction.sources import find_sources
from danet.visualization.overlay import Legend

PLACE = {"crs": "EPSG:32632", "transform": rasterio.Affine(0.3, 0, 500000.1, 0, -0.3, 5400000.7)}


def save(path, bands, **profile):
    """Saves bands (N, H, W) as a raster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    profile = {"count": count, "height": height, "width": width, "dtype": bands.dtype, **profile}
    with open_raster(path, driver="GTiff", **profile) as file:
        file.write(bands)
    return path


def noise(*shape, low=0, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return danet.load_model(tiny_checkpoint)


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 64 x 64, one every 48 pixels, of rasters above 64 x 64."""
    monkeypatch.setattr(raster_module, "TILE", 64)
    monkeypatch.setattr(raster_module, "MAX_PIXELS", 64 * 64)


def mapped(model, path, infer=None, **settings):
    """Returns the class map of a raster, and the pixels of each class."""
    legend = Legend(model.classes, model.palette, bands=model.bands)
    (source,), to = find_sources(str(path)), path.with_name("map.tif")
    picture, _ = predict_raster(model, source, infer or Whole(), to, legend, **settings)
    with open_raster(to) as file:
        return file.read(1), picture.counts


@pytest.fixture
def start(tiny_checkpoint, tmp_path, capsys):
    """Predicts into the folder "out" and returns what is printed, results and messages."""

    def started(images, *settings, code=0):
        typed = [f"checkpoint={tiny_checkpoint}", f"images={images}", f"output={tmp_path / 'out'}"]
        call("predict", *typed, "device=cpu", *settings, code=code)
        return "".join(capsys.readouterr())

    return started


class FourBands(nn.Module):
    """The band that is farthest above the mean, from float32."""

    bands = None
    classes, palette = "abcd", [(i, i, i) for i in range(4)]

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([100.0, 900.0, -5.0, 3000.0]).view(4, 1, 1))
        self.scale = nn.Parameter(torch.tensor(0.01))

    def forward(self, image):
        assert image.dtype == torch.float32
        return SimpleNamespace(logits=(image - self.mean) * self.scale)


@pytest.mark.parametrize(
    "infer", [Whole(), Sliding(crop=(48, 48), stride=(32, 32))], ids=["whole", "sliding"]
)
def test_a_raster_of_one_window_has_the_classes_of_predict(model, tmp_path, infer):
    pixels = noise(3, 70, 110)
    path = save(tmp_path / "a.tif", pixels, **PLACE)
    classes, _ = mapped(model, path, infer)
    expected = predict(model, np.moveaxis(pixels, 0, -1), infer=infer)
    assert len(np.unique(expected)) > 1, "else this test could not fail"
    assert np.array_equal(classes, expected)


def slow_loop(model, pixels, infer=None):
    """Blocks of 48 x 48 out of windows of 64 x 64, one pixel row and column at a time."""
    height, width = pixels.shape[:2]
    expected, cache = np.zeros((height, width), np.uint8), {}
    for y in range(height):
        for x in range(width):
            # The window begins 8 pixels before the block, unless a border is in the way.
            top = min(max(y // 48 * 48 - 8, 0), max(height - 64, 0)) if height > 64 else 0
            left = min(max(x // 48 * 48 - 8, 0), max(width - 64, 0)) if width > 64 else 0
            if (top, left) not in cache:
                window = pixels[top : top + 64, left : left + 64]
                cache[top, left] = predict(model, window, infer=infer)
            expected[y, x] = cache[top, left][y - top, x - left]
    return expected


@pytest.mark.parametrize("size", [(150, 200), (64, 97), (65, 64), (50, 145), (96, 300)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_blocks_are_cut_out_of_windows_around_them(
    model, tmp_path, small_windows, size, batch_size
):
    pixels = noise(3, *size)
    classes, _ = mapped(model, save(tmp_path / "a.tif", pixels, **PLACE), batch_size=batch_size)
    image = np.moveaxis(pixels, 0, -1)
    assert np.array_equal(classes, slow_loop(model, image))
    assert (classes != predict(model, image)).any(), "else this test could not fail"


def test_windows_hold_those_of_the_inference_mode(model, tmp_path, small_windows):
    pixels, infer = noise(3, 100, 130), Sliding(crop=(80, 80), stride=(48, 48))
    classes, _ = mapped(model, save(tmp_path / "a.tif", pixels), infer)  # windows of 128 x 128
    whole = np.moveaxis(pixels, 0, -1)
    assert np.array_equal(classes[:, :96], predict(model, whole[:, :128], infer=infer)[:, :96])
    assert np.array_equal(classes[:, 96:], predict(model, whole[:, 2:], infer=infer)[:, 94:])


@pytest.mark.parametrize(
    "place",
    [
        PLACE,
        {"crs": "EPSG:4326", "transform": rasterio.Affine(1e-5, 2e-6, 11.1, -2e-6, -1e-5, 48.3)},
        {"transform": rasterio.Affine(2, 0, 7, 0, -2, 9)},
        {
            "crs": "EPSG:4326",
            "gcps": [GroundControlPoint(r, c, c / 7, r / 3) for r in (0, 9) for c in (0, 5)],
        },
        {},
    ],
    ids=["north up", "turned", "no crs", "control points", "none"],
)
def test_the_class_map_lies_where_the_raster_does(model, tmp_path, small_windows, place):
    path = save(tmp_path / "a.tif", noise(3, 70, 80), **place)
    mapped(model, path)
    with open_raster(path) as given, open_raster(tmp_path / "map.tif") as found:
        assert found.crs == given.crs
        assert tuple(found.transform) == tuple(given.transform)
        assert (found.width, found.height, found.count) == (80, 70, 1)
        points = [[(p.row, p.col, p.x, p.y) for p in file.gcps[0]] for file in (given, found)]
        assert points[0] == points[1]
        assert found.gcps[1] == given.gcps[1]
        assert (found.nodata, found.dtypes) == (255, ("uint8",))
        assert found.profile["compress"] == "deflate"
        assert found.block_shapes == [(256, 256)]
        colors = found.colormap(1)
        assert [colors[i][:3] for i in range(len(model.palette))] == list(model.palette)
        assert colors[255][3] == 0
        tags = found.tags(1)
        assert [tags[f"class_{i}"] for i in range(len(model.classes))] == list(model.classes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "map.tif"]  # nothing beside it
    with Image.open(tmp_path / "map.tif") as opened:  # others can read it, too
        assert opened.size == (80, 70)


def test_pixels_without_data_have_no_class(model, tmp_path, small_windows, monkeypatch):
    pixels = noise(3, 150, 200, low=1)
    pixels[:, 20:60, :130] = 0
    pixels[:, :, 150:] = 0  # has whole blocks
    pixels[0, 100, 100] = 0  # in one band alone
    path, passes = save(tmp_path / "a.tif", pixels, nodata=0, **PLACE), []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    classes, counts = mapped(model, path)
    hook.remove()
    assert len(passes) == 4 * 4  # none for the fifth column of blocks, which has no data
    is_empty = (pixels == 0).all(axis=0)
    assert np.array_equal(classes == 255, is_empty)
    expected = slow_loop(model, np.moveaxis(pixels, 0, -1))
    assert np.array_equal(classes[~is_empty], expected[~is_empty])
    assert counts == np.bincount(classes.ravel(), minlength=256).tolist()


def test_an_alpha_band_is_the_mask_and_no_input(model, tmp_path):
    pixels = noise(4, 40, 50)
    pixels[3] = np.where(pixels[3] > 100, 255, 0)
    path = save(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES", **PLACE)
    classes, _ = mapped(model, path)
    expected = predict(model, np.moveaxis(pixels[:3], 0, -1))
    assert np.array_equal(classes, np.where(pixels[3] > 0, expected, 255))


def test_grey_is_repeated_as_in_pictures(model, tmp_path):
    pixels = noise(1, 40, 50)
    classes, _ = mapped(model, save(tmp_path / "a.tif", pixels, **PLACE))
    assert np.array_equal(classes, predict(model, pixels[0]))


def test_a_network_gets_its_bands_as_they_are_stored(tmp_path, small_windows):
    network = FourBands()
    pixels = noise(6, 100, 130, low=-1000, high=4000, dtype=np.float32)
    pixels[1, 5, 7], pixels[:, 50:60, 20:40], pixels[0, 3, 3] = np.nan, -9999, np.nan
    path = save(tmp_path / "a.tif", pixels, nodata=-9999, **PLACE)
    network.bands = bands_of([6, 2, 3, 4], [-1000, 4000], None)
    classes, _ = mapped(network, path)
    chosen = pixels[[5, 1, 2, 3]]
    is_missing = (chosen == -9999) | np.isnan(chosen)
    assert is_missing[1, 5, 7]
    assert is_missing[:, 55, 30].all()
    # A band that is missing is black, as in a training; where all are, there is no class.
    black = np.where(is_missing, -1000, chosen)
    expected = (black - network.mean.numpy()).argmax(axis=0)
    assert np.array_equal(classes, np.where(is_missing.all(axis=0), 255, expected))


def test_windows_are_read_as_stored(tmp_path):
    for dtype, expected in (("uint8", "uint8"), ("int16", "float32"), ("float64", "float32")):
        pixels = noise(5, 30, 40).astype(dtype)
        with open_raster(save(tmp_path / f"{dtype}.tif", pixels, **PLACE)) as file:
            found, valid = read_window(file, ((3, 10), (5, 40)), [4, 1])
        assert found.dtype == expected
        assert np.array_equal(found, np.moveaxis(pixels[[3, 0], 3:10, 5:40], 0, -1))
        assert valid.all()
        assert valid.shape == (7, 35, 2)


def test_more_than_255_classes_have_16_bits(model, tmp_path):
    legend = Legend([f"c{i}" for i in range(256)], [(1, 2, 3)] * 256)
    pixels = noise(3, 40, 50, low=1)
    pixels[:, :5] = 0
    path = save(tmp_path / "a.tif", pixels, nodata=0, **PLACE)
    to = tmp_path / "map.tif"
    (source,) = find_sources(str(path))
    predict_raster(model, source, Whole(), to, legend)
    with open_raster(to) as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)
        assert (file.read(1)[:5] == 65535).all()
        assert np.array_equal(file.read(1)[5:], predict(model, np.moveaxis(pixels, 0, -1))[5:])


def test_a_folder_of_rasters_and_pictures_is_predicted_once(
    start, model, tmp_path, small_windows, monkeypatch
):
    monkeypatch.setattr(raster_module, "DRAWN", 100)
    pixels, output = noise(3, 150, 210, low=1), tmp_path / "out"
    pixels[:, 140:] = 0
    path = save(tmp_path / "in/sub/a.tif", pixels, nodata=0, **PLACE)
    Image.fromarray(np.moveaxis(pixels[:, :20], 0, -1).copy()).save(tmp_path / "in/b.tif")
    printed = start(tmp_path / "in", "write=[index,color,overlay]")
    assert "2 images in" in printed
    assert "1 of 2 images: color and overlay are drawn at 1/3 of its size: sub/a" in printed
    with open_raster(output / "index/sub/a.tif") as file:
        classes = file.read(1)
    assert (output / "index/b.png").exists()
    lines = map(json.loads, (output / "predictions.jsonl").read_text().splitlines())
    line = {line["name"]: line for line in lines}["sub/a"]
    assert (line["height"], line["width"]) == (150, 210)
    numbers = np.bincount(classes.ravel(), minlength=256) / classes.size
    assert line["shares"] == {n: x for n, x in zip(model.classes, numbers, strict=False) if x}
    drawn = np.array(Image.open(output / "color/sub/a.png"))
    colors = np.vstack([model.palette, np.zeros((256 - len(model.palette), 3))])
    assert np.array_equal(drawn, colors[classes[1::3, 1::3]])
    over = np.array(Image.open(output / "overlay/sub/a.png"))
    assert over.shape == (50, 70, 3)
    with open_raster(path) as file:
        small = file.read(out_shape=(3, 50, 70), resampling=rasterio.enums.Resampling.average)
    assert np.array_equal(over[47:], np.moveaxis(small, 0, -1)[47:])  # no data, no tint
    kept = (output / "index/sub/a.tif").stat().st_mtime_ns
    assert "0 images in" in start(tmp_path / "in", "write=[index,color,overlay]")
    assert (output / "index/sub/a.tif").stat().st_mtime_ns == kept
    (output / "index/sub/a.tif").unlink()
    printed = start(tmp_path / "in", "write=[index,color,overlay]")
    assert "1 images in" in printed
    assert "1 were there already" in printed


def test_an_interrupted_raster_is_absent_and_done_by_the_next_start(
    start, tmp_path, small_windows, monkeypatch
):
    path = save(tmp_path / "a.tif", noise(3, 150, 200), **PLACE)
    read, number = raster_module.read_window, iter(range(100))

    def interrupted(*given):
        if next(number) == 9:
            raise KeyboardInterrupt
        return read(*given)

    monkeypatch.setattr(raster_module, "read_window", interrupted)
    start(path, "write=[index]", code=None)
    assert not list((tmp_path / "out").rglob("*.tif"))
    assert not (tmp_path / "out/predictions.jsonl").read_text()
    monkeypatch.setattr(raster_module, "read_window", read)
    assert "1 images in" in start(path, "write=[index]")
    assert (tmp_path / "out/index/a.tif").exists()


def test_memory_does_not_grow_with_the_raster(tmp_path, small_windows, monkeypatch):
    import tracemalloc

    class Answer(nn.Module):
        classes, palette = ("a", "b"), [(0, 0, 0), (1, 1, 1)]

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, 1, 1))
            self.one = nn.Parameter(torch.ones(1))

        def forward(self, image):
            return SimpleNamespace(logits=image[:, :2] * self.one)

    monkeypatch.setattr(raster_module, "DRAWN", 50)
    peaks, to = [], tmp_path / "map.tif"
    legend = Legend(Answer.classes, Answer.palette)
    for size in (50, 300, 1000):  # the first one imports
        path = save(tmp_path / f"{size}.tif", noise(3, size, size), tiled=True, **PLACE)
        tracemalloc.start()
        (source,) = find_sources(str(path))
        predict_raster(Answer(), source, Whole(), to, legend)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The class map alone grows by 910,000 bytes, and the raster by three times that.
    assert peaks[2] - peaks[1] < 400_000


def test_without_rasterio_a_geotiff_is_a_picture_and_a_large_one_is_refused(
    start, model, tmp_path, monkeypatch
):
    pixels = noise(3, 40, 50)
    path = save(tmp_path / "in/a.tif", pixels, **PLACE)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    printed = start(path.parent, "write=[index]")
    note = "note: where rasterio is installed, GeoTIFFs keep their georeference and may be larger "
    assert f"{note}than max_pixels: pip install -e" in printed
    assert "[geo]" in printed
    found = np.array(Image.open(tmp_path / "out/index/a.png"))
    assert (found == predict(model, np.moveaxis(pixels, 0, -1))).mean() > 0.99
    printed = start(path, "write=[index]", "max_pixels=1000", "output=null", code=2)
    assert "a.tif: 50 x 40 are 2000 pixels, more than" in printed
    assert note in printed


@pytest.mark.parametrize(
    ("count", "dtype", "bands", "message"),
    [
        (
            2,
            "uint8",
            None,
            r"2 band\(s\) of uint8 \(gray, undefined\), expected 3 or more of uint8",
        ),
        (3, "uint16", None, r"3 band\(s\) of uint16 \(gray, .*, expected 3 or more of uint8"),
        (1, "palette", None, r"1 band\(s\) of uint8 \(palette\), expected 3 or more of uint8"),
        (4, "float32", [2, 3, 5, 1], "4 band.*, expected 5 or more of real numbers"),
        (
            4,
            "complex64",
            [1, 2, 3, 4],
            "4 band.* of complex64 .*, expected 4 or more of real numbers",
        ),
    ],
)
def test_a_raster_of_another_kind_is_refused(model, tmp_path, count, dtype, bands, message):
    kind = "uint8" if dtype == "palette" else dtype
    path = save(tmp_path / "a.tif", noise(count, 9, 9).astype(kind), **PLACE)
    if dtype == "palette":
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [ColorInterp.palette]
            file.write_colormap(1, {0: (1, 2, 3)})
    network = FourBands() if bands else model
    if bands:
        network.bands = bands_of(bands, [0, 1], None)
    with pytest.raises(InputError, match=rf"^{path}: found {message}") as error:
        mapped(network, path)
    assert str(error.value).endswith("; convert it as the images of the training were")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_a_damaged_raster_is_reported_and_the_others_are_done(start, tmp_path, small_windows):
    good = save(tmp_path / "in/b.tif", noise(3, 150, 200), **PLACE)
    (tmp_path / "in/a.tif").write_bytes(good.read_bytes()[:40000])
    for name, content in (("empty", b""), ("junk", b"no TIFF")):
        (tmp_path / f"in/{name}.tif").write_bytes(content)
    printed = start(tmp_path / "in", "write=[index]", code=2)
    assert "3 of 4 files could not be read whole, the others are done" in printed
    assert "a.tif: rows (40, 104), columns (0, 64) cannot be read (" in printed
    assert "); the file is cut off or damaged" in printed
    assert "empty.tif: not a readable image (the file is empty)" in printed
    assert [p.name for p in (tmp_path / "out/index").iterdir()] == ["b.tif"]


def test_a_full_disk_leaves_no_class_map(model, tmp_path):
    resource = pytest.importorskip("resource")
    path = save(tmp_path / "a.tif", noise(3, 300, 400), **PLACE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"map.tif: cannot be written .*is the disk full"):
            mapped(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_unknown_pixels_and_confidence_are_counted_window_by_window(
    start, model, tmp_path, small_windows
):
    pixels = noise(3, 150, 170)
    pixels[:, :20] = 7
    path = save(tmp_path / "rasters/a.tif", pixels, nodata=7, **PLACE)
    start(path.parent, "write=[index]")
    whole = json.loads((tmp_path / "out/predictions.jsonl").read_text())
    least, share = whole["confidence"], sum(whole["shares"].values())
    shutil.rmtree(tmp_path / "out")
    start(path.parent, "write=[index]", f"min_confidence={least}")
    line = json.loads((tmp_path / "out/predictions.jsonl").read_text())
    assert 0.05 < line["unknown"] < 0.85
    assert line["confidence"] == least, "of all pixels with data"
    assert sum(line["shares"].values()) + line["unknown"] == pytest.approx(share)
    with open_raster(tmp_path / "out/index/a.tif") as file:
        ignored = (file.read(1) == 255).mean()
    assert ignored == pytest.approx(line["unknown"] + 1 - share)
    message = start(path.parent, "write=[index,entropy]", code=2)
    assert "is done in windows, of which no entropy is written; leave entropy out" in message


def test_a_raster_of_one_window_has_the_confidence_of_predict(start, model, tmp_path):
    path = save(tmp_path / "a.tif", noise(3, 48, 96), **PLACE)
    start(path, "write=[]")
    line = json.loads((tmp_path / "out/predictions.jsonl").read_text())
    found = predict(model, np.moveaxis(noise(3, 48, 96), 0, -1), maps=["confidence"])
    assert line["confidence"] == pytest.approx(found.confidence.mean(), rel=1e-5)
