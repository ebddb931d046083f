"""What leaves the project computes what the network does, and comes back as it was."""

import copy
import json
import re
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import call

import danet
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.exported import CONFIG, WEIGHTS, fetch
from danet.errors import InputError, UserError
from danet.export import folder, programs
from danet.export.programs import SMALLEST, Exportable
from danet.ops.attention import PositionAttention
from danet.tools import export as export_tool
from danet.types import Sample

SIZES = [(64, 96), (45, 77), (200, 203)]
"""Two are no multiples of 8; the last has more positions than a tile of the attention."""
VARIANTS = [
    {"similarity": "whitened", "scale": "learned", "unary": True, "registers": 2, "gamma": 0.5},
    {"similarity": "cosine", "scale": "learned", "gamma": 0.5},
]
"""Of the position attention."""


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return danet.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    """The folder of one call of the tool, with scores of an evaluation beside the checkpoint."""
    place = tmp_path_factory.mktemp("exported")
    shutil.copy(tiny_checkpoint, place / "last.pt")
    metrics = {
        "miou": 0.3125,
        "per_class": {"sky": {"iou": 0.875, "accuracy": 0.9}, "bus": {"iou": None}},
        "images": 5,
        "evaluation": {"_target_": "danet.evaluation.inference.Whole"},
        "protocol": "whole images",
        "data_set": "Scenes test, 5 samples",
    }
    for split, step in (("test", 6), ("old", 5)):
        path = place / f"eval_{split}" / "metrics.json"
        path.parent.mkdir()
        path.write_text(json.dumps({**metrics, "step": step, "split": split}))
    call("export", f"checkpoint={place / 'last.pt'}", "formats=[]")
    return place / "exported"


def attention_variant(channels, reduction, **variant):
    attention = PositionAttention(channels, reduction, **variant)
    if attention.register_values is not None:
        torch.nn.init.normal_(attention.register_values, std=9)
    return attention


@pytest.mark.parametrize("is_unrolled", [False, True])
@pytest.mark.parametrize("count", [1, 511, 512, 513, 1500])
@pytest.mark.parametrize("variant", [{"gamma": 0.5}, *VARIANTS])
def test_attention_in_tiles_is_the_formula(variant, count, is_unrolled):
    attention, x = attention_variant(16, 2, **variant), torch.randn(2, 16, 1, count)
    tiled = Exportable(torch.nn.Sequential(attention), is_unrolled=is_unrolled).network
    with torch.no_grad():
        torch.testing.assert_close(tiled(x), attention(x))


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize("size", [(8, 9), (13, 6)])
def test_a_convolution_padded_from_its_end_is_that_of_tensorflow(kernel, dilation, size):
    layers = pytest.importorskip("timm.layers")
    conv = layers.Conv2dSame(2, 3, kernel, stride=2, dilation=dilation)
    x, expected = torch.randn(1, 2, *size), None
    with torch.no_grad():
        expected = conv(x)
        programs._fix_padding(torch.nn.Sequential(conv), programs._SamePadding)
        torch.testing.assert_close(conv(x), expected)


def test_the_exportable_copy_is_the_network(model):
    copy = Exportable(model)
    for size in SIZES:
        image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(copy(image), model(image).logits, atol=1e-5, rtol=1e-5)
    assert type(model.head.position.attention) is PositionAttention


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_programs_agree_at_every_size_and_need_nothing_of_ours(model, tmp_path, kind):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.pt2"
    program = getattr(programs, f"export_{kind}")(model, path)
    for found in programs.compare(model, program, [*SIZES, (SMALLEST, SMALLEST)]):
        assert found.difference < 1e-4
        assert found.agreement > 0.999
    batch = np.random.default_rng(0).integers(0, 256, (3, 3, 161, 283), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(batch)).logits.numpy()
    np.testing.assert_allclose(program(batch), expected, atol=1e-4)
    if kind == "torch":
        graph = torch.export.load(path).graph
        assert not [node for node in graph.nodes if "danet" in str(node.target)]
        return
    written = onnx.load(path)
    onnx.checker.check_model(written)
    assert written.opset_import[0].version == programs.OPSET
    sides = (*written.graph.input, *written.graph.output)
    shapes = [[d.dim_param or d.dim_value for d in s.type.tensor_type.shape.dim] for s in sides]
    assert shapes[0] == ["batch", 3, "height", "width"]
    assert shapes[1][:2] == ["batch", 16]
    assert "Scan" in {node.op_type for node in written.graph.node}, "attention is not in tiles"
    assert {node.domain for node in written.graph.node} == {""}, "no operators of our own"
    np.testing.assert_allclose(run_openvino(path, batch), expected, atol=1e-4)


def run_openvino(path, image):
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(path, "CPU", settings)(image)["logits"]


