"""Small files that ask for much memory, states of other optimizers, and names that are no text.

Every file is judged by its table, its pickle and the meta device; torch is never asked to read one
that is refused.
"""

# ruff: noqa: F811
import codecs
import copy
import csv
import io
import json
import math
import struct
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from foreign import outcome, place, saved  # noqa: F401
from torch import nn

from danet.checkpoint import exported, reading
from danet.config.build import load_model, make
from danet.engine.log import class_table, read_metrics
from danet.engine.optimizer import SGD, AdamW, misfit, state_of
from danet.errors import InputError
from danet.evaluation.metrics import ConfusionMatrix
from danet.export import folder
from danet.tools.eval import Counted, write
from danet.tools.export import are_scores
from danet.visualization.overlay import Legend
from danet.visualization.report import Report, named_curves, page

SMALL = {"a": torch.arange(16.0)}


@pytest.fixture
def never_read(monkeypatch):
    """Fails a test in which torch is asked to read the file."""
    read = []
    monkeypatch.setattr(reading.torch, "load", lambda *_, **__: read.append(1))
    yield
    assert not read


def refused(path, *parts):
    with pytest.raises(InputError) as error:
        reading.read(path, "checkpoint")
    text = str(error.value)
    assert text.startswith(f"checkpoint={path}: ")
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text, text


