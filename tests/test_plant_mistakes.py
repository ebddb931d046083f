"""Mistakes are where their list says, and nowhere else; an entry counts if it overlaps one."""

import csv
import importlib
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from danet.errors import InputError


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("plant_mistakes")


def test_planted_mistakes_are_in_their_boxes_and_all_other_labels_are_links(
    script, camvid, tmp_path
):
    script.main([f"root={camvid}", f"output={tmp_path / 'a'}"])
    script.main([f"root={camvid}", f"output={tmp_path / 'b'}"])
    planted = json.loads((tmp_path / "a/planted.json").read_text())
    assert planted == json.loads((tmp_path / "b/planted.json").read_text())
    kinds = [mistake["kind"] for mistake in planted]
    assert sorted(map(kinds.count, script.KINDS)) == [6, 7, 7]
    changed = {p.stem for p in (tmp_path / "a").rglob("labels/*/*.png") if not p.is_symlink()}
    assert changed == {mistake["picture"] for mistake in planted}
    assert len(changed) == 20
    for mistake in planted:
        name = f"labels/train/{mistake['picture']}.png"
        before, after, again = (
            np.asarray(Image.open(folder / name))
            for folder in (camvid, tmp_path / "a", tmp_path / "b")
        )
        assert np.array_equal(after, again)
        rows, columns = np.nonzero(before != after)
        x, y, width, height = mistake["box"]
        if mistake["kind"] != "shifted":
            assert (columns.min(), rows.min()) >= (x, y)
            assert (columns.max(), rows.max()) < (x + width, y + height)
            assert len(rows) == int(mistake["detail"].split()[0]) >= 300
        if mistake["kind"] == "missing":
            assert not np.isin(after[rows, columns], (*script.OBJECTS, script.VOID)).any()
    with pytest.raises(InputError, match="is there already"):
        script.main([f"root={camvid}", f"output={tmp_path / 'a'}"])


def test_an_entry_counts_for_its_picture_and_where_it_overlaps_alone(script, tmp_path, capsys):
    planted = [
        {"picture": name, "kind": kind, "box": [10, 10, 5, 5], "detail": ""}
        for name, kind in (("a", "swapped"), ("b", "missing"), ("c", "missing"))
    ]
    (tmp_path / "planted.json").write_text(json.dumps(planted))
    boxes = [("a", 0, 0), ("b", 15, 0), ("a", 14, 14), ("x", 10, 10), ("c", 10, 10)]
    with open(tmp_path / "found.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("rank", "x", "y", "width", "height", "label"))
        for rank, (name, x, y) in enumerate(boxes, 1):
            rows.writerow((rank, x, y, 10, 20 if x == 15 else 10, f"/data/{name}.png"))
    script.main([f"output={tmp_path}", f"found={tmp_path / 'found.csv'}", "first=4"])
    seen = capsys.readouterr().out
    assert "   3 a" in seen
    assert "swapped: 1 of 1 among the first 4" in seen
    assert "missing: 0 of 2 among the first 4" in seen
    assert "all: 1 of 3" in seen
