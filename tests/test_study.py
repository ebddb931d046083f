"""A study runs what is not done, and its page is what its files give."""

import json
from unittest import mock

import pytest
import yaml
from conftest import ROOT, call
from test_config import compose
from test_reproduce import script

from danet.config.validate import check
from danet.errors import InputError

study, results = script("study"), script("results")
frozen_heads = study.frozen_heads
STUDIES = yaml.safe_load((ROOT / "scripts" / "studies.yaml").read_text())


def runs(*arguments):
    return study.runs_of(study.parse(arguments))


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_composes_and_only_what_is_meant_differs(name):
    found = {}
    for run in runs(f"study={name}", "seed=1", f"level={next(iter(STUDIES[name]['levels']))}"):
        _, settings = frozen_heads.parse(run.settings)
        found[run.variant] = check(compose(*settings, "data.root=/data")).plain
    assert len(found) == len(STUDIES[name]["variants"])
    rates = {
        variant: config["optimizer"].pop("gamma_multiplier") for variant, config in found.items()
    }
    for variant, rate in rates.items():  # a part of the variant, in which alone these may differ
        expected = {"gamma ten times as fast": 10}.get(variant, 0 if "stays 0" in variant else 1)
        assert rate == expected, variant
        found[variant]["model"]["head"]["rate of gamma"] = rate
    if name == "pretrained":  # every head has its own rate, and nothing else
        for config in found.values():
            del config["optimizer"]["head_multiplier"]
    is_search = name == "recipe"  # there any part may differ
    for group in ("trainer", "schedule", "evaluation", "seed", *["optimizer"] * (not is_search)):
        assert len({json.dumps(config[group]) for config in found.values()}) == 1, group
    methods = {
        json.dumps(config if is_search else [config["model"]["head"], config["loss"]])
        for config in found.values()
    }
    assert len(methods) == len(found)


def test_every_head_is_compared_at_the_rate_that_was_best_on_the_held_out_drive():
    searched = results.read("rates", results.RESULTS)
    for variant, settings in STUDIES["pretrained"]["variants"].items():
        scores = {
            level: results.on_split(searched[level, variant][0], "0006R0")["miou"]
            for level in STUDIES["rates"]["levels"]
        }
        best = STUDIES["rates"]["levels"][max(scores, key=scores.__getitem__)]
        assert settings[-1] == best[-1], variant
        assert settings[:-1] == STUDIES["rates"]["variants"][variant]


def test_levels_of_scenes_differ_in_the_cue_alone():
    found = []
    for run in runs("study=scenes", "variant=FCN", "seed=2"):
        data = check(compose(*run.settings)).plain["data"]
        for key in ("level", "cue_radius", "size"):
            data.pop(key), data["dataset"].pop(key)
        found.append(data)
    assert found == 6 * [found[0]]


def test_three_seeds_of_every_variant_at_every_level():
    names = [run.name for run in runs("study=scenes")]
    assert len(names) == len(set(names)) == 3 * 6 * 5
    assert len(runs("study=camvid", "data.root=/d")) == 3 * 4
    first = runs("study=scenes", "variant=second reading", "level=medium")[0]
    assert (first.name, first.settings[-1]) == ("medium_second-reading_1", "seed=1")


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    done = []

    def do(run, folder, places):
        done.append((run.name, folder.name, places))
        return {"miou": 0.5, "minutes": 1.0}

    monkeypatch.setattr(study, "do", do)
    command = ["study=scenes", "level=near", "seed=1", f"results={tmp_path}", "data.num_workers=0"]
    path = tmp_path / "scenes" / "near_pam_1.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"miou": 0.25, "minutes": 2.5}))
    study.main([*command, "list=true"])
    assert "done   near_pam_1: mIoU 25.00, 2.5 minutes" in capsys.readouterr().out
    study.main(command)
    assert [name for name, *_ in done] == [
        *("near_fcn_1", "near_cam_1", "near_both_1", "near_second-reading_1")
    ]
    assert all(places == ["data.num_workers=0"] for *_, places in done)
    study.main(command)
    assert len(done) == 4