def entries_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(path, entries, compression=zipfile.ZIP_STORED):
    """Writes an archive anew by another program, as nobody but an attacker does."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def pickled(path, change):
    """Writes an archive anew as torch does, with another pickle."""
    entries = entries_of(path)
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in entries:
        changed = change(data) if name.endswith("data.pkl") else data
        if "/data" in name:
            writer.write_record(name.partition("/")[2], changed, len(changed))
    writer.write_end_of_file()
    return path


@pytest.fixture
def small(tmp_path):
    torch.save(SMALL, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
def test_what_torch_writes_is_read(tmp_path, old):
    base = torch.arange(24.0)
    content = {
        "state": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(),
        "parameter": nn.Parameter(torch.ones(2, 3)),
        "strided": base.view(4, 6).t()[1:3],
        "tied": [base, base],
        "empty and scalar": [torch.zeros(0, 3), torch.tensor(3, dtype=torch.int64)],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "plain": [torch.Size([1, 2]), torch.float16, {1, 2}],
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    value, is_sealed = reading.read(path, "x")
    assert not is_sealed
    assert torch.equal(value["strided"], content["strided"])
    assert list(value["state"]) == list(content["state"])


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Odd(OrderedDict):
    def __reduce__(self):
        return OrderedDict, (), {"items": 3, "keys": [1]}


def compressed(path):
    torch.save({"a": torch.zeros(5_000_000)}, path)
    zipped(path, entries_of(path), zipfile.ZIP_DEFLATED)


def sharing_bytes(path):
    """The table says of two storages that they lie in one place."""
    torch.save({str(i): torch.zeros(1 << 18) for i in range(2)}, path)
    zipped(path, [entry for entry in entries_of(path) if entry[0] != "x/data/1"])
    with zipfile.ZipFile(path, "a") as archive:
        twin = copy.copy(archive.getinfo("x/data/0"))
        twin.filename = "x/data/1"
        archive.filelist.append(twin)
        archive._didModify = True


def with_entry(name):
    def write(path):
        torch.save(SMALL, path)
        zipped(path, [*entries_of(path), (name, b"")])

    return write


def copied(function, value, *more):
    """The value lies in the file once, and each call takes a few bytes more."""
    return [Call(function, value, *more) for _ in range(100)]


BASE, NUMBERS = torch.zeros(1 << 20), list(range(20_000))
COPIES = "its pickle makes more than 64 MiB beside the tensors"
OVERLAP = "its entries overlap or have names"
HOSTILE = {
    "compressed": (compressed, "are compressed and unpack from 0.0 to 19.1 MiB"),
    "bytes that are shared": (sharing_bytes, OVERLAP),
    "a name in other letters": (with_entry("x/DATA.PKL"), OVERLAP),
    "two folders": (with_entry("y/data.pkl"), OVERLAP),
    "a name of other digits": (with_entry("x/data/\u0660"), OVERLAP),
    "sizes copied": (copied(torch.Size, NUMBERS), COPIES),
    "sets copied": (copied(set, NUMBERS), COPIES),
    "counters copied": (copied(Counter, NUMBERS), COPIES),
    "pairs copied": (copied(OrderedDict, [(i, i) for i in NUMBERS]), COPIES),
    "text copied": (copied(codecs.encode, "x" * 10**6, "latin1"), COPIES),
    "a longer encoding": (Call(codecs.encode, "text", "unicode_escape"), "as 'unicode_escape'"),
    "other methods": ({"model": Odd()}, "it replaces attributes of a dictionary"),
    "many values": (list(range(5 * 10**6)), "its pickle has more than 16 MiB beside the tensors"),
    "views": (
        {str(i): BASE.view(1 << (i + 1), -1) for i in range(8)},
        "its tensors have 32 MiB and the file 4: they share their storages",
    ),
    "expanded": ([torch.zeros(1).expand(2**30)], "(1073741824,) is more than its storage"),
    "in part": (torch.zeros(4, 1).expand(4, 1000), "(4, 1000) is more than its storage"),
    "meta": (torch.zeros(2**40, device="meta"), "to call torch._utils._rebuild_meta_tensor_no_sto"),
    "sparse": ([torch.eye(3).to_sparse()], "it asks to call torch._utils._rebuild_sparse_tensor"),
    "complex": (torch.zeros(3, dtype=torch.complex64), "it asks to call torch.ComplexFloatStorage"),
    "float8": (torch.zeros(3).to(torch.float8_e4m3fn), "only dense tensors of usual types"),
    "bytes": (bytearray(3), "it asks to call builtins.bytearray"),
}
"""What is in a file, or writes it, and what is said of it."""


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_asks_for_much_is_refused_unread(tmp_path, never_read, name):
    content, said = HOSTILE[name]
    path = tmp_path / "x.pt"
    content(path) if callable(content) else torch.save(content, path)
    assert path.stat().st_size < 5 << 20 or name == "many values"
    refused(path, said)


NUMEL = b"K\x10t"  # the 16 numbers of the storage, at the end of its record
SHAPE = b"K\x10\x85"
STRIDE = b"K\x01\x85"
AXES = b"(" + b"J\xff\xff\xff\x7f" * 200_000 + b"t"


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.replace(NUMEL, b"J\0\0\0\x10t"), "storage '0' has fewer bytes than it decl"),
        (lambda d: d.replace(NUMEL, b"J\xff\xff\xff\xfft"), "of a kind that is not read"),
        (lambda d: d.replace(SHAPE, b"K\x11\x85"), "(17,) is more than its storage of 16"),
        (lambda d: d.replace(STRIDE, b"K\x02\x85"), "(16,) is more than its storage of 16"),
        (lambda d: d.replace(SHAPE, b"J\xff\xff\xff\xff\x85"), "a tensor of it has no shape"),
        (lambda d: d.replace(SHAPE, b"\x8a\x09" + bytes(8) + b"\1\x85"), "has no shape"),
        (lambda d: d.replace(SHAPE, AXES).replace(STRIDE, AXES), "a tensor of it has no shape"),
        (lambda d: d.replace(b"storage", b"stonage"), "of a kind that is not read"),
        (lambda d: b"\x80\x02\x96" + struct.pack("<Q", 2**34) + b".", "damaged or incomplete"),
        # A state for the tensor, whose storage torch would replace.
        (lambda d: d[:-2] + b"(K\x01K\x01K\x01tbs.", "damaged or incomplete"),
    ],
)
def test_sizes_that_a_file_does_not_have_are_refused(small, change, text, never_read):
    before = small.read_bytes()
    pickled(small, change)
    assert small.read_bytes() != before
    refused(small, text)


@pytest.mark.bad_input("K21")
def test_a_high_place_in_the_memo_takes_no_memory(small):
    """Python's fast reader of pickles would take 64 GiB for it."""
    pickled(small, lambda d: d.replace(b"q\x00", b"r\xff\xff\xff\xff", 1))
    assert torch.equal(reading.read(small, "x")[0]["a"], SMALL["a"])


