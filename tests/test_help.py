"""``--help`` shows what a tool has, and a wrong key is answered with the right one."""

import functools
import re

import pytest
import yaml
from conftest import ROOT, call
from omegaconf import OmegaConf
from test_config import compose

from danet.config import schema
from danet.config.help import choices
from danet.plain import flat, walk

WORDS = yaml.safe_load((ROOT / "danet" / "config" / "foreign_names.yaml").read_text())
TOOLS = ("eval", "predict", "visualize", "export")
GROUPS = ("data", "model/backbone", "model/head", "optimizer", "schedule", "loss", "evaluation")


def plain(name, *settings):
    return OmegaConf.to_container(compose(*settings, name=name), resolve=False)


def keys_of(name, *settings):
    return {key for key, _, _ in walk(plain(name, *settings), "")}


@pytest.fixture(scope="module")
def known():
    """The keys of the tools, those of a training with every choice of its groups."""
    choosing = [f"{group}={choice}" for group in GROUPS for choice in choices(group)]
    training = set.union(*(keys_of("train", setting) for setting in choosing))
    return {"train": training, **{tool: keys_of(tool) for tool in TOOLS}}


@pytest.fixture(autouse=True)
def _read_once(monkeypatch):
    """The words are read for each wrong key, of which there are hundreds here."""
    monkeypatch.setattr(schema.yaml, "safe_load", functools.cache(yaml.safe_load))


def answers(capsys, tool, *settings):
    """Returns key -> what is said of it, of a command line that is refused."""
    call(tool, *settings, code=2)
    lines = capsys.readouterr().err.removeprefix("error: ").splitlines()
    return dict(
        re.fullmatch(r"(\S+?): there is no such key; (.*)", line).groups() for line in lines
    )


def keys_in(saying):
    """Yields the keys and the choices that a saying names."""
    yield from re.findall(r"[a-z_]+(?:[./][a-z_]+)+(?!\.yaml)", saying.replace("configs/", ""))
    yield from re.findall(r"^see (\w+)", saying)


@pytest.mark.parametrize("place", ["", "trainer.", "train."])
def test_every_word_of_another_program_is_answered_wherever_it_stands(place, known, capsys):
    expected = {}
    for saying, words in WORDS["training"].items():
        for key in (f"{place}{word}" for word in words):
            if key not in known["train"]:
                expected.setdefault(key, saying)
    assert len(expected) > 300
    assert answers(capsys, "train", *(f"{key}=1" for key in expected)) == expected


@pytest.mark.parametrize("section", ["training", "tools"])
def test_every_answer_names_keys_and_choices_that_there_are(section, known):
    everything = known["train"] if section == "training" else set.union(*map(set, known.values()))
    for saying in WORDS[section]:
        named = [key for key in keys_in(saying) if key not in ("experiment", "debug")]
        assert named or saying.startswith(
            ("no setting", "see --help", "see experiment", "see debug")
        )
        for key in named:
            assert key.replace("/", ".") in everything, saying
        for group, choice in re.findall(r"([a-z_]+(?:/[a-z_]+)?)=([a-z_0-9]+)", saying):
            has_choice = choice in choices(group)
            assert has_choice or group in {k.split(".")[-1] for k in everything}, saying


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_answers_with_keys_of_its_own(tool, known, capsys):
    own, words = (
        known[tool],
        {w for section in WORDS.values() for ws in section.values() for w in ws},
    )
    words = {word for word in words if not choices(word)}
    words |= {"epochs", "trainer.device", "trainer.steps", "data.batch_size", "model.head.dropout"}
    said = answers(capsys, tool, *(f"{word}=1" for word in words - own))
    assert set(said) == words - own
    for word, answer in said.items():
        if answer.startswith("see ") and "--help" not in answer:
            key = re.match(r"see '?([\w.]+)", answer)[1]
            assert key in own or key == "evaluation.precision", (word, answer)
    assert said["epochs"] == "--help shows what there is"
    assert said["weights"] == "see checkpoint"
    if tool != "convert":  # which takes the settings of a training
        assert said["trainer.steps"] == "it is a setting of tools/train.py: leave it out"
    if "device" in own:
        assert said["trainer.device"] == "see device"
    if tool == "predict":
        assert (said["source"], said["conf"][:10]) == ("see images", "no setting")
        assert said["data.batch_size"] == "see batch_size"


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("steps", "see trainer.steps"),
        ("trainer.batch_size", "see data.batch_size"),
        ("optimiser.lr", "see optimizer.lr"),
        ("trainer.stepz", "did you mean trainer.steps?"),
        ("evaluation.fip", "did you mean evaluation.flip?"),
        ("batch-size", "see data.batch_size"),
        ("trainer/steps", "see trainer.steps"),
        ("optimizer.momentum", "it is a key with optimizer=sgd"),
        ("data.masks_dir", "it is a key with data=folder"),
        # Near in letters, and nothing alike in what they mean
        ("trainer.worker_seed", "--help shows what there is"),
        ("trainer.evaluate", "--help shows what there is"),
        ("trainer.stop", "--help shows what there is"),
        ("trainer.presets", "--help shows what there is"),
        ("data.cross", "--help shows what there is"),
    ],
)
def test_a_wrong_key_is_answered_with_its_place_or_a_likely_misspelling(key, answer, capsys):
    assert schema.instead(key, keys_of("train")) == f"; {answer}"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["--trainer.steps=3"], "--trainer.steps=3: no dashes here; write trainer.steps=3"),
        (["--epochs", "3"], "as in trainer.steps=300; see trainer.steps"),
        (["--batch-size=8"], "as in trainer.steps=300; see data.batch_size"),
        (["--lr", "0.01"], "as in trainer.steps=300; see optimizer.lr"),
        (["--nonsense"], "as in trainer.steps=300; --help shows what there is"),
        (["model.backbone=resnet50"], "a choice has slashes in its name, model/backbone=resnet50"),
    ],
)
def test_the_form_of_other_programs_is_answered_with_ours(typed, answer, capsys):
    call("train", *typed, code=2)
    assert answer in capsys.readouterr().err