@pytest.mark.bad_input("R05")
def test_a_result_of_another_command_is_not_taken_for_that_of_a_run(tmp_path):
    (run, *_) = study.runs_of(study.parse(["study=readings", "seed=1"]))
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"command": study.command_of(run), "miou": 0.5}))
    assert study.stored(run, path)["miou"] == 0.5
    path.write_text(json.dumps({"command": study.command_of(run) + " seed=9", "miou": 0.5}))
    with pytest.raises(
        InputError, match=r"remove the file to run it again, or name another folder"
    ):
        study.stored(run, path)


def test_a_run_is_trained_scored_and_kept(tmp_path, monkeypatch):
    def in_this_process(command):
        call(command[0].removeprefix("tools/")[:-3], *command[1:])

    monkeypatch.setattr(study, "_call", in_this_process)
    tiny = ["trainer.steps=2", "data.lengths={train:8,val:2,test:2}", "data.size=[48,96]"]
    tiny += ["model.backbone.width=8", "data.num_workers=0", f"runs={tmp_path / 'runs'}"]
    command = ["study=scenes", "level=wide", "variant=FCN", "seed=2", f"results={tmp_path}"]
    study.main([*command, *tiny])
    found = json.loads((tmp_path / "scenes" / "wide_fcn_2.json").read_text())
    assert (found["step"], found["images"], found["seed"]) == (2, 2, 2)
    assert found["command"].startswith("python tools/train.py experiment=scenes_wide")
    assert "/" not in found["command"].replace("tools/train.py", "").replace("model/head", "")
    assert found["protocol"].startswith("whole (flip=false")
    assert found["minutes"] >= 0
    assert set(found["versions"]) == {"danet", "commit", "torch", "numpy", "python"}
    assert len(found["iou"]) == 16
    assert found["other_splits"] == []
    assert found["parameters"] > 10_000
    assert found["seconds_per_step"] > 0


@pytest.mark.parametrize("name", ["cures", "frozen"])
def test_what_attention_does_is_kept(name, tmp_path, monkeypatch):
    def in_this_process(command):
        call(command[0].removeprefix("tools/")[:-3], *command[1:])

    monkeypatch.setattr(study, "_call", in_this_process)
    definition = {**STUDIES[name], "levels": {"wide": []}, "scores": {}}
    definition.pop("guess", None)
    monkeypatch.setattr(study, "studies", lambda: {name: definition})
    variant = {"cures": "as in the paper", "frozen": "both"}[name]
    tiny = ["trainer.steps=3", "data.lengths={train:8,val:2,test:3}", "data.size=[48,96]"]
    tiny += ["model.backbone.width=8", "data.num_workers=0", f"runs={tmp_path / 'runs'}"]
    if name == "frozen":
        tiny += [f"frozen.kept={tmp_path / 'kept'}", "model.backbone.freeze=all"]
    settings = study.parse([f"study={name}", f"variant={variant}", "seed=1", *tiny, "results=x"])
    (run,) = study.runs_of(settings)
    found = study.do(run, tmp_path / "run", settings.places)
    branches = {"cures": ["position"], "frozen": ["position", "channel"]}[name]
    assert list(found["attention"]) == branches
    assert 1 <= found["attention"]["position"]["effective"] <= 72
    rows = found["deletion"]
    assert sum(row["points"] for row in rows) > 0
    assert all(0 <= row["before"] <= 1 for row in rows)
    assert found["step"] == 3
    assert found["loss"][-1][0] == 3
    script_name = {"cures": "tools/train.py", "frozen": "scripts/frozen_heads.py"}[name]
    assert found["command"].startswith(f"python {script_name} ")
    folder = tmp_path / "results" / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(found))
    stored_runs = results.read(name, folder.parent)
    text = results.text(name, definition, stored_runs)
    assert "**position attention, 72 positions**" in text
    assert ("**channel attention, " in text) == (name == "frozen")
    assert "**deletion test**" in text
    assert ("**deletion test of as in the paper, by class**" in text) == (name == "cures")


# The page


def stored(folder, level, variant, seed, bus=0.0, step=350, study="scenes", miou=0.6):
    names = [*STUDIES["scenes"]["scores"]["far pairs"], *STUDIES["scenes"]["scores"]["all others"]]
    iou = dict.fromkeys(names, 0.5) | {"bus": bus, "booth": None}
    run = {"study": study, "level": level, "variant": variant, "seed": seed, "iou": iou}
    run |= {"miou": miou, "split": "test", "images": 60, "protocol": "whole ()", "step": step}
    run |= {"command": "python tools/train.py", "minutes": 2.0 + seed, "machine": "one"}
    run |= {"versions": {"danet": "0.1.0"}, "loss": [[20, 2.0], [40, 1.0]]}
    path = folder / study / f"{level}_{variant}_{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(run))