@pytest.mark.slow
def test_a_program_of_one_size_has_no_scan_and_every_runtime_takes_it(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    path, size = tmp_path / "model.onnx", (200, 203)  # more positions than a tile
    image = np.random.default_rng(0).integers(0, 256, (1, 3, *size), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(image)).logits.numpy()
    for program in (
        programs.export_onnx(model, path, size=size),
        programs.export_torch(model, tmp_path / "model.pt2", size=size),
        lambda image: run_openvino(path, image),
    ):
        np.testing.assert_allclose(program(image), expected, atol=1e-4)
    graph = onnx.load(path).graph
    assert not {"Scan", "Loop", "If"}.intersection(node.op_type for node in graph.node)
    sides = (*graph.input, *graph.output)
    shapes = [[d.dim_value for d in side.type.tensor_type.shape.dim] for side in sides]
    assert shapes == [[1, 3, *size], [1, 16, *size]]
    positions = 25 * 26
    found = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info]
    assert [1, programs.QUERIES_PER_TILE, positions] in found
    assert [1, positions, positions] not in found


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (200, 203)], ids=["free", "fixed"])
@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant["similarity"])
def test_variants_of_the_attention_are_exported(model, tmp_path, variant, kind, size):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    other = copy.deepcopy(model)
    channels = model.head.position.attention.value.out_channels
    other.head.position.attention = attention_variant(channels, 2, **variant)
    program = getattr(programs, f"export_{kind}")(other, tmp_path / "program", size=size)
    for found in programs.compare(other, program, [size] if size else SIZES):
        assert found.difference < 1e-4
    image = programs._noise(model, 1, 200, 203)
    plain = programs.compare_on(image, model, program)
    assert plain.difference > 1e-2, "the attention has no part in the result"
    if kind == "onnx":
        found = run_openvino(tmp_path / "program", image.numpy())
        np.testing.assert_allclose(found, program(image.numpy()), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["null", "[48,96]"])
def test_int8_has_the_classes_of_the_network_on_pictures(tiny_checkpoint, tmp_path, capsys, size):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    settings = [f"output={tmp_path}", "formats=[int8]", f"size={size}", "calibration=4"]
    call("export", f"checkpoint={tiny_checkpoint}", *settings)
    agreement = re.search(r"(\S+) % of the pixels have the same class", capsys.readouterr().out)
    assert 90 < float(agreement[1]) < 100, "or nothing was quantised"
    path = tmp_path / "model_int8.onnx"
    nodes = onnx.load(path).graph.node
    made_of = {output: node.op_type for node in nodes for output in node.output}
    weights = [made_of.get(node.input[1]) for node in nodes if node.op_type == "Conv"]
    assert weights.count(None) == 1, "the classifier alone is float32"
    assert set(weights) == {None, "DequantizeLinear"}
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 48, 96), dtype=np.uint8)
    ours, theirs = programs.load_onnx(path)(image), run_openvino(path, image)
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.95
    assert "`model_int8.onnx` computes" in (tmp_path / "README.md").read_text()
    limit = "height and width are free" if size == "null" else "at a time, of 48 x 96 pixels."
    assert limit in (tmp_path / "README.md").read_text()


def test_int8_with_other_classes_is_refused(model):
    def wrong(image):
        return model(torch.from_numpy(image)).logits.roll(1, dims=1).numpy()

    pictures = [torch.full((1, 3, 32, 32), value, dtype=torch.uint8) for value in (0, 90)]
    with pytest.raises(UserError, match=r"int8: only \S+ % of the pixels have the network's class"):
        export_tool.compare_int8(model, wrong, pictures)


def test_pictures_for_int8_are_spread_over_the_split_and_have_the_size_if_there_is_one():
    images = [np.full((4, 6, 3), value, dtype=np.uint8) for value in range(9)]
    data = [Sample(image, None, "") for image in images]
    found = list(export_tool.pictures(data, 3, (8, 5)))
    assert [(p.shape, p.dtype, p.unique().tolist()) for p in found] == [
        ((1, 3, 8, 5), torch.uint8, [value]) for value in (0, 4, 8)
    ]
    free = list(export_tool.pictures(data, 64, None))
    assert [p.shape for p in free] == [(1, 3, 4, 6)] * 9


def test_int8_needs_the_training_pictures_and_sizes_are_checked(tiny_checkpoint, tmp_path, capsys):
    for settings, message in (
        (["size=[48]"], "size=[48]: expected [height,width] of at least 9"),
        (["calibration=0"], "calibration=0: expected at least 1"),
        (["formats=[int8]", "data.root=/x"], "data.root=/x: Scenes has no files"),
    ):
        call(
            "export", f"checkpoint={tiny_checkpoint}", f"output={tmp_path / 'o'}", *settings, code=2
        )
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_an_opset_that_the_exporter_cannot_write_is_refused_and_leaves_no_file(model, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(InputError, match=r"^opset=99: the exporter cannot write it; set opset=20$"):
        programs.export_onnx(model, tmp_path / "model.onnx", opset=99, size=(32, 32))
    assert not list(tmp_path.iterdir())


def test_a_program_that_is_another_function_is_refused(model):
    @torch.no_grad()
    def wrong(image):
        return (model(torch.from_numpy(image)).logits + 1).numpy()

    with pytest.raises(UserError, match=r"at 32 x 32 a logit of the exported program differs by 1"):
        programs.compare(model, wrong, [(32, 32)])


def test_an_exported_folder_is_the_network_again_for_every_tool(model, exported, tmp_path):
    again = danet.load_model(exported)
    assert (again.classes, again.palette) == (model.classes, model.palette)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not again.training
    place, settings = shutil.copytree(exported, tmp_path / "copy"), ["device=cpu"]
    for checkpoint, output in ((place, "a"), (exported.parent / "last.pt", "b")):
        call("eval", f"checkpoint={checkpoint}", f"output={tmp_path / output}", *settings)
    ours, theirs = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "ab")
    assert ours["miou"] == theirs["miou"]
    settings += ["attention=false", "count=1", f"output={tmp_path / 'p'}"]
    call("visualize", f"checkpoint={place}", *settings)
    assert (tmp_path / "p" / "val_000000.png").exists()


