"""Pictures and the report show what they claim: colours of the table, attention of the network."""

import functools
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading

import cv2
import numpy as np
import pytest
import torch
from conftest import call

import danet
from danet.config.build import checked_config, load_saved, make_dataset
from danet.evaluation.inference import Sliding
from danet.models.heads.dual import DualAttentionHead, FCNHead, SingleAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor
from danet.tools.compare import Run, as_page
from danet.types import Sample
from danet.visualization import attention, overlay, report
from danet.visualization.attention import Point, figure, position_maps, validation_pictures
from danet.visualization.overlay import Legend, SegmentedImage
from danet.visualization.report import chart, render

NAMES = ("sky", "road", "a class with a long name", "car")
PALETTE = ((70, 130, 180), (128, 64, 128), (10, 200, 30), (0, 0, 142))
LEGEND = Legend(NAMES, PALETTE)


@pytest.fixture
def picture():
    truth = np.zeros((60, 200), np.uint8)
    truth[30:] = 1
    truth[40:50, 20:40] = 3
    truth[:5, :5] = 255
    prediction = np.where(truth == 255, 0, truth).astype(np.uint8)
    return SegmentedImage("x", np.full((60, 200, 3), 100, np.uint8), prediction, truth)


DUAL = functools.partial(DualAttentionHead, reduction=2)
POSITION = functools.partial(SingleAttentionHead, reduction=2, attention="position")
CHANNEL = functools.partial(SingleAttentionHead, attention="channel")


@functools.cache
def network(head=DUAL):
    torch.manual_seed(0)
    return Segmentor(ResNet(depth=18, width=8), functools.partial(head, num_classes=4)).eval()


def test_an_overlay_mixes_the_colours_of_the_table(picture):
    drawn = LEGEND._replace(opacity=0.5).over(picture.image, picture.truth)
    assert drawn[45, 30].tolist() == [50, 50, 121]
    assert drawn[0, 0].tolist() == [100, 100, 100]
    assert overlay.colorize(picture.truth, PALETTE)[45, 30].tolist() == [0, 0, 142]
    assert overlay.colorize(picture.truth, PALETTE)[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_background_has_no_tint_wherever_it_stands_and_an_empty_swatch(picture, place):
    names = [*"abcd"]
    names[place] = "_background_"
    legend = Legend(names, PALETTE, opacity=1)
    drawn = legend.over(picture.image, picture.truth)
    for index in (0, 1, 3):
        color = [100, 100, 100] if index == place else list(PALETTE[index])
        assert np.unique(drawn[picture.truth == index], axis=0).tolist() == [color]
    colors = {tuple(c) for c in overlay.with_legend(drawn[:1], legend, {place})[1:].reshape(-1, 3)}
    assert PALETTE[place] not in colors


def test_a_sheet_has_truth_and_red_errors_only_where_there_is_one(picture):
    picture.prediction[20, 100] = 3
    picture.prediction[0, 0] = 1
    drawn = overlay.sheet(LEGEND, picture)
    assert drawn.shape == (4 * (18 + 120) + 3 * 4 + 18, 400, 3)  # at twice the size
    errors = drawn[-18 - 120 : -18]
    assert (errors[40:42, 200:202] == (220, 40, 40)).all()
    assert errors[0, 0].tolist() == [0, 0, 0]
    assert (errors == (220, 40, 40)).all(axis=2).sum() == 4
    without = overlay.sheet(LEGEND, picture._replace(truth=None))
    assert without.shape == (2 * (18 + 120) + 4 + 18, 400, 3)


@pytest.mark.parametrize(("height", "width", "factor"), [(48, 96, 2), (64, 384, 2), (360, 480, 1)])
def test_small_pictures_are_drawn_at_twice_their_size(height, width, factor):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = rng.integers(0, 4, (height, width), dtype=np.uint8)
    (drawn,) = overlay.enlarge([SegmentedImage("x", image, mask, mask)])
    assert np.array_equal(drawn.truth, mask.repeat(factor, 0).repeat(factor, 1))
    assert drawn.image.shape == (factor * height, factor * width, 3)
    means = drawn.image.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
    assert abs(means - image).mean() < 40  # smoothed, at the same place; 85 anywhere else


@pytest.mark.parametrize("room", [7, 96])
@pytest.mark.parametrize(
    "title", ["an own picture with a long name", "IMG_20260501_" * 5, "W" * 40]
)
def test_a_title_takes_as_many_lines_as_it_needs(title, room):
    def titles(width):
        drawn = overlay.compose([(title, np.zeros((30, width, 3), np.uint8))], LEGEND, [])
        return 255 - drawn[: -30 - 18].astype(int)

    whole, narrow = titles(900), titles(room)
    assert whole.shape[0] == 18
    assert narrow.shape[0] > 18
    assert narrow.sum() == pytest.approx(whole.sum(), rel=0.03)  # as much ink
    assert not narrow[:, -2:].any()


@pytest.mark.parametrize("width", [60, 200, 700])
def test_the_legend_shows_every_present_class_and_no_other(width):
    drawn = overlay.with_legend(np.zeros((1, width, 3), np.uint8), LEGEND, {0, 2, 3})
    assert drawn.shape[1] == width if width > 60 else drawn.shape[1] > width
    assert (drawn[1:, -3:] == 255).all(), "a name is cut off"
    colors = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert {PALETTE[0], PALETTE[2], PALETTE[3]} <= colors
    assert PALETTE[1] not in colors


def test_a_sheet_of_many_has_a_row_for_each_picture_whatever_its_size(picture):
    tall = SegmentedImage("tall", *(np.rot90(array).copy() for array in picture[1:]))
    large = SegmentedImage("large", *(a.repeat(9, 0).repeat(9, 1) for a in picture[1:]))
    small = overlay.resize(large, 0.16)
    assert small.truth.shape == (86, 288)
    drawn = overlay.sheet(LEGEND, picture, tall, small)
    assert drawn.shape == (3 * 18 + 60 + 200 + 86 + 2 * 4 + 18, 4 * 288 + 3 * 4, 3)
    # Below the title of the second row, in its third column, is the truth of the second picture.
    truth = LEGEND.over(tall.image, tall.truth)
    assert (drawn[82 + 18 : 82 + 218, 584 : 584 + 60] == truth).all()


def test_position_maps_are_the_rows_of_the_chosen_pixels():
    model = network()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    maps = attention.position_maps(model, image, [Point(0, 0), Point(95, 63), Point(50, 20)])
    assert maps.shape == (3, 8, 12)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))
    queries, keys = attention.queries_and_keys(model, image)
    weights = (queries.flatten(1).T @ keys.flatten(1)).softmax(dim=-1).view(96, 8, 12)
    torch.testing.assert_close(maps, weights[[0, 95, 2 * 12 + 6]])
    module = model.head.position
    x = module.reduce(model.backbone(model.normalise(attention.as_tensor(image, model)))[-1])
    torch.testing.assert_close(module.attention.query(x)[0], queries)