def test_a_page_shows_means_spreads_and_where_a_variant_is_no_better_than_a_guess(tmp_path):
    stored(tmp_path, "wide", "FCN", 1, bus=0.0)
    stored(tmp_path, "wide", "FCN", 2, bus=0.1)
    stored(tmp_path, "wide", "both", 1, bus=0.8)
    stored(tmp_path, "small", "both", 1, bus=-0.3)
    text = results.text("scenes", STUDIES["scenes"], results.read("scenes", tmp_path))
    # Mean of bus, tram and kiosk; booth did not occur.
    assert "| | wide | small |" in text
    assert "| FCN | 35.0 (33.3 to 36.7) | - |" in text
    assert "| both | 60.0 | 23.3 |" in text
    assert "| PAM" not in text
    assert "- FCN: better than a guess at wide\n" in text
    assert "- both: better than a guess at wide; no better at small" in text
    assert "4 runs of 350 steps, 3.0 to 4.0 minutes each, on one; danet 0.1.0." in text
    stored(tmp_path, "small", "both", 2, bus=0.1, step=200)
    text = results.text("scenes", STUDIES["scenes"], results.read("scenes", tmp_path))
    assert "5 runs of 200 to 350 steps, " in text, "one ended early"


def test_a_gain_is_over_fcn_of_the_same_seed(tmp_path):
    for seed, fcn, both in ((1, 0.5, 0.52), (2, 0.6, 0.59), (3, 0.4, None)):
        for variant, miou in (("FCN", fcn), ("both", both)):
            if miou is not None:
                stored(tmp_path, "wide", variant, seed, miou=miou)
    found = {name: results.read(name, tmp_path) for name in STUDIES}
    conditions = results.by_condition(STUDIES, found, control=False)
    assert list(conditions) == ["scenes, wide"]
    assert conditions["scenes, wide"] == {"both": pytest.approx([2, -1])}
    table = results.gains_table("mIoU over FCN", conditions)
    assert "| scenes, wide | - | - | +0.5 (-1.0 to +2.0) | 2 |\n" in table
    runs = found["scenes"]
    of = results.over_fcn(STUDIES["scenes"], runs, runs)
    assert list(results.gains_of_variants("FCN", of))[-3:] == [
        "| --- | --- |",
        "| both | +0.5 (-1.0 to +2.0); 1 of 2 |",
        "",
    ]
    assert not list(results.gains_of_variants("FCN", results.over_fcn(STUDIES["cures"], {}, runs)))


def test_a_gain_is_over_the_same_head_without_attention(tmp_path):
    for variant, miou in (("as in the paper", 0.75), ("gamma stays 0", 0.5), ("a register", 0.9)):
        stored(tmp_path, "wide", variant, 1, study="cures", miou=miou)
    found = {name: results.read(name, tmp_path) for name in STUDIES}
    assert results.by_condition(STUDIES, found, control=True) == {"scenes, wide": {"PAM": [25.0]}}
    assert results.by_condition(STUDIES, found, control=False) == {}


def test_falls_of_seeds_and_classes_are_averaged_over_points():
    def removal(points, fall, places=2):
        return {"points": points, "places": places, "mass": 0.3, "fall": fall}

    def row(points, strongest, much):
        equal = much and removal(1, much)
        return {
            **{"class": "bus", "points": points, "skipped": points - bool(much), "before": 0.5},
            **{"strongest": removal(points, strongest), "equal_count": removal(points, 0.0)},
            **{"matched": much and removal(1, strongest), "equal_mass": equal},
        }

    seeds = [[row(1, 0.4, 0.01), row(3, 0.2, None)], [row(2, 0.5, None)]]
    assert results.mean_fall(seeds[0], "strongest") == pytest.approx(0.25)
    assert results.deletion_row("PAM", seeds) == (
        "| PAM | 6 | 2.0 | 37.5 (25.0 to 50.0) | 0.0 (0.0 to 0.0) | 1 | 40.0 | 1.0 |"
    )


