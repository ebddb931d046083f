"""Scores under corruptions are those of the corrupted pictures, and survive a kill."""

import csv
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call, rewrite, tool
from PIL import Image

from danet.config.build import checked_config, load_saved, make, make_dataset, model_of
from danet.data.loader import eval_batches
from danet.evaluation.corruptions import PHOTOGRAPHS, TABLE, Corrupted
from danet.evaluation.evaluate import evaluate
from danet.tools import eval as eval_tool


@pytest.fixture
def frost(tmp_path):
    """Makes a folder of pale pictures in the place of the photographs."""
    folder = tmp_path / "ice"
    folder.mkdir()
    for name in PHOTOGRAPHS:
        Image.new("RGB", (60, 50), (200, 220, 240)).save(folder / name)
    return folder


def score(network, output, *settings):
    """Evaluates a checkpoint; returns what metrics.json has."""
    call("eval", f"checkpoint={network}", f"output={output}", "device=cpu", *settings)
    return json.loads((output / "metrics.json").read_text())


def contents(folder):
    """Returns the bytes of the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_scores_are_those_of_the_corrupted_pictures(network, tmp_path, capsys, frost):
    asked = "corruptions=[frost,shot_noise]"
    metrics = score(network, tmp_path / "o", asked, f"frost={frost}")
    saved = load_saved(network)
    config = checked_config(saved, network)
    dataset, infer = (
        make_dataset(config, "val", training=False),
        make(config.evaluation, "evaluation"),
    )
    model = model_of(saved, config, network)
    assert list(metrics["corruptions"]) == ["shot_noise", "frost"]  # in their usual order
    for name, found in metrics["corruptions"].items():
        for strength in (1, 5):
            batches = eval_batches(Corrupted(dataset, name, strength, frost), batch_size=2)
            settings = {"num_classes": len(dataset.classes), "device": torch.device("cpu")}
            expected = evaluate(model, batches, infer, **settings).scores().miou
            assert found[strength - 1] == expected
    means = [np.mean(values) for values in metrics["corruptions"].values()]
    assert list(metrics["corruption_means"].values()) == pytest.approx(means)
    assert metrics["mean_corrupted_miou"] == pytest.approx(np.mean(means))
    ratio = metrics["mean_corrupted_miou"] / metrics["miou"]
    assert metrics["relative_corrupted_miou"] == pytest.approx(ratio)
    with open(tmp_path / "o/corruptions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["noise", "weather"]
    assert float(rows[1]["5"]) == metrics["corruptions"]["frost"][4]
    printed = capsys.readouterr().out
    assert re.search(r"about \d+ minutes for the other 9\n", printed)
    assert re.search(r"\n  noise: shot_noise( +\d+\.\d\d){6}\n", printed)
    assert "corruptions" not in score(network, tmp_path / "plain")


def test_a_start_that_was_killed_goes_on_to_the_same_bytes(network, tmp_path, monkeypatch, capsys):
    asked = "corruptions=[fog,shot_noise]"
    score(network, tmp_path / "whole", asked)
    whole = contents(tmp_path / "whole")
    journal, add, count = tmp_path / "cut/corruptions.jsonl", eval_tool.Robustness.add, []

    def cut(self, *arguments):
        count.append(arguments)
        if len(count) == 4:
            with journal.open("a") as file:
                file.write(whole[journal.name].decode().splitlines()[3][:50])
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(eval_tool.Robustness, "add", cut)
    call("eval", f"checkpoint={network}", f"output={tmp_path / 'cut'}", asked, code=130)
    assert len(journal.read_text().splitlines()) == 4
    score(network, tmp_path / "cut", asked)
    assert contents(tmp_path / "cut") == whole
    assert len(count) == 4 + 7  # three were finished
    score(network, tmp_path / "cut", asked)
    assert contents(tmp_path / "cut") == whole
    assert len(count) == 11


def test_lines_of_another_network_stay_and_do_not_count(network, tmp_path):
    asked = "corruptions=[contrast]"
    one = score(network, tmp_path / "o", asked)
    lines = (tmp_path / "o/corruptions.jsonl").read_text()
    weights = load_saved(network)["model"]
    other = shutil.copy(network, network.with_name("other.pt"))
    rewrite(other, model={k: v * 1.5 if v.is_floating_point() else v for k, v in weights.items()})
    two = score(other, tmp_path / "o", asked)
    found = (tmp_path / "o/corruptions.jsonl").read_text()
    assert found.startswith(lines)
    assert len(found.splitlines()) == 10
    assert two["corruptions"] != one["corruptions"]
    # Not those of another protocol, either.
    score(other, tmp_path / "o", asked, "evaluation.flip=true")
    assert len((tmp_path / "o/corruptions.jsonl").read_text().splitlines()) == 15
    assert score(network, tmp_path / "o", asked) == one


def test_other_photographs_of_frost_are_scored_again(network, tmp_path, frost):
    asked = ("corruptions=[frost,contrast]", f"frost={frost}")
    one = score(network, tmp_path / "o", *asked)["corruptions"]
    journal = tmp_path / "o/corruptions.jsonl"
    for name in PHOTOGRAPHS:
        Image.new("RGB", (60, 50)).save(frost / name)
    two = score(network, tmp_path / "o", *asked)["corruptions"]
    assert len(journal.read_text().splitlines()) == 10 + 5
    assert two["contrast"] == one["contrast"]
    assert two == score(network, tmp_path / "new", *asked)["corruptions"]
    assert two != one
    (frost / PHOTOGRAPHS[4]).write_bytes(b"no picture")
    command = [f"checkpoint={network}", *asked, f"output={tmp_path / 'bad'}"]
    call("eval", *command, "device=cpu", code=2)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("line", [b"\xff", b"[]", b"", b'{"corruption": "fog", "strength": 1}'])
def test_a_damaged_line_is_named_and_the_advice_to_delete_it_works(line, network, tmp_path, capsys):
    asked = (f"output={tmp_path / 'o'}", "device=cpu", "corruptions=[fog]")
    score(network, tmp_path / "o", "corruptions=[fog]")
    journal = tmp_path / "o/corruptions.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join((*lines[:2], line + b"\n", *lines[3:])))
    call("eval", f"checkpoint={network}", *asked, code=2)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {journal}: line 3 was damaged")
    assert "delete that line" in message
    journal.write_bytes(b"".join((*lines[:2], *lines[3:])))
    call("eval", f"checkpoint={network}", *asked)
    assert sorted(journal.read_bytes().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.slow
def test_two_processes_write_what_one_does(network, tmp_path, frost):
    settings = [f"checkpoint={network}", "device=cpu", "corruptions=[snow,glass_blur,frost]"]
    settings += [f"frost={frost}", "data.num_workers=1"]
    score(network, tmp_path / "one", *settings[1:], "batch_size=3")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = tool("eval", *settings, "output=two", cwd=tmp_path, launcher=launcher)
    assert done.stdout.count("minutes for the other") == 1
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    facts = [json.loads(files.pop("metrics.json")) for files in (one, two)]
    assert one == two
    sums = [fact.pop("image_miou") for fact in facts]  # of floats, in another order
    assert sums[0] == pytest.approx(sums[1])
    assert facts[0] == facts[1]


WRONG = {
    "fog": "corruptions=fog: expected true, false or names, as in 'corruptions=[fog,snow]'",
    "3": "corruptions=3: expected true, false or names",
    "[fogg]": "corruptions: there is no fogg; did you mean fog?; expected some of gaussian_noise",
    "[fog,[snow]]": "corruptions: there is no ",
}


@pytest.mark.parametrize("value", WRONG)
def test_other_values_are_refused(value, network, capsys):
    call("eval", f"checkpoint={network}", f"corruptions={value}", code=2)
    assert WRONG[value] in capsys.readouterr().err


def test_frost_without_photographs_is_refused_and_its_advice_works(
    network, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    typed = [f"checkpoint={network}", "device=cpu", f"output={tmp_path / 'o'}", "frost=my ice"]
    call("eval", *typed, "corruptions=[frost,contrast]", code=2)
    message = capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert len(message.splitlines()) == 1
    command, others = re.search(r"`(.+)`, or leave frost out: '(\S+)'$", message.strip()).groups()
    call("eval", *typed, others)
    assert list(json.loads((tmp_path / "o/metrics.json").read_text())["corruptions"]) == [
        "contrast"
    ]
    program, script, name, output = shlex.split(command)
    assert (program, name, output) == ("python", "name=frost", "output=my ice")
    assert (ROOT / script).is_file()  # tests/test_fetch_weights.py has what it writes
    (tmp_path / "my ice").mkdir()
    for file in PHOTOGRAPHS:
        Image.new("RGB", (60, 50)).save(tmp_path / "my ice" / file)
    call("eval", *typed, "corruptions=[frost,contrast]")
    call("eval", f"checkpoint={network}", "corruptions=true", code=2)
    all_others = re.search(r"'corruptions=\[(\S+)\]'", capsys.readouterr().err)[1]
    assert all_others.split(",") == [name for name in TABLE if name != "frost"]


def test_the_report_shows_scores_of_the_same_network_alone(network, tmp_path):
    score(network, network.parent / "scored", "corruptions=[fog,contrast]")
    typed = [f"checkpoint={network}", "device=cpu", "count=1", "attention=false", "report=true"]

    def report(folder):
        call("visualize", *typed, f"output={tmp_path / folder}")
        return (tmp_path / folder / "report.html").read_text()

    metrics = json.loads((network.parent / "scored/metrics.json").read_text())
    page = report("one")
    row = re.search(r"<td>weather</td>\s*<td>fog</td>((?:\s*<td.*</td>)+)", page)[1]
    shown = [float(text) for text in re.findall(r">([\d.]+)<", row)]
    fog = metrics["corruptions"]["fog"]
    expected = [metrics["miou"], *fog, np.mean(fog)]
    assert shown == pytest.approx([100 * value for value in expected], abs=0.006)
    assert page.count(">strength</text>") == 1
    for damage in ({"network": "x"}, {"corruptions": {"fog": [0.5]}}, {"corruptions": 3}):
        text = json.dumps({**metrics, **damage})
        (network.parent / "scored/metrics.json").write_text(text)
        assert "ImageNet-C" not in report("two")