def test_channels_are_ranked_by_how_well_they_separate_a_class():
    prediction = np.zeros((32, 32), np.uint8)
    prediction[8:16, 8:16] = 2
    maps = torch.rand(5, 8, 8)
    maps[3] = 0
    maps[3, 2:4, 2:4] = 7
    maps[1] = maps[3] * 0.1 + torch.rand(8, 8) * 0.2
    ranked = attention.rank_channels(maps, prediction, 2)
    assert [channel for channel, _ in ranked[:2]] == [3, 1]
    assert sorted(channel for channel, _ in ranked) == list(range(5))
    assert ranked[0][1] == pytest.approx((7 / maps[3].std()).item())


def test_heat_is_what_lies_above_the_mean():
    image = np.full((8, 8, 3), 100, np.uint8)
    values = torch.zeros(8, 8)
    values[2, 5], values[6, 1] = 1, 0.25
    drawn = attention.heatmap(values, image)
    assert drawn[2, 5].tolist() == [252, 255, 164]  # the end of "inferno"
    assert drawn[0, 0].tolist() == [70, 70, 74]  # the image, dimmed; "inferno" begins at 0, 0, 4
    strength = ((0.25 - 1.25 / 64) / (1 - 1.25 / 64)) ** 0.5
    scale = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)
    red = scale[round(255 * strength), 0, 2]
    assert drawn[6, 1, 0] == pytest.approx(red + (1 - strength) * 70, abs=1)
    assert np.array_equal(attention.heatmap(3 * values + 5, image), drawn)
    assert (attention.heatmap(torch.ones(8, 8), image) == drawn[0, 0]).all()


