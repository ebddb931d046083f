"""Settings that are not as they must be: each is refused or accepted as promised.

Keys that other programs have are refused with the name of what does it here.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from commands import train_command
from conftest import TINY
from starts import composed

from danet.config.build import make_model
from danet.config.resume import differences
from danet.config.validate import check
from danet.preflight.advice import notes

CPU = torch.device("cpu")
FOLDER = "data=folder data.root=. data.classes=[a,b,c]"
STEPZ = "trainer.stepz: there is no such key; did you mean trainer.steps?"
WHOLE = "expected a whole number"
PAIR = "expected two whole numbers of at least 32, data.crop=[512,512]"
SMALL = " ".join(["data.size=[32,32]", "data.batch_size=1", *TINY[3:]])
NO_SUCH = "there is no such key"


@pytest.fixture
def given(monkeypatch, capsys, tmp_path):
    """Returns a function that gives settings to train.py, started in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(train_command, capsys)


def rows(*table):
    """Returns a parameter for each setting of the rows of a table."""
    return [
        pytest.param(settings, parts, id=f"{row} {settings[:50]}", marks=pytest.mark.bad_input(row))
        for row, *cells in table
        for settings, *parts in [cells]
    ]


REFUSED = rows(
    ("C01", "trainer.stepz=3", STEPZ),
    ("C02", "+trainer.stepz=3", STEPZ),
    ("C02", "+optimizer.lrr=3", "optimizer.lrr", "did you mean lr?"),
    ("C02", "+data.foo=3", f"data.foo: {NO_SUCH}"),
    ("C03", "model=dannet", "model=dannet", "did you mean danet?", "choices: danet"),
    ("C03", "model/backbone=resnet52", "choices: resnet101, resnet18, resnet18_narrow, resnet34,"),
    ("C03", "data=null", "data=null: expected one of ade20k, camvid"),
    ("C03", "evaluation=null", "evaluation=null: expected one of danet_multi, danet_single"),
    ("C04", "optimizer.lr=fast", "optimizer.lr=fast: expected a number, got the text 'fast'"),
    *(
        ("C05", f"trainer.steps={value}", f"trainer.steps={value}: {WHOLE}")
        for value in ("3.7", "0", "-1", "", "nan", "many")
    ),
    ("C05", "trainer.steps=null", "trainer.steps=null: expected a value"),
    *(
        ("C06", f"optimizer.lr={value}", "optimizer", f"lr={value}", "a finite number")
        for value in ("-0.01", "0", "nan", "inf")
    ),
    ("C08", "data.crop=512,512", "data.crop=[512,512]"),
    *(
        (row, f"data.crop={value}", "data.crop=", PAIR)
        for row in ("C09", "C10")
        for value in ("512", "[512]", "[512,512,3]", "[0,512]", "[-1,-1]", "[48.5,64]", "[a,b]")
    ),
    ("C13", "--steps 3", "--steps: settings are given without dashes, as in trainer."),
    ("C13", "--steps=3", "--steps=3: settings are given without dashes, as in trainer."),
    ("C13", "-steps 3", "-steps: settings are given without dashes, as in trainer."),
    ("C14", "data=camvid data.root=/nope", "data.root=/nope: there is no such folder"),
    ("C14", "data=camvid", "data.root: no value is given; set data.root=<folder>"),
    (
        "C14",
        "data=folder data.root=.",
        "data.classes: no value is given; set data.cl",
    ),
    ("C14", "data=camvid data.root=here", "/here: there is no such folder"),
    (
        *("C16", "data=cityscapes data.root=. data.num_classes=18"),
        "data.num_classes=18, but Cityscapes has 19 class names (road to bicycle)",
    ),
    (
        *("C16", f"{FOLDER} data.num_classes=4"),
        "data.num_classes=4, but Folder has 3 class names (a to c)",
    ),
    (
        *("C17", "data.num_classes=1", "data.num_classes=1: expected a whole number of at least 2"),
        "background and object",
    ),
    ("C17", "data.num_classes=256", "data.num_classes=256: expected at most 255"),
    *(
        (
            *(row, setting, f"data.ignore_index: {NO_SUCH}", "the value 255, always"),
            "data.values={0: 255",
        )
        for row in ("C18", "C19")
        for setting in ("data.ignore_index=0", "+data.ignore_index=300")
    ),
    *(
        ("C20", f"{FOLDER} loss.main.class_weights={weights}", part)
        for weights, part in (
            ("[1,2]", "loss.main.class_weights: 2 weights for data.num_classes=3"),
            ("[1,2,-1]", "loss.main.class_weights[2]=-1"),
            ("[1,nan,1]", "loss.main.class_weights[1]=nan"),
            ("[inf,1,1]", "loss.main.class_weights[0]=inf"),
            ("[0,0,0]", "loss.main: class_weights are all zero"),
            ("[1,a,1]", "got the text 'a' in the list"),
        )
    ),
    ("C20", "data.class_weights=[1,2]", "data.class_weights", "see loss.main.class_weights"),
    ("C21", "loss=ohem loss.main.threshold=1.5", "threshold=1.5", "a probability in (0, 1"),
    ("C21", "loss=ohem loss.main.min_kept=-1", "min_kept=-1", "at least 1"),
    ("C21", "loss=ohem loss.thresh=1.5", "loss.thresh", "see loss.main.threshold"),
    *(
        ("C23", f"data.batch_size={value}", f"data.batch_size={value}: {WHOLE} of at least 1")
        for value in ("0", "-2", "1.5", "a")
    ),
    (
        *("C24", f"{SMALL} model.backbone.output_stride=32"),
        *("data.size=[32, 32] with data.batch_size=1", "backbone.layer4.0.bn1 gets one value per"),
        "data.batch_size=2 or more",
    ),
    ("C25", "trainer.device=gpu", "trainer.device=gpu: expected auto, cpu or cuda"),
    ("C26", "model.norm=syncbn", f"model.norm: {NO_SUCH}", "trainer.sync_batchnorm"),
    (
        *("C27", "trainer.precision=float16 trainer.device=cpu"),
        "trainer.precision=float16 needs CUDA",
    ),
    ("C27", "trainer.amp=true", f"trainer.amp: {NO_SUCH}; see trainer.precision"),
    *(
        ("C29", f"evaluation=multi_scale evaluation.scales={value}", "evaluation", "scales")
        for value in ("[]", "[0]", "[-1]", "[a]", "[nan]", "1", "null")
    ),
    (
        *("C30", "evaluation=sliding evaluation.stride=[321,9]"),
        "evaluation: stride=[321, 9] is larger than crop=[320, 320]: pixels would be left out",
    ),
    ("C06", "device_memory=nan", "device_memory=nan: expected a finite number"),
    ("C13", "foo", "foo: not understood; a setting has the form key=value"),
)
ACCEPTED = rows(
    (
        *("C07", "optimizer=sgd optimizer.lr=0.5"),
        *("optimizer.lr=0.5: 167 times the 0.003 of optimizer=sgd", 1),
    ),
    ("C07", "optimizer=sgd optimizer.lr=0.0001", "0.0333 times the 0.003", 1),
    ("C07", "optimizer=sgd optimizer.lr=0.01", "times the", 0),
    (
        *("C22", "loss=ohem loss.main.min_kept=147456"),
        *("loss.main.min_kept=147456: a batch of a process has 147456 pixels (6 x 64 x 384)", 1),
    ),
    ("C22", "loss=ohem loss.main.min_kept=147455", "min_kept", 0),
    ("C24", SMALL, "bn1", 0),
    ("C24", f"{SMALL} model.backbone.output_stride=32 data.batch_size=2", "bn1", 0),
    (
        *("C26", "trainer.sync_batchnorm=true"),
        *("trainer.sync_batchnorm=true: there is one process, so plain batch norm is used", 1),
    ),
)