def test_a_choice_of_a_training_is_answered_by_the_tools_that_lack_it(capsys):
    said = answers(capsys, "eval", "data=folder", "data.crop=[64,64]")
    assert said["data"] == "the data set is that of the checkpoint; data.root= moves it"
    leave = "it is a setting of tools/train.py: leave it out"
    assert said["data.crop"] == leave
    assert answers(capsys, "check_data", "data=scenes", "model/head=fcn") == {"model/head": leave}
    assert answers(capsys, "predict", "model=danet") == {"model": "see checkpoint"}
    size = {"imgsz": "no setting: a picture of any size is predicted at its own"}
    assert answers(capsys, "predict", "imgsz=640") == size


def test_words_are_told_where_a_key_is_added(capsys):
    call("train", "+trainer.epochs=3", "+model.backbone.frozen_stages=2", code=2)
    first, second = capsys.readouterr().err.splitlines()
    assert "see trainer.steps" in first
    assert second.endswith(
        "takes no such argument; see model.backbone.freeze (none, stem, 1, 2, 3, 4, all)"
    )


def entries(text):
    """Returns key -> value and explanation of the settings on a page."""
    settings = text.partition("Settings (KEY=VALUE)")[2].partition("\n\n")[0]
    whole = re.sub(r"\n {20,}", " ", settings)
    found = re.findall(r"^  ([\w.]+)=(\S+) *(.*)$", whole, re.M)
    return {key: (value, explanation) for key, value, explanation in found}


@pytest.mark.parametrize("tool", [*TOOLS, "convert", "check_data", "train"])
def test_help_shows_the_settings_of_the_tool_alone_with_a_comment_each(tool, capsys):
    call(tool, "--help")
    text = capsys.readouterr().out
    shown, own = entries(text), plain(tool)
    assert {key.split(".")[0] for key in shown} == set(own) - ({"evaluation"} & set(own)) | (
        {"evaluation"} if tool == "train" else set()
    )
    for key, (value, _) in shown.items():
        assert yaml.safe_load(value.replace(",", ", ")) == flat(own)[key]
    silent = [key for key, (_, explanation) in shown.items() if not explanation]
    if tool in ("train", "check_data"):
        assert len(silent) < len(shown) / 5, silent
    else:
        assert silent == []
        assert not re.search("experiment|optimizer|model/head", text)
    assert re.search("^Examples$", text, re.M)


def test_help_shows_the_values_and_comments_of_the_choices(capsys):
    call("train", "--help", "optimizer=sgd", "data=folder", "trainer.steps=7")
    shown = entries(capsys.readouterr().out)
    assert shown["optimizer.momentum"][0] == "0.9"
    assert shown["trainer.steps"] == ("7", "updates of the weights")
    assert shown["data.masks_dir"] == ("masks", "folder below root")
    assert shown["schedule.warmup_steps"] == ("20", "the paper has none")  # of the root, at the end
    assert not any("_target_" in key or ".dataset." in key for key in shown)
    call("train", "--help", "trainer.stepz=7", code=2)
    assert "did you mean trainer.steps?" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["eval", "predict", "visualize", "export", "convert"])
def test_the_values_in_the_yaml_are_those_of_the_schema(tool):
    config = getattr(schema, f"{tool.title()}Config")
    assert OmegaConf.to_container(OmegaConf.structured(config)) == plain(tool)