def test_attention_in_a_training_is_a_row_per_evaluation():
    def line(step, gamma):
        facts = {"effective": 100, "row_cosine": 0.5, "gamma": gamma, "moved": 0.04}
        return {"step": step, **{f"position/{key}": value for key, value in facts.items()}}

    found = {"levels": {"CamVid": []}, "variants": {"FCN": [], "PAM": []}}
    seeds = [{"history": [line(9, 0.1), line(18, 0.3)]}, {"history": [line(9, 0.2), line(18, 0.4)]}]
    rows = list(results.history(found, {("CamVid", "PAM"): seeds, ("CamVid", "FCN"): [{}]}))
    assert rows[-3] == (
        "| PAM | 9 | 100 (100 to 100) | 0.5 (0.5 to 0.5) | 0.15 (0.1 to 0.2) | 4 (4 to 4) |"
    )
    assert len(rows) == 7
    assert not list(results.history(found, {}))


def test_the_page_is_what_the_stored_files_give():
    results.main(["check=true"])


@pytest.mark.parametrize("name", [name for name, of in STUDIES.items() if "baseline" in of])
def test_a_study_has_the_levels_of_its_baseline(name):
    study, baseline = STUDIES[name], STUDIES[STUDIES[name]["baseline"]]
    assert "FCN" in baseline["variants"]
    assert study["levels"].keys() <= baseline["levels"].keys()
    control = study.get("control", {})
    named = {control} if isinstance(control, str) else {*control, *control.values()}
    assert named <= study["variants"].keys()


@pytest.mark.parametrize(
    ("study", "level", "classes", "heading", "with_range"),
    [
        ("scenes", "wide", STUDIES["scenes"]["scores"]["far pairs"], "| FCN |", False),
        ("pretrained", "CamVid", None, "| CamVid, from ImageNet weights | FCN |", True),
    ],
)
def test_a_table_of_the_readme_is_that_of_the_files(study, level, classes, heading, with_range):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(heading))
    cells = [cell.strip() for cell in lines[start + 2].strip("|").split("|")][-4:]
    stored_runs = results.read(study, results.RESULTS)
    for variant, cell in zip(("FCN", "CAM", "PAM", "both"), cells, strict=True):
        values = results.scores(stored_runs[level, variant], classes)
        assert len(values) == 3
        assert cell == (results.cell(values) if with_range else f"{sum(values) / 3:.1f}")


def test_a_page_that_was_changed_by_hand_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs/results.md").read_text())
    stored(tmp_path, "wide", "FCN", 1, bus=0.0)
    with pytest.raises(InputError, match="not what the files give"):
        results.main(["check=true", f"page={page}", f"results={tmp_path}"])
    page.write_text("nothing")
    with pytest.raises(InputError, match=r"expected <!-- study scenes"):
        results.main(["check=true", f"page={page}", f"results={tmp_path}"])


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the optional extra danet[results] is not installed")
    for seed in (1, 2):
        stored(tmp_path, "wide", "FCN", seed, bus=0.1 * seed)
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs/results.md").read_text())
    results.main([f"page={page}", f"results={tmp_path}", f"images={tmp_path}"])
    for name in ("scenes", "gains"):
        assert 5_000 < (tmp_path / f"results_{name}.png").stat().st_size < 200_000
    results.main(["check=true", f"page={page}", f"results={tmp_path}"])


def test_every_class_has_a_column_of_the_plot_of_a_study_with_details(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="danet[results] is not installed")
    runs = results.read("pretrained", results.RESULTS)
    with mock.patch.object(pyplot, "close") as close:
        results.plot("pretrained", STUDIES["pretrained"], runs, tmp_path / "x.png")
    (figure,) = close.call_args.args
    left, right = figure.axes
    names = [label.get_text() for label in left.get_xticklabels()]
    assert names == ["mIoU", *runs["CamVid", "FCN"][0]["iou"]]
    dots = [line for line in left.lines if line.get_marker() == "o"]
    assert len(dots) == len(names) * len(STUDIES["pretrained"]["variants"])
    seeds = [100 * run["miou"] for run in runs["CamVid", "FCN"]]
    assert list(dots[0].get_ydata()) == pytest.approx(seeds)
    assert len(right.lines) == len(STUDIES["pretrained"]["variants"])
