"""A resumed run refuses other data and settings, and folders keep the name of their run."""

import functools
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import TINY, call
from foreign import content
from omegaconf import OmegaConf
from starts import train_command
from test_config import FOLDER, compose

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import run_folder
from danet.config import resume
from danet.config.overlay import with_interpolations
from danet.config.validate import check
from danet.engine.best import Best
from danet.engine.log import read_metrics
from danet.engine.settings import TrainSettings
from danet.errors import InputError

SETTINGS = [*TINY, "trainer.steps=6", "data.num_workers=0"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Returns the checkpoint of a run of six steps at the third, in the folder of a run."""
    path = tmp_path_factory.mktemp("run") / "last.pt"
    checkpoint_format.save(path, content(SETTINGS))
    return path


@pytest.fixture
def trained(capsys):
    """Runs ``train.py`` until it would read data."""
    return functools.partial(train_command, capsys)


def changes(seen):
    """Returns what was said of changes: after ``resume: `` one line each."""
    lines = seen.accepted().splitlines()
    return [line.removeprefix("resume: ") for line in lines if line.startswith("resume: ")]


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ({"model": {"a": 1}}, {"model": {"a": 2}}),
        ({"data": {"num_classes": 2}}, {"data": {"num_classes": 3}}),
        ({"trainer": {"ema_decay": None}}, {"trainer": {"ema_decay": 0.9}}),
    ],
)
def test_network_classes_and_average_never_change(stored, now):
    with pytest.raises(InputError, match="init_from"):
        resume.compare_settings(Path("x.pt"), stored, {**now, "allow_changes": True})


def test_each_change_is_said_and_all_else_is_of_the_checkpoint(trained, stopped):
    assert changes(trained(f"resume={stopped}")) == []
    typed = ("trainer.eval_every=null", "data.num_workers=1", "optimizer.lr=0.01", "run.name=x")
    assert changes(trained(f"resume={stopped}", *typed)) == [
        "data.num_workers=1 instead of 0",
        "optimizer.lr=0.01 instead of 0.002",
        "trainer.eval_every=null instead of 1000",
    ]


def test_other_steps_are_said_with_what_they_do_to_the_rate(trained, stopped):
    factors = [(3 + 1) / 21 * (1 - 3 / steps) ** 0.9 for steps in (12, 6)]  # 20 steps of warm-up
    assert changes(trained(f"resume={stopped}", "trainer.steps=12")) == [
        "trainer.steps=12 instead of 6",
        "the schedule is now over 12 steps: the learning rate of the next one is "
        f"{0.002 * factors[0]:.3g}, it would have been {0.002 * factors[1]:.3g}",
    ]
    trained(f"resume={stopped}", "trainer.steps=2").refused("trainer.steps=2, and 3 steps are done")


def test_the_typed_rate_and_steps_are_those_of_the_next_update(tmp_path):
    settings = [*SETTINGS, "run.log_to=[]", "trainer.log_every=1", "schedule.warmup_steps=0"]
    call("train", *settings, "trainer.stop_at=2", f"run.dir={tmp_path / 'run'}")
    typed = ("trainer.steps=8", "optimizer.lr=0.01", "optimizer.head_multiplier=3")
    call("train", f"resume={tmp_path / 'run'}", *typed, "trainer.stop_at=3")
    lines = [x for x in read_metrics(tmp_path / "run/metrics.jsonl") if x["kind"] == "train"]
    rates = {x["step"]: (x["lr"], x["lr_head"]) for x in lines}
    factor = (1 - 2 / 8) ** 0.9
    assert rates[2] == pytest.approx((0.002 * (5 / 6) ** 0.9,) * 2)
    assert rates[3] == pytest.approx((0.01 * factor, 0.03 * factor))


@pytest.mark.parametrize(
    ("typed", "said", "can_be_allowed"),
    [
        (["loss=ohem"], "loss.main.threshold: not set in the checkpoint, 0.7 now", True),
        (
            ["data.size=[64,96]"],
            "data.dataset.size: [48, 96] in the checkpoint, [64, 96] now",
            True,
        ),
        (["optimizer.weight_decay=0"], "optimizer.weight_decay: 0.01 in the checkpoint, 0", True),
        (["seed=2"], "trainer.seed: 1 in the checkpoint, 2 now", True),
        (["optimizer=sgd"], "optimizer.SGD now", False),
        (["model/head=fcn", "trainer.steps=9"], "model.head.energy: distance in the", False),
    ],
)
def test_only_what_must_not_change_is_refused(trained, stopped, typed, said, can_be_allowed):
    first = f"resume={stopped}"
    text = trained(first, *typed).refused(said)
    assert {line.split(".")[0] for line in text.splitlines()[1:-1]} <= {
        *("  loss", "  data", "  optimizer", "  seed: 1 in the checkpoint, 2 now", "  trainer"),
        "  model",
    }
    assert "trainer.steps" not in text
    if can_be_allowed:
        assert said in trained(first, *typed, "allow_changes=true").accepted()
    else:
        trained(first, *typed, "allow_changes=true").refused(said, "init_from")


def test_a_chosen_group_is_what_a_fresh_start_would_have(trained, stopped):
    """The root config changes ``schedule.warmup_steps`` of every schedule."""
    typed = ("schedule=cosine", "allow_changes=true")
    text = trained(f"resume={stopped}", *typed).accepted("schedule.final: not set")
    assert "warmup_steps" not in text


def test_keys_are_those_of_the_checkpoint_and_not_of_the_defaults(trained, stopped, tmp_path):
    trained(f"resume={stopped}", "optimizer.momentum=0.5").refused(
        "optimizer.momentum: there is no such key; it is a key with optimizer=sgd"
    )
    trained(f"resume={stopped}", "trainer.stepz=9").refused("did you mean trainer.steps?")
    checkpoint_format.save(tmp_path / "last.pt", content([*SETTINGS, "optimizer=sgd"]))
    trained(f"resume={tmp_path}", "optimizer.momentum=0.5").refused("momentum: 0.9 in the checkp")
    trained(f"resume={tmp_path}", "optimizer.betas=[0.9,0.9]").refused(
        "betas: there is no such key"
    )


def test_other_weights_and_a_run_exclude_each_other_but_for_auto(trained, stopped):
    other = f"init_from={stopped}"
    trained(f"resume={stopped}", other).refused("leave one of the two out")
    trained("resume=auto", f"run.dir={stopped.parent}", other).accepted("going on from")


def test_the_whole_command_of_the_start_goes_on(trained, tmp_path):
    folder = shutil.copytree(tmp_path, tmp_path / "run", ignore=lambda *_: ["run"])
    whole = [*SETTINGS, "data=scenes", "model/head=dual", "+model.mean=[1,2,3]"]
    whole.append("~evaluation.max_pixels")
    seen = trained(*whole, f"run.dir={folder}", "resume=auto")
    seen.accepted("starting from step 0")
    checkpoint_format.save(folder / "last.pt", content(whole))
    assert changes(trained(*whole, f"run.dir={folder}", "resume=auto")) == []


def test_an_experiment_is_compared_as_a_whole_and_must_not_bring_other_steps(trained, tmp_path):
    whole = ["experiment=scenes_small", *SETTINGS]
    checkpoint_format.save(tmp_path / "last.pt", content(whole))
    first = f"resume={tmp_path}"
    assert changes(trained(*whole, first)) == []
    trained(*[s for s in whole if "steps" not in s], first).refused(
        "trainer.steps: 6 in the checkpoint, 350 now", "steps and rates may also be typed"
    )
    assert changes(trained(*whole, first, "trainer.steps=9"))[0].startswith("trainer.steps=9 inst")


@pytest.mark.parametrize(
    "choices", [[], ["loss=dice"], FOLDER.split(), ["data=camvid", "data.root=/d"]]
)
def test_interpolations_return_where_they_give_the_stored_values(choices):
    stored = check(compose(*choices)).plain
    linked = with_interpolations(stored)
    assert OmegaConf.to_container(linked, resolve=True) == stored
    linked.seed = linked.data.root = "other"
    assert (linked.trainer.seed, linked.data.dataset.get("root", "other")) == ("other", "other")
    if "crop" in linked.data and linked.data.crop:
        linked.data.crop = [64, 32]
        assert linked.data.transforms.train.steps.scale_crop.size == [64, 32]


def test_an_interpolation_does_not_return_over_another_value():
    settings = ("data=camvid", "data.root=/d", "data.transforms.train.steps.scale_crop.size=[9,9]")
    linked = with_interpolations(check(compose(*settings)).plain)
    linked.data.crop = [64, 32]
    assert linked.data.transforms.train.steps.scale_crop.size == [9, 9]


def test_an_argument_that_is_not_given_is_compared_as_its_default():
    """As in a checkpoint of a version that did not have it yet, and in a list of losses."""
    now = check(compose("loss=rmi")).plain
    losses = [{"_target_": "danet.losses.CrossEntropy"}, now["loss"]["main"].pop("other")]
    now["loss"]["main"] = {"_target_": "danet.losses.WeightedSum", "losses": losses}
    losses[0]["label_smoothing"] = 0.0
    before = deepcopy(now)
    del before["loss"]["main"]["losses"][0]["label_smoothing"]
    del before["loss"]["main"]["losses"][1]["pooling"]
    del before["optimizer"]["betas"]
    assert not resume.differences(before, now)
    assert not resume.differences(now, before)
    now["loss"]["main"]["losses"][0]["label_smoothing"] = 0.1
    now["optimizer"]["betas"] = [0.8, 0.999]
    assert list(resume.differences(before, now)) == ["loss.main.losses", "optimizer.betas"]


@pytest.mark.parametrize(
    ("key", "best_by", "is_one"),
    [
        ("trainer.best_by", "miou", True),
        ("evaluation.flip", "miou", True),
        ("data.val_split", "loss", True),
        ("loss.main.class_weights", "loss", True),
        ("loss.main.class_weights", "miou", False),
        ("loss.weights.position", "loss", False),
        ("data.crop", "loss", False),
        ("trainer.clip_norm", "loss", False),
    ],
)
def test_the_best_begins_anew_where_the_score_is_another(key, best_by, is_one):
    assert resume.is_measure(key, best_by) == is_one


def test_forgetting_the_best_forgets_for_how_long_there_was_none():
    saved = {"best_score": 0.5, "best_step": 2, "evaluations_since_best": 3, "evaluated_at": 9}
    assert not resume.is_best_forgotten(saved)
    resume.forget_best(saved)
    assert resume.is_best_forgotten(saved)
    assert Best.of(saved, TrainSettings(9, patience=3)).state() == {
        **{"best_score": None, "best_step": 0, "evaluations_since_best": 0}
    }


def test_a_folder_keeps_the_name_of_its_run(tmp_path):
    prepare = functools.partial(run_folder.prepare, config={"seed": 1})
    names = [run_folder.id_of(prepare(tmp_path / n, resuming=False)) for n in "ab"]
    assert len(set(names)) == 2
    assert all(len(name) == 32 for name in names)
    prepare(tmp_path / "a", resuming=True)
    assert run_folder.id_of(tmp_path / "a") == names[0]
    saved = {"run_id": names[0], "step": 3}
    run_folder.refuse_foreign(tmp_path / "a", tmp_path / "a/last.pt", saved)
    run_folder.refuse_foreign(tmp_path / "new", tmp_path / "a/last.pt", saved)
    run_folder.refuse_foreign(tmp_path / "b", tmp_path / "b/last.pt", {"step": 3})  # an old one
    with pytest.raises(
        InputError, match=f"of run {names[0]}, but run.dir=.*/b is of run {names[1]}"
    ):
        run_folder.refuse_foreign(tmp_path / "b", tmp_path / "b/last.pt", saved)
    prepare(tmp_path / "new", resuming=True, saved=saved)
    assert run_folder.id_of(tmp_path / "new") not in ("", *names), "another run from there on"


def test_a_folder_stands_for_its_newest_or_its_best_checkpoint(tmp_path, capsys):
    assert run_folder.best_in("hf://owner/name", "checkpoint") == "hf://owner/name"
    assert run_folder.best_in(str(tmp_path), "checkpoint") == str(tmp_path)
    assert capsys.readouterr().out == ""
    for name in ("step_000000002.pt", "last.pt", "best.pt"):
        (tmp_path / name).touch()
        assert run_folder.best_in(str(tmp_path), "other") == str(tmp_path / name)
        assert capsys.readouterr().out == f"other={tmp_path}: using {name}\n"


def test_a_folder_is_resumed_from_its_newest_whole_checkpoint(stopped, tmp_path, trained):
    shutil.copy(stopped, tmp_path / "step_000000003.pt")
    trained(f"resume={tmp_path}").accepted(f"going on from {tmp_path}/step_000000003.pt\n")
    (tmp_path / "last.pt").write_bytes(b"PK")
    trained(f"resume={tmp_path}").accepted(
        "last.pt: damaged or incomplete", f"going on from {tmp_path}/step_000000003.pt instead"
    )


def test_a_folder_of_runs_is_refused_with_their_names(stopped, tmp_path, trained):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    trained(f"resume={tmp_path / 'runs'}").refused("a folder without a checkpoint of a run")
    shutil.copy(stopped, tmp_path / "runs/a/last.pt")
    trained(f"resume={tmp_path / 'runs'}").refused(f"there are the runs {tmp_path}/runs/a")