def test_averaged_weights_are_what_is_exported(tiny_checkpoint, tmp_path):
    saved = checkpoint_format.load(tiny_checkpoint)
    average = {f"module.{k}": v.clone() for k, v in saved["model"].items()}
    average["module.head.classify.1.bias"] += 1
    checkpoint_format.save(tmp_path / "last.pt", {**saved, "ema": average})
    call("export", f"checkpoint={tmp_path / 'last.pt'}", "formats=[]", f"output={tmp_path / 'o'}")
    bias = danet.load_model(tmp_path / "o").head.classify[1].bias
    torch.testing.assert_close(bias.detach(), saved["model"]["head.classify.1.bias"] + 1)


def test_without_the_packages_of_onnx_the_rest_is_written_and_one_line_says_so(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    call("export", f"checkpoint={tiny_checkpoint}", f"output={tmp_path / 'o'}")
    assert (
        "model.onnx is left out: onnxscript is not installed: pip install"
        in capsys.readouterr().out
    )
    assert {p.name for p in (tmp_path / "o").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    for asked in ("formats=[onnx]", "demo=true"):
        call("export", f"checkpoint={tiny_checkpoint}", asked, code=2)
        assert "error: onnxscript is not installed" in capsys.readouterr().err


def test_no_path_of_this_machine_leaves_it(exported):
    plain = {"root": "/data/x", "a": ["~/y", r"C:\z", "data/x"], "n": 3}
    assert folder.without_paths(plain) == {"root": ".", "a": [".", ".", "data/x"], "n": 3}
    assert '"/' not in (exported / CONFIG).read_text()


def test_the_card_reports_scores_of_this_checkpoint_and_no_other(exported):
    text = (exported / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: danet\n")
    assert "| test, 5 images, Whole | 31.25 | - |" in text
    assert "| val, in training | 25.00 | 50.00 |" in text
    assert "- test, 5 images, Whole: whole images; data set: Scenes test, 5 samples" in text
    assert "| old, 5 images" not in text
    assert "| 0 | sky | `#56b4e9` | 87.50 |" in text
    assert "| 12 | bus | `#009e73` | - |" in text


def test_damaged_and_foreign_folders_are_refused(exported, tmp_path):
    place = shutil.copytree(exported, tmp_path / "place")
    weights, config = place / WEIGHTS, json.loads((place / CONFIG).read_text())
    config["config"]["model"]["head"]["_target_"] = "os.system"
    for spoil, message in (
        (lambda: (place / CONFIG).write_text(json.dumps(config)), "its config is refused: .*os.sy"),
        (weights.unlink, "place: damaged or incomplete"),
        (lambda: (place / CONFIG).write_text("{}"), "config.json is not of an exported network"),
    ):
        spoil()
        with pytest.raises(InputError, match=message):
            danet.load_model(place)


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """A folder in the place of the hub; calls must fit the real functions' signatures."""
    package, store = pytest.importorskip("huggingface_hub"), tmp_path / "hub"

    def upload_folder(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, store / repo_id)
        return f"https://hub/{repo_id}"

    def snapshot_download(repo_id, **_):
        if not (store / repo_id).is_dir():
            raise package.errors.HFValidationError(f"no {repo_id}")
        return str(store / repo_id)

    for owner, name, replacement in (
        (package.HfApi, "create_repo", None),
        (package.HfApi, "upload_folder", upload_folder),
        (package, "snapshot_download", snapshot_download),
    ):
        fake = mock.create_autospec(getattr(owner, name), side_effect=replacement)
        monkeypatch.setattr(owner, name, fake)
    return store


def test_a_network_goes_to_a_hub_and_comes_back(
    local_hub, tiny_checkpoint, model, tmp_path, capsys
):
    settings = ["formats=[]", f"output={tmp_path / 'o'}", "push=owner/name"]
    call("export", f"checkpoint={tiny_checkpoint}", *settings)
    assert "https://hub/owner/name" in capsys.readouterr().out
    assert (local_hub / "owner" / "name" / "README.md").exists()
    again, name = danet.load_model("hf://owner/name@main"), "head.classify.1.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    with pytest.raises(InputError, match="hf://owner/other: no owner/other"):
        fetch("hf://owner/other")
