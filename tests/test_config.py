"""Every error of a config is found before anything is built, and reported in one line by key."""

import hydra
import pytest
import torch
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra

from danet.config import schema
from danet.config.build import make, make_model
from danet.config.targets import locate
from danet.config.validate import check
from danet.errors import InputError
from danet.preflight import advice
from danet.types import SegmentationOutput

EXPERIMENTS = sorted(p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml"))
OFTEN = [e for e in EXPERIMENTS if "r101" not in e and not e.startswith("table2")]
FOLDER = "data=folder data.root=/data data.classes=[a,b]"


def compose(*overrides, name="train"):
    schema.register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


def errors_of(*overrides):
    with pytest.raises(InputError) as error:
        check(compose(*overrides))
    return str(error.value).splitlines()


def test_a_log_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert errors_of("run.log_to=[wandb]") == [
        "run.log_to: wandb is not installed: pip install wandb"
    ]


@pytest.mark.parametrize(
    ("patience", "every", "is_said"), [(3, 3, True), (2, 3, False), (1, 10, True)]
)
def test_a_patience_that_can_never_end_the_run_is_said(patience, every, is_said):
    typed = [f"trainer.patience={patience}", f"trainer.eval_every={every}", "trainer.steps=10"]
    lines = advice.notes(check(compose(*typed)), torch.device("cpu"))
    assert any(f"trainer.patience={patience} never ends this run" in x for x in lines) == is_said


def choices(group):
    return sorted(p.stem for p in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={choice}"
        for group in (
            *("loss", "optimizer", "schedule", "evaluation", "debug"),
            *("model/backbone", "model/head", "model/auxiliary_head", "data/transforms"),
        )
        for choice in choices(group)
        if (group, choice) not in {("data/transforms", "street"), ("data/transforms", "paper")}
    ],
)
def test_every_choice_composes_and_can_be_made(override):
    if override == "model/backbone=timm":
        pytest.importorskip("timm", reason="the optional extra danet[timm] is not installed")
    config = check(compose(override))
    for group in ("loss", "optimizer", "schedule", "evaluation"):
        make(getattr(config, group), group)
    with torch.device("meta"):
        make_model(config)


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(e, marks=[] if e in OFTEN else pytest.mark.slow) for e in EXPERIMENTS],
)
def test_every_experiment_runs_a_step_on_the_meta_device(experiment):
    config = check(compose(f"experiment={experiment}", "data.root=/data"))
    config.model["backbone"]["weights"] = None  # values do not matter here
    height, width = config.data.crop or config.data.size
    if config.data.transforms["train"]:
        make(config.data.transforms["train"], "data.transforms.train")
    with torch.device("meta"):
        model, criterion = make_model(config), make(config.loss, "loss")
        output = model(torch.empty(2, 3, height, width, dtype=torch.uint8))
        assert isinstance(output, SegmentationOutput)
        terms = criterion(output, torch.empty(2, height, width, dtype=torch.uint8))
    torch.stack(list(terms.values())).sum().backward()
    assert make(config.optimizer, "optimizer")(model).param_groups


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("+model.head.chanels=3", "model.head.chanels: DualAttentionHead takes no such argument"),
        ("+trainr=3", "trainr: there is no such key; did you mean trainer?"),
        ("~optimizer.lr", "optimizer.lr: AdamW needs this argument"),
        (
            "model.head._target_=danet.models.heads.dual.DualAtentionHead",
            "model.head._target_: danet.models.heads.dual has no class DualAtentionHead; did you",
        ),
        ("model.head.num_classes=${data.nclass}", "model.head.num_classes: Interpolation key"),
        ("data.scene_seed=x", "data.scene_seed=x: expected a whole number, got the text 'x'"),
        ("data.scene_seed=true", "data.scene_seed=True: expected a whole number"),
        ("data.lengths=x", "data.lengths=x: expected a mapping"),
        (f"{FOLDER} data.classes=[a,1]", "data.classes=['a', 1]: expected a text"),
        (f"{FOLDER} data.colors=3", "data.colors=3: expected a list, got 3"),
        (f"{FOLDER} data.classes=3", "data.classes=3: expected names"),
        (f"{FOLDER} data.num_classes=x", "data.num_classes=x: expected a whole"),
        ("model.channels=4", "model.channels=4: it follows data.channels; leave it out"),
        (
            f"{FOLDER} data.channels=1 model.range=[0,9]",
            "model.range=[0, 9]: it follows data.range",
        ),
        ("model.align_corners=3", "model.align_corners=3: expected true or false, got 3"),
        ("data.dataset.size=${data.level}", "data.level=wide: expected a list, got the text"),
    ],
)
def test_an_error_names_the_setting_and_not_what_interpolates_it(overrides, line):
    """One line for each setting, wherever its value is used."""
    found = errors_of(*overrides.split())
    assert len(found) == 1, found
    assert found[0].startswith(line)


def test_the_user_may_trust_modules_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "from danet.models.heads.dual import FCNHead\n\n\nclass MyHead(FCNHead):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ("model/head=fcn", "model.head._target_=my_parts.MyHead")
    with pytest.raises(InputError, match=r"my_parts.MyHead is refused: .* variable DANET_TRUST"):
        check(compose(*own))
    monkeypatch.setenv("DANET_TRUST", "other, my_parts")
    assert type(make_model(check(compose(*own))).head).__name__ == "MyHead"
    with pytest.raises(InputError, match="my_parts has no class FCNHead"):
        locate("my_parts.FCNHead", "model")
    with pytest.raises(InputError, match=r"os\.system is refused"):
        locate("os.system", "model")
