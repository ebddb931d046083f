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
import struct
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from foreign import outcome, place, saved  # noqa: F401
from torch import nn

from danet.checkpoint import exported, reading
from danet.checkpoint.pickle_scan import scan
from danet.config.build import load_model, make
from danet.engine.optimizer import SGD, AdamW, misfit, restore, state_of
from danet.errors import InputError
from danet.export import folder
from danet.export.card import card

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


def rewritten(path, change=lambda name, data: data, *, compression=zipfile.ZIP_STORED, extra=()):
    """Writes an archive anew with other entries, as nobody but an attacker does."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*((n, change(n, d)) for n, d in entries), *extra]:
            archive.writestr(name, data)
    return path


def pickled(change):
    """Returns a change of the pickle alone."""
    return lambda name, data: change(data) if name.endswith("data.pkl") else data


@pytest.fixture
def small(tmp_path):
    torch.save(SMALL, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
def test_what_torch_writes_is_read(tmp_path, old):
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    base = torch.arange(24.0)
    content = {
        "state": layer.state_dict(),
        "parameter": nn.Parameter(torch.ones(2, 3)),
        "strided": base.view(4, 6).t()[1:3],
        "tied": [base, base],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "size": torch.Size([1, 2]),
        "type": torch.float16,
        "set": {1, 2},
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert scan(path, path.stat().st_size) == ([], [], "")
    value = reading.read(path, "x").value
    assert torch.equal(value["strided"], content["strided"])
    assert list(value["state"]) == list(content["state"])


@pytest.mark.bad_input("K21")
def test_compressed_storages_are_refused_by_the_table(tmp_path, never_read):
    torch.save({"a": torch.zeros(5_000_000)}, tmp_path / "x.pt")
    path = rewritten(tmp_path / "x.pt", compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    refused(path, "its entries are compressed and unpack from 0.0 to 19.1 MiB")


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(1).expand(2**30), "shape (1073741824,) is expanded from 1 number(s)"),
        (torch.zeros(4, 1).expand(4, 1000), "shape (4, 1000) is expanded from 4 number(s)"),
        (torch.zeros(2**40, device="meta"), "it names torch._utils._rebuild_meta_tensor_no_sto"),
        (torch.eye(3).to_sparse(), "it names torch._utils._rebuild_sparse_tensor"),
        (torch.zeros(3, dtype=torch.complex64), "it names torch.ComplexFloatStorage"),
        (torch.zeros(3).to(torch.float8_e4m3fn), "only dense tensors of usual types"),
        (bytearray(3), "it asks to call builtins.bytearray"),
    ],
    ids=["expanded", "expanded in part", "meta", "sparse", "complex", "float8", "bytes"],
)
@pytest.mark.parametrize("where", ["among the weights", "in a list"])
def test_tensors_that_are_not_plain_are_refused(tmp_path, never_read, tensor, text, where):
    content = {"model": {"x": tensor}} if where == "among the weights" else [[{"x": [tensor]}]]
    torch.save(content, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 5000
    refused(tmp_path / "x.pt", text)


NUMEL = b"K\x10t"  # the 16 numbers of the storage, at the end of its record
SHAPE = b"K\x10\x85"
STRIDE = b"K\x01\x85"


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.replace(NUMEL, b"J\0\0\0\x10t"), "storage '0' has fewer bytes than it decl"),
        (lambda d: d.replace(NUMEL, b"J\xff\xff\xff\xfft"), "of a kind that is not read"),
        (lambda d: d.replace(SHAPE, b"K\x11\x85"), "(17,) reaches beyond its storage of 16"),
        (lambda d: d.replace(SHAPE, b"J\0\0\0\x10\x85"), "reaches beyond its storage of 16"),
        (lambda d: d.replace(STRIDE, b"K\x02\x85"), "(16,) reaches beyond its storage of 16"),
        (lambda d: d.replace(SHAPE, b"J\xff\xff\xff\xff\x85"), "a tensor of it has no shape"),
        (lambda d: d.replace(SHAPE, b"\x8a\x09" + bytes(8) + b"\1\x85"), "has no shape"),
        (lambda d: d.replace(b"storage", b"stonage"), "of a kind that is not read"),
        (lambda d: b"\x80\x02\x96" + struct.pack("<Q", 2**34) + b".", "damaged or incomplete"),
        (lambda d: d[:-1], "damaged or incomplete"),
    ],
)
def test_sizes_that_a_file_does_not_have_are_refused(small, change, text, monkeypatch):
    before = small.read_bytes()
    rewritten(small, pickled(change))
    assert small.read_bytes() != before
    if "damaged" not in text:
        monkeypatch.setattr(reading.torch, "load", lambda *_, **__: pytest.fail("it was read"))
    refused(small, text)


@pytest.mark.bad_input("K21")
def test_a_high_place_in_the_memo_takes_no_memory(small):
    """Python's fast reader of pickles would take 64 GiB for it."""
    change = pickled(lambda d: d.replace(b"q\x00", b"r\xff\xff\xff\xff", 1))
    assert torch.equal(reading.read(rewritten(small, change), "x").value["a"], SMALL["a"])


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize("function", [torch.Size, set, OrderedDict, Counter, codecs.encode])
def test_a_value_that_many_calls_copy_is_refused(tmp_path, never_read, function):
    """The value lies in the file once, and each call takes a few bytes more."""
    values = {OrderedDict: [(i, i) for i in range(20_000)], codecs.encode: "x" * 10**6}
    shared = values.get(function, list(range(20_000)))
    more = ["latin1"] if function is codecs.encode else []
    torch.save([Call(function, shared, *more) for _ in range(100)], tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 2**21
    refused(tmp_path / "x.pt", "its pickle makes more than 64 MiB beside the tensors")


@pytest.mark.bad_input("K21")
def test_text_in_a_longer_encoding_is_refused(tmp_path, never_read):
    torch.save(Call(codecs.encode, "text", "unicode_escape"), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "it encodes text as 'unicode_escape'")


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize("name", ["x/DATA.PKL", "y/data.pkl", "x/data/\u0660"])
def test_entries_of_one_name_are_refused(small, never_read, name):
    refused(rewritten(small, extra=[(name, b"")]), "its entries overlap or have names")


@pytest.mark.bad_input("K21")
def test_entries_that_share_their_bytes_are_refused(tmp_path, never_read):
    """The table says of two storages that they lie in one place."""
    torch.save({str(i): torch.zeros(1 << 18) for i in range(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, data in entries:
            if name != "x/data/1":
                archive.writestr(name, data)
        twin = copy.copy(archive.getinfo("x/data/0"))
        twin.filename = "x/data/1"
        archive.filelist.append(twin)
    assert (tmp_path / "x.pt").stat().st_size < 2 << 20
    refused(tmp_path / "x.pt", "its entries overlap")


@pytest.mark.bad_input("K21")
def test_a_table_that_torch_would_look_for_elsewhere_is_refused(small, never_read):
    """Python allows for bytes in front of an archive, torch's reader does not."""
    small.write_bytes(b"\0" * 64 + small.read_bytes())
    refused(small, "")
    small.write_bytes(small.read_bytes() + b"\0" * 64)
    refused(small, "")


@pytest.mark.bad_input("K21")
def test_an_old_file_with_a_harmless_archive_behind_it_is_judged_as_torch_reads_it(tmp_path):
    """torch goes by the first bytes, where Python looks for an archive at the end."""
    whole, old = tmp_path / "whole.pt", tmp_path / "old.pt"
    torch.save({"a": torch.zeros(1).expand(2**30)}, old, _use_new_zipfile_serialization=False)
    torch.save(SMALL, whole)
    with zipfile.ZipFile(whole) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(old, "a") as archive:  # with places counted from the start of the file
        for name, data in entries:
            archive.writestr(name, data)
    assert zipfile.is_zipfile(old)
    refused(old, "is expanded from 1 number(s)")


@pytest.mark.bad_input("K21")
def test_shapes_of_a_million_axes_are_not_multiplied(small, never_read):
    axes = b"(" + b"J\xff\xff\xff\x7f" * 200_000 + b"t"
    rewritten(small, pickled(lambda d: d.replace(SHAPE, axes).replace(STRIDE, axes)))
    refused(small, "a tensor of it has no shape")


@pytest.mark.bad_input("K21")
def test_many_views_of_one_storage_are_refused(tmp_path, never_read):
    base = torch.zeros(1 << 20)
    torch.save({str(i): base.view(1 << (i + 1), -1) for i in range(8)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "its tensors have 32 MiB and the file 4: they share their storages")


@pytest.mark.bad_input("K21")
def test_a_pickle_of_many_values_is_refused(tmp_path, never_read, monkeypatch):
    monkeypatch.setattr("danet.checkpoint.pickle_scan._MOST_PICKLED", 1000)
    torch.save({"a": torch.zeros(1), "b": list(range(1000))}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "its pickle has more than 0 MiB beside the tensors")


@pytest.mark.bad_input("K21")
def test_old_files_are_held_against_their_length(tmp_path, never_read):
    path = tmp_path / "x.pt"
    torch.save(SMALL, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x10N") == 1
    path.write_bytes(data.replace(b"K\x10N", b"J\0\0\0\x10N"))
    refused(path, "its storages have fewer bytes than it declares")
    listed = data[data.rindex(b"\x80\x02]") :]
    without = data.replace(listed, b"\x80\x02]q\x00." + b"\0" * 80)
    path.write_bytes(without)
    refused(path, "it lists other storages than its tensors need")


@pytest.mark.bad_input("K21")
def test_a_dictionary_whose_methods_are_replaced_is_refused(tmp_path, never_read):
    class Odd(OrderedDict):
        def __reduce__(self):
            return OrderedDict, (), {"items": 3, "keys": [1]}

    torch.save({"model": Odd()}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "it replaces attributes of a dictionary")


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize("width", [10**6, 10**9, 10**12, 2**62])
@pytest.mark.parametrize("way", ["checkpoint", "folder", "resume"])
def test_widths_that_no_machine_holds_are_refused_on_the_meta_device(
    saved,
    place,
    way,
    width,
    monkeypatch,
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


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"_target_": "danet.evaluation.inference.MultiScale", "scales": [1, 1000]}, "up to 16"),
        (
            {
                "_target_": "danet.evaluation.protocols.AuthorsProtocol",
                **{"base_size": 2048, "crop": 1024, "scales": [100.0], "stride_rate": 0.5},
            },
            "positive numbers up to 16",
        ),
        (
            {
                "_target_": "danet.evaluation.protocols.AuthorsProtocol",
                **{"base_size": 520, "crop": 10**6, "scales": [1.0], "stride_rate": 0.5},
            },
            "crop=1000000 is not in 32",
        ),
        (
            {
                "_target_": "danet.evaluation.protocols.MMSegProtocol",
                **{"scale": [2048, 1024], "ratios": [1000.0], "flip": False},
            },
            "up to 16",
        ),
    ],
)
def test_a_protocol_of_a_file_enlarges_no_picture_beyond_measure(node, text):
    with pytest.raises(InputError, match=text):
        make(node, "evaluation")


@pytest.mark.bad_input("K21")
def test_drawn_pictures_of_any_size_are_refused():
    node = {"_target_": "danet.datasets.scenes.Scenes", "_partial_": True, "lengths": {"val": 1}}
    with pytest.raises(InputError, match="178956970 pixels or fewer"):
        make({**node, "size": [100_000, 100_000]}, "data", split="val")


@pytest.mark.bad_input("K23")
def test_lines_and_scores_beside_a_file_are_numbers_or_left_out(tmp_path):
    from danet.engine.log import read_metrics
    from danet.tools.export import are_scores
    from danet.visualization.pages import named_curves

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
        for value in (None, [1], "x", {"a": [1]}, 1.5):
            is_same = key == "split" and value == "x"
            assert is_same or not are_scores({**scores, key: value}), (key, value)
    assert not are_scores([scores])


@pytest.mark.bad_input("K21")
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 5000, "1" * 5000, "\xff", ""])
def test_a_config_json_that_is_none_is_refused_in_one_line(saved, tmp_path, content):
    folder.save(tmp_path, saved, saved["model"])
    (tmp_path / exported.CONFIG).write_text(content, "latin1")
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert "damaged or incomplete" in str(error.value) or "is not of an exp" in str(error.value)


@pytest.mark.bad_input("K21")
def test_a_config_json_of_gigabytes_is_not_read(saved, tmp_path):
    folder.save(tmp_path, saved, saved["model"])
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


def trained(recipe, sizes=(4, 4), seed=0):
    """Returns a network with layers of one shape, and an optimizer after a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(size, size) for size in sizes))
    optimizer = recipe(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


RECIPES = [SGD(lr=0.1), AdamW(lr=0.1), SGD(lr=0.1, momentum=0.0)]


@pytest.mark.parametrize("recipe", RECIPES, ids=["SGD", "AdamW", "no momentum"])
def test_a_state_goes_back_to_where_it_was(recipe):
    model, optimizer = trained(recipe)
    content = copy.deepcopy(state_of(optimizer, model))
    again = recipe(model)
    assert misfit(recipe, model, content) == ""
    restore(again, content)
    for parameter in model.parameters():
        old, new = optimizer.state[parameter], again.state[parameter]
        assert set(old) == set(new)
        for key, value in old.items():
            assert value is None or torch.equal(value, new[key])
    # Files of before have no names.
    bare = optimizer.state_dict()
    assert misfit(recipe, model, bare) == ""


@pytest.mark.bad_input("K22")
@pytest.mark.parametrize("recipe", RECIPES[:2], ids=["SGD", "AdamW"])
def test_states_that_are_not_of_this_optimizer_are_named(recipe):
    model, optimizer = trained(recipe)
    moment = "momentum_buffer" if isinstance(recipe, SGD) else "exp_avg"

    def problem(change):
        content = copy.deepcopy(state_of(optimizer, model))
        change(content)
        return misfit(recipe, model, content)

    def swap(content):
        states = content["state"]
        states[0], states[2] = states[2], states[0]

    def replace(key, value):
        return lambda content: content["state"][1].__setitem__(key, value)

    def drop(content):
        del content["state"][1][moment]

    assert problem(lambda content: None) == ""
    names = [content["name"] for content in state_of(optimizer, model)["state"].values()]
    one = names[1]
    swapped = f"state 0 is not of {names[0]}: its name is {names[2]!r}, not {names[0]!r}"
    assert problem(swap) == swapped
    start, shape = f"state 1 is not of {one}: its ", list(model.get_parameter(one).shape)
    assert problem(replace("name", "x")) == f"{start}name is 'x', not {one!r}"
    assert problem(replace("shape", [9])) == f"{start}shape is [9], not {shape}"
    for value, text in (
        (torch.zeros(5), "floating point of shape [5]"),
        (torch.zeros(shape).int(), f"torch.int32 of shape {shape}"),
        (torch.full(shape, float("nan")), f"NaN or infinite of shape {shape}"),
        ("x", "'x'"),
    ):
        wanted = f"{start}{moment} is {text}, not floating point of shape {shape}"
        assert problem(replace(moment, value)) == wanted
    assert f"the state of {one} has" in problem(replace("other", torch.zeros(4)))
    assert f"the state of {one} has" in problem(drop)
    assert "is of no parameter" in problem(lambda c: c["state"].__setitem__(99, {}))
    assert "is of no parameter" in problem(lambda c: c["state"].__setitem__(0, 3))
    assert "is of no parameter" in problem(lambda c: c["state"].__setitem__(0.0, c["state"].pop(0)))
    assert "is not a state of" in problem(lambda c: c["param_groups"][0]["params"].reverse())
    assert "is not a state of" in problem(lambda c: c.__setitem__("state", [1]))
    assert "is not a state of" in problem(lambda c: c.__setitem__("param_groups", None))
    assert "is not a state of" in problem(lambda c: c["param_groups"].pop())
    other = trained(RECIPES[1] if recipe is RECIPES[0] else RECIPES[0])[1].state_dict()
    assert "the state of 0.weight has" in misfit(recipe, model, other)
    deeper = trained(recipe, sizes=(4, 4, 4))[1].state_dict()
    assert "over 4 parameters" in misfit(recipe, model, deeper)


@pytest.mark.bad_input("K22")
@pytest.mark.parametrize("kind", ["swapped", "other shape", "reversed"])
def test_a_run_does_not_go_on_with_states_of_other_parameters(saved, place, kind):
    content = copy.deepcopy(saved["optimizer"])
    states = content["state"]
    if kind == "swapped":
        same = [i for i, s in states.items() if s["shape"] == states[1]["shape"]][:2]
        states[same[0]], states[same[1]] = states[same[1]], states[same[0]]
    elif kind == "other shape":
        states[0]["exp_avg"] = torch.zeros(3)
    else:
        values = list(states.values())[::-1]
        content["state"] = dict(zip(states, values, strict=True))
    reported = outcome("resume", {**saved, "optimizer": content}, place)
    assert "foreign.pt: the state of the optimizer does not fit: " in reported
    assert "to start a new run from the weights use init_from" in reported
    assert len(reported.splitlines()) == 1


@pytest.mark.bad_input("K22")
def test_weights_of_another_network_are_no_traceback_on_resume(saved, place):
    other = {k: v for k, v in saved["model"].items() if "conv1" not in k}
    reported = outcome("resume", {**saved, "model": other}, place)
    assert "the weights do not fit its own config: missing: " in reported
    ema = {f"module.{k}": v for k, v in other.items()}
    reported = outcome("resume", {**saved, "ema": ema}, place)
    assert "the weights do not fit its own config: missing: module." in reported


# Names of classes.

EVIL = (
    "a\x1b[2J",
    "b\nc",
    "<script>alert(1)</script>",
    "=1+1",
    "x|y`z`",
    "[l](http://x)",
    "\u202e",
)


@pytest.mark.bad_input("K23")
def test_names_of_classes_are_escaped_wherever_they_are_shown(saved, tmp_path):
    from danet.engine.log import class_table
    from danet.evaluation.metrics import ConfusionMatrix
    from danet.tools.eval import Counted, write
    from danet.visualization.report import Report, page

    names = [*EVIL, *(f"class {i}" for i in range(16 - len(EVIL)))]
    folder.save(tmp_path / "e", {**saved, "classes": names, "version": "<b>|"}, saved["model"])
    found = exported.load(tmp_path / "e")
    classes = found["classes"]
    assert classes[:2] == ["a\\x1b[2J", "b\\nc"]
    assert classes[6] == "\\u202e"
    assert load_model(tmp_path / "e").classes == tuple(classes)

    matrix = ConfusionMatrix(16, torch.device("cpu"))
    matrix.update(torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8))
    scores = matrix.scores()
    assert len(class_table(classes, {"IoU": scores.iou}).splitlines()) == 17

    numbers = matrix.matrix.numpy()
    facts = {"title": "t", "facts": ["f"], "lines": (), "examples": {}, "views": ()}
    html = page(Report(classes=classes, palette=[(0, 0, 0)] * 16, confusion=matrix, **facts))
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html

    counted = Counted(numbers, scores, None, "", 0.0, None)
    write(tmp_path / "scores", {}, counted, tuple(classes))
    rows = list(csv.reader(io.StringIO((tmp_path / "scores/confusion.csv").read_text())))
    assert rows[0][4] == rows[4][0] == "'=1+1"
    assert len(rows) == 17
    assert json.loads((tmp_path / "scores/metrics.json").read_text())["per_class"]["=1+1"]

    text = card(found, num_weights=1, programs={})
    assert "<script>" not in text
    assert "<b>" not in text
    assert r"| 4 | x\|y\`z\` |" in text
    assert r"\[l\](http://x)" in text


@pytest.mark.bad_input("K21")
def test_texts_of_a_file_are_not_repeated_without_limit(saved, place):
    nested = "x"
    for _ in range(40):
        nested = [nested, nested]
    assert ": format list of danet 0.2" in outcome("checkpoint", {**saved, "format": nested}, place)
    many = ["\x1b" * 1000] * 10**6  # 4 kB each when escaped, and 2 bytes in the file
    assert "1000000 class" in outcome("checkpoint", {**saved, "classes": many}, place)


@pytest.mark.bad_input("K23")
def test_a_palette_is_numbers_before_it_is_written_into_a_page(saved, place):
    for color in (["0;background:url(//x)", 0, 0], [0.5, 0, 0], [True, 0, 0], [0, 0], "abc"):
        reported = outcome("checkpoint", {**saved, "palette": [color] * 16}, place)
        assert reported.endswith("a list of RGB colours of 0 to 255")