def test_titles_say_in_words_what_a_map_shows(picture, monkeypatch):
    titles = []
    monkeypatch.setattr(
        attention, "compose", lambda panels, *_: titles.extend(t for t, _ in panels)
    )
    scores = [(7, 1.0), (3, 0.4), (5, -0.1)]
    monkeypatch.setattr(attention, "rank_channels", lambda *_: scores)
    maps = torch.zeros(1, 6, 20)
    maps[0, :3], maps[0, 4, 3] = 0.25 / 60, 0.75  # a quarter on the sky, the rest on the car
    monkeypatch.setattr(attention, "position_maps", lambda *_: maps)
    figure(network(), picture, LEGEND, points=[Point(100, 50)], channels=3)
    assert titles[1:-2] == [
        "1 (road) attends to car (75 %)",
        *(f"channel {c} on road" for c in ("7, far stronger", "3, stronger", "5, not stronger")),
    ]


def test_points_lie_inside_wanted_or_rare_classes(picture):
    prediction = picture.prediction
    (point,) = attention.choose_points(prediction, wanted=[3, 2])
    assert prediction[point.y, point.x] == 3
    assert 24 <= point.x <= 35
    prediction[0, 0] = 2  # too few pixels to be chosen
    chosen = attention.choose_points(prediction, count=2)
    assert [int(prediction[p.y, p.x]) for p in chosen] == [3, 1]


@pytest.mark.parametrize(
    ("head", "options", "panels"),
    [
        (DUAL, {"points": [Point(30, 45), Point(100, 10)]}, 7),
        (POSITION, {"points": [Point(30, 45), Point(100, 10)]}, 5),
        (CHANNEL, {}, 5),
        (DUAL, {"channels": 2}, 1 + 3 + 2 * 2 + 2),
    ],
    ids=["dual", "position", "channel", "chosen points"],
)
def test_figure_6_has_a_panel_for_all_there_is(picture, head, options, panels):
    drawn = figure(network(head), picture, LEGEND, **options)
    rows = (drawn.shape[0] - panels * (120 + 18) - (panels - 1) * 4) / 18
    assert rows == int(rows) >= 1


def test_no_channel_indicates_a_class_that_fills_the_picture(picture, monkeypatch):
    monkeypatch.setattr(attention, "rank_channels", None)  # not to be called
    picture.prediction[:] = 3
    figure(network(), picture, LEGEND)


def test_pictures_of_a_validation_pass_the_network_in_small_parts(picture, monkeypatch):
    class Pictures(list):
        classes, palette = NAMES, PALETTE

    samples, seen = Pictures(Sample(picture.image, picture.truth, name) for name in "ab"), []
    hook = lambda _, x: seen.append(x[0][0, 0].numel())  # noqa: E731
    handle = network().backbone.register_forward_pre_hook(hook)
    infer = Sliding(crop=(32, 32), stride=(32, 32), windows_per_batch=1)
    drawn = validation_pictures(network(), samples, infer, max_pixels=1500)
    handle.remove()
    assert list(drawn) == ["a", "a_attention", "b"]
    assert max(seen) <= 1500
    assert not attention.attention_branches(network(FCNHead))