@pytest.mark.bad_input("K21")
def test_a_table_that_torch_would_look_for_elsewhere_is_refused(small, never_read):
    """Python allows for bytes in front of an archive, torch's reader does not."""
    whole = small.read_bytes()
    for changed in (b"\0" * 64 + whole, whole + b"\0" * 64):
        small.write_bytes(changed)
        refused(small, "")
    small.write_bytes(whole)
    refused(zipped(small, entries_of(small)), "damaged or incomplete")


@pytest.mark.bad_input("K21")
def test_old_files_are_held_against_their_length(small, tmp_path, never_read):
    path = tmp_path / "old.pt"
    torch.save(SMALL, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    listed = data[data.rindex(b"\x80\x02]") :]
    for changed in (
        data.replace(b"K\x10N", b"J\0\0\0\x10N"),
        data.replace(listed, b"\x80\x02]q\x00." + b"\0" * 80),
    ):
        path.write_bytes(changed)
        refused(path, "its storages are not those its tensors need, or have fewer bytes")
    # torch goes by the first bytes, where Python looks for an archive at the end.
    torch.save({"a": torch.zeros(1).expand(2**30)}, path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as archive:  # with places counted from the start of the file
        for name, data in entries_of(small):
            archive.writestr(name, data)
    assert zipfile.is_zipfile(path)
    refused(path, "is more than its storage of 1 number(s)")


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize(
    ("way", "width"), [("checkpoint", 10**6), ("folder", 2**62), ("resume", 10**9)]
)
def test_widths_that_no_machine_holds_are_refused_on_the_meta_device(
    saved, place, way, width, monkeypatch
):
    made = []
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: made.append(1))
    config = copy.deepcopy(saved["config"])
    config["model"]["backbone"]["width"] = width
    reported = outcome(way, {**saved, "config": config}, place)
    assert reported
    assert len(reported.splitlines()) == 1
    assert "do not fit its own config" in reported or "model.backbone: " in reported
    assert not made


AUTHORS = {"base_size": 2048, "crop": 1024, "scales": [1.0], "stride_rate": 0.5}
MMSEG = {"scale": [2048, 1024], "ratios": [1.0], "flip": False}
DRAWN = {"_partial_": True, "lengths": {"val": 1}, "size": [100_000, 100_000]}


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize(
    ("target", "values", "text"),
    [
        ("evaluation.inference.MultiScale", {"scales": [1, 1000]}, "up to 16"),
        ("evaluation.protocols.AuthorsProtocol", {**AUTHORS, "scales": [100.0]}, "s up to 16"),
        ("evaluation.protocols.AuthorsProtocol", {**AUTHORS, "crop": 10**6}, "is not in 32"),
        ("evaluation.protocols.MMSegProtocol", {**MMSEG, "ratios": [1000.0]}, "up to 16"),
        ("datasets.scenes.Scenes", DRAWN, "178956970 pixels or fewer"),
    ],
)
def test_a_config_of_a_file_asks_for_no_picture_beyond_measure(target, values, text):
    key, more = ("data", {"split": "val"}) if "data" in target else ("evaluation", {})
    with pytest.raises(InputError, match=text):
        make({"_target_": f"danet.{target}", **values}, key, **more)


@pytest.mark.bad_input("K23")
def test_lines_and_scores_beside_a_file_are_numbers_or_left_out(tmp_path):
    good = {"step": 1, "kind": "train", "loss": 0.5, "lr": None}
    odd = ["[1]", '"x"', "[" * 100_000, '{"step": "<b>"}', '{"step": 1e999, "kind": "train"}', "{"]
    odd.append(json.dumps({**good, "loss_x": "<script>", "loss_y": [1], "loss_z": {"a": 1}}))
    (tmp_path / "metrics.jsonl").write_text("\n".join([json.dumps(good), *odd]))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert named_curves(lines, "train", "loss") == {"loss": [(1, 0.5), (1, 0.5)]}

    scores = {"split": "val", "images": 1, "step": 1, "per_class": {"a": {"iou": None}}}
    scores["evaluation"] = {"_target_": "danet.evaluation.inference.Whole"}
    assert are_scores(scores)
    for key in scores:
        for value in (None, [1], {"a": [1]}, 1.5):
            assert not are_scores({**scores, key: value}), (key, value)
    assert not are_scores([scores])


@pytest.mark.bad_input("K21")
def test_a_config_json_that_is_none_is_refused_in_one_line(saved, tmp_path):
    folder.save(tmp_path, saved, saved["model"])
    for content in ("[" * 100_000, '{"a": ' * 5000, "1" * 5000, "\xff", "", "{}"):
        (tmp_path / exported.CONFIG).write_text(content, "latin1")
        with pytest.raises(InputError, match=r"damaged or incomplete|is not of an exp") as error:
            load_model(tmp_path)
        assert len(str(error.value).splitlines()) == 1
    with open(tmp_path / exported.CONFIG, "wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(InputError, match="has 10240 MiB; expected at most 16"):
        load_model(tmp_path)


@pytest.mark.parametrize("bad", [torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.bad_input("K21")
def test_types_of_no_weights_are_refused_in_safetensors(saved, tmp_path, bad):
    name = next(iter(saved["model"]))
    other = {**saved["model"], name: saved["model"][name].to(bad)}
    folder.save(tmp_path, saved, other)
    with pytest.raises(InputError, match=f"{name} is of type {bad}; expected torch.float64"):
        load_model(tmp_path)


# States of optimizers.


def trained(recipe, sizes=(4, 4)):
    """Returns a network with layers of one shape, and an optimizer after a step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for size in sizes))
    optimizer = recipe(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def swap(content):
    states = content["state"]
    states[0], states[2] = states[2], states[0]


def put(key, value):
    return lambda content: content["state"][1].__setitem__(key, value)


OTHER = "state 1 is not of 1.weight: its "
MISFITS = [
    (swap, "state 0 is not of 0.weight: its name is '0.bias', not '0.weight'"),
    (put("name", "x"), f"{OTHER}name is 'x', not '1.weight'"),
    (put("shape", [9]), f"{OTHER}shape is [9], not [4, 4]"),
    (put("exp_avg", torch.zeros(5)), "exp_avg is floating point of shape [5], not floating"),
    (put("exp_avg", torch.zeros(4, 4).int()), "exp_avg is torch.int32 of shape [4, 4], not float"),
    (put("exp_avg", torch.full((4, 4), math.nan)), "exp_avg is NaN or infinite of"),
    (put("other", torch.zeros(4)), "the state of 1.weight has"),
    (lambda c: c["state"][1].pop("exp_avg"), "the state of 1.weight has"),
    (lambda c: c["state"].__setitem__(99, {}), "is of no parameter"),
    (lambda c: c["state"].__setitem__(0.0, c["state"].pop(0)), "is of no parameter"),
    (lambda c: c["param_groups"][0]["params"].reverse(), "is not a state of"),
    (lambda c: c.__setitem__("state", [1]), "is not a state of"),
    (lambda c: c["param_groups"].pop(), "is not a state of"),
]


@pytest.mark.bad_input("K22")
def test_states_that_are_not_of_this_optimizer_are_named():
    recipe = AdamW(lr=0.1)
    model, optimizer = trained(recipe)
    assert misfit(recipe, model, state_of(optimizer, model)) == ""
    assert misfit(recipe, model, optimizer.state_dict()) == "", "files of before have no names"
    for change, text in MISFITS:
        content = copy.deepcopy(state_of(optimizer, model))
        change(content)
        assert text in misfit(recipe, model, content)
    other = trained(SGD(lr=0.1))[1].state_dict()
    assert "the state of 0.weight has" in misfit(recipe, model, other)
    deeper = trained(recipe, sizes=(4, 4, 4))[1].state_dict()
    assert "over 4 parameters" in misfit(recipe, model, deeper)


@pytest.mark.bad_input("K22")
def test_states_and_weights_of_other_parameters_are_refused_on_resume(saved, place):
    optimizer = copy.deepcopy(saved["optimizer"])
    optimizer["state"][0]["exp_avg"] = torch.zeros(3)
    other = {k: v for k, v in saved["model"].items() if "conv1" not in k}
    states = "foreign.pt: the state of the optimizer does not fit: "
    misses = "the weights do not fit its own config: missing: "
    for key, value, said in (
        ("optimizer", optimizer, states),
        ("model", other, misses),
        ("ema", {f"module.{k}": v for k, v in other.items()}, f"{misses}module."),
    ):
        reported = outcome("resume", {**saved, key: value}, place)
        assert said in reported
        assert key != "optimizer" or len(reported.splitlines()) == 1


# Names of classes.

EVIL = "a\x1b[2J", "b\nc", "<script>alert(1)</script>", "=1+1", "x|y`z`", "[l](http://x)", "\u202e"


@pytest.mark.bad_input("K23")
def test_names_of_classes_are_escaped_wherever_they_are_shown(saved, tmp_path):
    names = [*EVIL, *(f"class {i}" for i in range(16 - len(EVIL)))]
    folder.save(tmp_path / "e", {**saved, "classes": names, "version": "<b>|"}, saved["model"])
    found = exported.load(tmp_path / "e")
    classes = found["classes"]
    assert classes[:2] == ["a\\x1b[2J", "b\\nc"]
    assert classes[6] == "\\u202e"
    assert load_model(tmp_path / "e").classes == tuple(classes)

    matrix = ConfusionMatrix(16)
    matrix.update(torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8))
    scores = matrix.scores()
    facts = {
        "title": "t",
        "facts": ["f"],
        "lines": (),
        "examples": {},
        "views": (),
        "calibration": (),
    }
    html = page(Report(legend=Legend(classes, [(0, 0, 0)] * 16), confusion=matrix, **facts))
    counted = Counted(matrix.matrix.numpy(), scores, None, "", 0.0, None, {}, torch.zeros(0, 3))
    write(tmp_path / "scores", {}, counted, tuple(classes))
    rows = list(csv.reader(io.StringIO((tmp_path / "scores/confusion.csv").read_text())))
    assert rows[0][4] == rows[4][0] == "'=1+1"
    assert len(rows) == len(class_table(classes, {"IoU": scores.iou}).splitlines()) == 17
    text = folder.card(found, num_weights=1, programs={})
    for part in ("<script>", "<b>"):
        assert part not in text
        assert f"{part}alert" not in html
    assert "&lt;script&gt;alert" in html
    assert r"| 4 | x\|y\`z\` |" in text
    assert r"\[l\](http://x)" in text


@pytest.mark.bad_input("K21")
def test_texts_of_a_file_are_not_repeated_without_limit(saved, place):
    nested = "x"
    for _ in range(40):
        nested = [nested, nested]
    assert ": format list of danet 0.2" in outcome("checkpoint", {**saved, "format": nested}, place)
    many = ["\x1b" * 1000] * 10**5  # 4 kB each when escaped, and 2 bytes in the file
    assert "100000 class" in outcome("checkpoint", {**saved, "classes": many}, place)
    scores = {str(i): "x" for i in range(10**5)}
    assert "more than 10000 entries" in outcome("checkpoint", {**saved, "scores": scores}, place)
