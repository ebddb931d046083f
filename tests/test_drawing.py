"""Pictures and the report show what they claim: colours of the table, attention of the network."""

import functools
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading

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


def test_a_sheet_has_truth_and_red_errors_only_where_there_is_one(picture):
    picture.prediction[20, 100] = 3
    picture.prediction[0, 0] = 1
    drawn = overlay.sheet(LEGEND, picture)
    assert drawn.shape == (4 * (18 + 60) + 3 * 4 + 18, 200, 3)
    errors = drawn[-18 - 60 : -18]
    assert errors[20, 100].tolist() == [220, 40, 40]
    assert errors[0, 0].tolist() == [0, 0, 0]
    assert (errors == (220, 40, 40)).all(axis=2).sum() == 1
    without = overlay.sheet(LEGEND, picture._replace(truth=None))
    assert without.shape == (2 * (18 + 60) + 4 + 18, 200, 3)


@pytest.mark.parametrize("width", [60, 200, 700])
def test_the_legend_shows_every_present_class_and_no_other(width):
    drawn = overlay.with_legend(np.zeros((1, width, 3), np.uint8), LEGEND, {0, 2, 3})
    assert drawn.shape[1] == width
    colors = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert {PALETTE[0], PALETTE[2], PALETTE[3]} <= colors
    assert PALETTE[1] not in colors


def test_a_sheet_of_many_has_a_row_for_each_picture_whatever_its_size(picture):
    tall = SegmentedImage("tall", *(np.rot90(array).copy() for array in picture[1:]))
    large = SegmentedImage("large", *(a.repeat(9, 0).repeat(9, 1) for a in picture[1:]))
    small = overlay.shrink(large, 0.16)
    assert small.truth.shape == (86, 288)
    drawn = overlay.sheet(LEGEND, picture, tall, small)
    assert drawn.shape == (3 * (18 + 200) + 2 * 4 + 18, 4 * 288 + 3 * 4, 3)
    # Below the title of the second row, in its third column, is the truth of the second picture.
    truth = LEGEND.over(tall.image, tall.truth)
    assert (drawn[222 + 18 : 222 + 218, 584 : 584 + 60] == truth).all()


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
    rows = (drawn.shape[0] - panels * (60 + 18) - (panels - 1) * 4) / 18
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
    assert text.count("<svg") == 3  # no images per second in that log
    assert all(f">{name}</td>" in text for name in metrics["per_class"])


ACTIONS = """
const until = async (condition) => {
  while (!condition()) await new Promise((done) => setTimeout(done, 20));
};
async function act() {
  const buttons = document.querySelectorAll("#choices button");
  await until(() => viewer.number === 0);
  const asked = performance.getEntriesByType("resource").map((resource) => resource.name);
  problems.push(...asked.filter((name) => !name.startsWith("data:")));
  const seen = { problems, before: attention.toDataURL(), moves: [] };
  const box = attention.getBoundingClientRect();
  const place = { clientX: box.left + 0.8 * box.width, clientY: box.top + 0.7 * box.height };
  attention.dispatchEvent(new PointerEvent("pointermove", place));
  Object.assign(seen, { x: viewer.x, y: viewer.y, weights: Array.from(viewer.weights) });
  Object.assign(seen, { readout: readout.innerText, after: attention.toDataURL() });
  for (const key of ["ArrowLeft", "ArrowUp"]) {
    attention.dispatchEvent(new KeyboardEvent("keydown", { key }));
    seen.moves.push([viewer.x, viewer.y]);
  }
  for (const number of [1, 0]) buttons[number].click();
  await page.pictures[1].shown.decode();
  seen.number = viewer.number; // that of the last click, though the other was decoded later
  buttons[1].click();
  await until(() => viewer.number === 1);
  seen.pressed = Array.from(buttons, (button) => button.getAttribute("aria-pressed"));
  document.documentElement.style.width = "420px";
  seen.right = document.querySelector("#viewer").getBoundingClientRect().right;
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


def test_keys_move_the_point_and_buttons_choose_a_picture(seen):
    x, y = seen["x"], seen["y"]
    assert seen["moves"] == [[x - 8, y], [x - 8, y - 8]]
    assert (seen["number"], seen["pressed"], seen["problems"]) == (0, ["false", "true"], [])
    assert seen["right"] <= 420


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