# The report: one page that needs nothing else, and its attention viewer


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """The output of one call of the tool, with a log beside the checkpoint."""
    output, log = tmp_path_factory.mktemp("report"), tiny_checkpoint.with_name("metrics.jsonl")
    lines = [
        {"step": 2, "kind": "train", "loss": 3.0, "loss_main": 1.0, "lr": 0.002},
        {"step": 4, "kind": "train", "loss": 2.5, "loss_main": None, "lr": 0.001},
        {"step": 6, "kind": "val", "miou": 0.25, "pixel_accuracy": 0.5},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    typed = (f"checkpoint={tiny_checkpoint}", f"output={output}", "device=cpu")
    call("visualize", *typed, "report=true", "count=2")
    call("eval", *typed)
    log.unlink()
    return output


def test_the_page_has_the_scores_of_an_evaluation_and_needs_nothing_outside_of_it(folder):
    names = {p.name for p in folder.glob("*.*") if p.suffix in (".png", ".html")}
    pictures = {f"val_{i:06d}{kind}.png" for i in (0, 4) for kind in ("", "_attention")}
    assert names == {"contact_sheet.png", "report.html"} | pictures
    text = (folder / "report.html").read_text()
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{0,40})""", text)
    assert links
    assert all(link.startswith("data:image/") for link in links)
    outside = [url for url in re.findall(r"https?://[^\s'\"<]+", text) if "w3.org" not in url]
    assert outside == []
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"<b>{100 * metrics['miou']:.2f}</b>" in text
    assert f"<b>{100 * metrics['pixel_accuracy']:.2f}</b>" in text
    # No images per second in that log; reliability and risk.
    assert text.count("<svg") == 3 + 2
    assert all(f">{name}</td>" in text for name in metrics["per_class"])
    assert f"<title>Scenes, val: {100 * metrics['miou']:.2f} % mean IoU</title>" in text
    # Of the five pictures three are the best and the other two the worst.
    assert sorted(re.findall(r"val_\d+(?=: mean IoU)", text)) == [f"val_{i:06d}" for i in range(5)]


def long_run(number):
    """Returns a run with a name and settings as sweeps have them."""
    name = f"2026-01-31_12-00-00,loss.main.class_weights=[{'0.25,' * 20}],seed={number}"
    config = {f"model.head.setting_{i}": f"danet.models.{'heads.' * 9}{number}" for i in range(20)}
    lines = [{"step": step, "kind": "train", "loss": 1 / step} for step in range(1, 9)]
    return Run(name, config, lines)


ACTIONS = """
const until = async (condition) => {
  while (!condition()) await new Promise((done) => setTimeout(done, 20));
};
async function act() {
  const buttons = document.querySelectorAll("#choices button");
  await until(() => viewer.number >= 0);
  const first = viewer.number;
  buttons[0].click();
  await until(() => viewer.number === 0);
  const asked = performance.getEntriesByType("resource").map((resource) => resource.name);
  problems.push(...asked.filter((name) => !name.startsWith("data:")));
  const seen = { problems, first, before: attention.toDataURL(), moves: [], phone: [] };
  const box = attention.getBoundingClientRect();
  const place = { clientX: box.left + 0.8 * box.width, clientY: box.top + 0.7 * box.height };
  attention.dispatchEvent(new PointerEvent("pointermove", place));
  Object.assign(seen, { x: viewer.x, y: viewer.y, weights: Array.from(viewer.weights) });
  seen.strengths = strengths(viewer.weights);
  Object.assign(seen, { readout: readout.innerText, after: attention.toDataURL() });
  for (const key of ["ArrowLeft", "ArrowUp"]) {
    attention.dispatchEvent(new KeyboardEvent("keydown", { key }));
    seen.moves.push([viewer.x, viewer.y]);
  }
  const tap = { clientX: box.left + 0.1 * box.width, clientY: box.top + 0.1 * box.height };
  attention.dispatchEvent(new PointerEvent("pointerdown", { ...tap, pointerType: "touch" }));
  seen.tapped = [viewer.x, viewer.y];
  for (const number of [1, 0]) buttons[number].click();
  await page.pictures[1].shown.decode();
  seen.number = viewer.number; // that of the last click, though the other was decoded later
  buttons[1].click();
  await until(() => viewer.number === 1);
  seen.pressed = Array.from(buttons, (button) => button.getAttribute("aria-pressed"));
  for (const name of ["report.html", "runs.html"]) {
    const phone = document.createElement("iframe");
    Object.assign(phone, { width: 390, height: 800, src: name });
    document.body.append(phone);
    await new Promise((done) => phone.addEventListener("load", done));
    const { scrollWidth, clientWidth } = phone.contentDocument.documentElement;
    seen.phone.push(phone.contentDocument.title, scrollWidth - clientWidth);
  }
  await fetch("seen", { method: "POST", body: JSON.stringify(seen) });
}
act();
"""
"""What a visitor does on the page, and what there is to see then."""


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory):
    """Returns what ACTIONS find in a headless browser that reaches nothing but the page."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("there is no chromium; on Debian and Ubuntu: apt install chromium")
    catch = "const problems = []; addEventListener('error', (e) => problems.push(e.message));"
    text = (folder / "report.html").read_text()
    text = text.replace("<head>", f"<head><script>{catch}</script>")
    site, profile = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("profile")
    (site / "report.html").write_text(text)
    (site / "runs.html").write_text(as_page([long_run(number) for number in range(3)]))
    text = '"wanted": true'.join(text.rsplit('"wanted": null', 1))  # of the second picture
    (site / "index.html").write_text(f"{text}<script>{ACTIONS}</script>")
    found = queue.Queue()

    class Site(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_error(204)

    serve = functools.partial(Site, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", f"--user-data-dir={profile}", "--window-size=1200,900"),
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        )
        command = [browser, *options, f"http://127.0.0.1:{server.server_port}"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                return found.get(timeout=60)
            finally:
                process.terminate()
                server.shutdown()


def test_pointing_at_a_pixel_shows_what_it_attends_to(seen, tiny_checkpoint):
    x, y = seen["x"], seen["y"]
    assert abs(x - 0.8 * 96) <= 1
    assert abs(y - 0.7 * 48) <= 1
    model = danet.load_model(tiny_checkpoint)
    config = checked_config(load_saved(tiny_checkpoint), tiny_checkpoint)
    image = make_dataset(config, "val", training=False)[0].image
    expected = position_maps(model, image, [Point(x, y)])[0].flatten()
    torch.testing.assert_close(torch.tensor(seen["weights"]), expected, atol=1e-6, rtol=1e-4)
    classes = danet.predict(model, image)
    middle = model.classes[classes[y // 8 * 8 + 4, x // 8 * 8 + 4]]  # of the cell of eight pixels
    assert f"Pixel ({x}, {y}), predicted as {middle}, attends to" in seen["readout"]
    assert seen["before"] != seen["after"]


def test_the_heat_of_the_viewer_is_that_of_the_figures(seen):
    weights = np.array(seen["weights"])
    above = (weights - 1 / len(weights)).clip(0)
    np.testing.assert_allclose(seen["strengths"], np.sqrt(above / above.max()), atol=1e-6)
    assert 0 in seen["strengths"]
    assert max(seen["strengths"]) == 1


def test_a_tap_moves_the_point_and_pages_fit_on_a_phone(seen):
    assert seen["tapped"] == [9, 4]
    title, wider, *runs = seen["phone"]
    assert title.startswith("Scenes, val")
    assert [wider, *runs] == [0, "Comparison of 3 runs", 0]  # nothing to scroll sideways


def test_the_viewer_starts_on_a_class_that_was_asked_for(seen, tiny_checkpoint):
    assert seen["first"] == 1
    model = danet.load_model(tiny_checkpoint)
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    prediction = np.zeros((48, 96), np.uint8)
    prediction[8:32, 40:72], prediction[40:, :16] = 3, 5
    picture = SegmentedImage("x", image, prediction)
    for wanted, found in (([3], 3), ([7, 5], 5), ([7], None), ([], None)):
        view = report.view(model, picture, wanted)
        x, y = view["start"]
        assert view["wanted"] == (found is not None if wanted else None)
        assert prediction[y, x] == (5 if found is None else found)  # else a rare class


def test_keys_move_the_point_and_buttons_choose_a_picture(seen):
    x, y = seen["x"], seen["y"]
    assert seen["moves"] == [[x - 8, y], [x - 8, y - 8]]
    assert (seen["number"], seen["pressed"], seen["problems"]) == (0, ["false", "true"], [])


def test_a_large_picture_is_made_smaller_for_the_viewer(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(report, "MAX_POSITIONS", 40)
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    picture = SegmentedImage("x", image, image[..., 0] % 16)
    seen = report.view(danet.load_model(tiny_checkpoint), picture)
    assert seen["rows"] * seen["columns"] <= 40
    assert seen["width"] / seen["height"] == pytest.approx(2, rel=0.1)


def test_a_chart_draws_finite_points_with_round_numbers():
    drawn = chart("a < b", {"x": [(0, 0.5), (100, float("nan")), (200, 1.5)], "y": [(0, 1.0)]})
    assert "a &lt; b" in drawn
    assert "nan" not in drawn
    for number in (">0<", ">100<", ">200<", ">0.6<", ">1.2<"):
        assert number in drawn
    assert chart("nothing", {"x": []}) == ""
    alone = chart("one", {"x": [(350, 0.79)]})
    assert "circle" in alone
    assert ">350<" in alone
    assert alone.count('text-anchor="middle"') == 2  # one tick and the name of the axis


def test_text_of_others_is_only_ever_shown():
    curves = {"<i>": [(0, 1.0)], "<b>": [(0, 1.0)]}
    text = render("runs.html", title="<u>", rows=[["<s>"]], charts=[chart("<em>", curves)])
    assert "<svg" in text
    for tag in ("<i>", "<b>", "<u>", "<s>", "<em>"):
        assert tag not in text
        assert tag.replace("<", "&lt;").replace(">", "&gt;") in text