@pytest.mark.parametrize(("settings", "parts"), REFUSED)
def test_a_setting_is_refused(given, settings, parts):
    text = given(*settings.split()).refused(*parts)
    assert "sweep" not in text.lower()


@pytest.mark.parametrize(("settings", "said"), ACCEPTED)
def test_a_setting_is_accepted(given, settings, said):
    part, times = said
    given(*settings.split()).accepted(part, times=times)


def test_C11_crop_that_is_no_multiple_of_the_stride():
    config = check_of("data=camvid", "data.crop=[50,70]")
    with torch.device("meta"):
        model = make_model(config)
        assert model.eval()(torch.empty(1, 3, 50, 70)).logits.shape == (1, 11, 50, 70)
    assert config.data.crop == [50, 70]


@pytest.mark.slow
def test_C12_crop_that_cannot_fit(given):
    given("data.crop=[20000,20000]").refused(
        "data.crop=[20000, 20000]", "a step needs about", "GiB", "the largest crop that fits is ["
    )


def test_C15_home_and_relative_folders(given, tmp_path, monkeypatch):
    (tmp_path / "home" / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for root in ("~/data", "home/data", f"{tmp_path}/home/data"):
        given("data=camvid", f"data.root={root}").accepted(f"data.root={tmp_path}/home/data\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_C25_cuda_where_there_is_none(given):
    given("trainer.device=cuda").refused(
        "trainer.device=cuda: there is no CUDA device here; use trainer.device=cpu"
    )


def test_C27_half_precision_without_hardware(given, monkeypatch):
    monkeypatch.setattr("danet.engine.precision.has_bfloat16", lambda device: False)
    given("trainer.precision=bfloat16", "trainer.device=cpu").accepted(
        "trainer.precision=bfloat16: cpu does not"
    )


def test_C28_other_settings_than_the_checkpoint():
    before = check_of("data=camvid")
    now = check_of("data=camvid", "model.backbone.depth=50", "optimizer.lr=0.01")
    lines = differences(before.plain, now.plain).values()
    assert "  model.backbone.depth: 18 in the checkpoint, 50 now" in lines
    assert "  optimizer.lr: 0.002 in the checkpoint, 0.01 now" in lines


def test_C31_run_folder_that_cannot_be_written(given, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        given(f"run.dir={folder}").refused(f"run.dir={folder}: {tmp_path}/file is a file", code=4)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    given("run.dir=new/run").refused(f"run.dir=new/run: {tmp_path} may not be written", code=4)
    assert not (tmp_path / "new").exists()


def test_C32_run_folder_of_another_run(given, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("seed: 1\n")
    given("run.dir=old").refused("run.dir=old: another run is there", "resume=auto", "another run.")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["config.yaml"]


def test_C33_more_workers_than_cores(given, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    given("data.num_workers=64").accepted("data.num_workers=64: this process may use 2 core(s)")
    given("data.num_workers=2").accepted("core(s)", times=0)
    assert notes(check_of("data=camvid", "data.num_workers=2"), CPU) == []


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ("trainer:\n\tsteps: 3\n", "line 5, column 1: found character '\\t'"),
        ("trainer:\n\tsteps: 3\n", "YAML is indented with blanks, not with tabs"),
        ("trainer:\n  steps: 3\n  steps: 4\n", "line 6, column 3: found duplicate key steps"),
        ("trainer: [3\nseed: 1\n", "line 5, column 5: expected ',' or ']'"),
        ("trainer:\n  stepz: 3\n", STEPZ),
    ],
)
def test_C34_config_file_with_a_fault(given, tmp_path, body, where):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - train\n  - _self_\n" + body)
    text = given("--config-dir", str(tmp_path), "--config-name", "mine").refused(where)
    assert "stepz" in body or str(path) in text


def check_of(*settings):
    """Returns a checked config."""
    return check(composed("train", [settings[0], "data.root=/data", *settings[1:]]))
