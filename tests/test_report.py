"""The report is one page that needs nothing else, and its viewer shows the network's attention."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import call

import danet
from danet.config.build import checked_config, load_saved, make_dataset
from danet.visualization import report
from danet.visualization.attention import Point, position_maps
from danet.visualization.overlay import SegmentedImage
from danet.visualization.report import chart, render


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
const wait = () => new Promise((done) => setTimeout(done, 300));
async function act() {
  await wait();
  const asked = performance.getEntriesByType("resource").map((resource) => resource.name);
  problems.push(...asked.filter((name) => !/^(file|data):/.test(name)));
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
  document.querySelectorAll("#choices button")[1].click();
  await wait();
  seen.number = viewer.number;
  seen.pressed = document.querySelectorAll("#choices [aria-pressed=true]").length;
  document.documentElement.style.width = "420px";
  seen.right = document.querySelector("#viewer").getBoundingClientRect().right;
  document.title = ":" + btoa(JSON.stringify(seen).replace(/[^\\x00-\\x7f]/g, "?")) + ":";
}
act();
"""
"""What a visitor does on the page, and what there is to see then."""


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory):
    """Returns what ACTIONS find in a headless browser without network."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("there is no chromium; on Debian and Ubuntu: apt install chromium")
    page, profile = tmp_path_factory.mktemp("page") / "p.html", tmp_path_factory.mktemp("profile")
    catch = "const problems = []; addEventListener('error', (e) => problems.push(e.message));"
    text = (folder / "report.html").read_text()
    text = text.replace("<head>", f"<head><script>{catch}</script>")
    page.write_text(f"{text}<script>{ACTIONS}</script>")
    options = (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"),
        *("--disable-dev-shm-usage", f"--user-data-dir={profile}", "--window-size=1200,900"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=9000"),
    )
    command = [browser, *options, page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=40).stdout
    return json.loads(base64.b64decode(re.search("<title>:(.*?):", dom)[1]))


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
    assert (seen["number"], seen["pressed"], seen["problems"]) == (1, 1, [])
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
