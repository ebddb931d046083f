"""A web page that runs an exported network in the browser with onnxruntime-web.

It needs a plain server of files (``python -m http.server``), and asks no other for anything.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from danet.checkpoint.format import Checkpoint
from danet.config.build import make_dataset
from danet.config.schema import TrainConfig
from danet.datasets.labels import is_background
from danet.errors import InputError, first_line
from danet.export.programs import SMALLEST
from danet.filesystem import atomic_write, write_file
from danet.types import IGNORE
from danet.visualization.attention import spread
from danet.visualization.overlay import Legend, save_image
from danet.visualization.report import render

RUNTIME = yaml.safe_load(Path(__file__).with_name("runtime.yaml").read_text("utf-8"))
NETWORK = "network.onnx"


def find_runtime(source: str | None) -> dict[str, bytes]:
    """Return the files of onnxruntime-web: of a folder, of its .tgz, or of the one npm fetches.

    Raises InputError if they are not there, or not those that were tested.
    """
    package = RUNTIME["package"]
    at = f"demo_runtime={source}" if source else f"demo=true needs {package}"
    how = f"download {RUNTIME['address']} (as npm pack {package} does) and set demo_runtime=FILE"
    with tempfile.TemporaryDirectory() as place:
        try:
            path = Path(source).expanduser() if source else _pack(place, package)
            found = {name: _content(path, name) for name in RUNTIME["files"]}
        except Exception as error:  # of a damaged archive tarfile raises anything
            raise InputError(f"{at}: {first_line(error)}; {how}") from error
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != RUNTIME["files"][name]:
            raise InputError(f"{at}: {name} is not that of {package}; {how}")
    return found


def _pack(folder: str, package: str) -> Path:
    """Return the .tgz that npm puts into a folder, from its cache if it is there."""
    npm = shutil.which("npm") or "npm"  # npm.cmd on Windows
    command = [npm, "pack", package, "--prefer-offline", "--fetch-retries=0", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr)
    return next(Path(folder).glob("*.tgz"))


def _content(path: Path, name: str) -> bytes:
    """Return a file of the package, of its folder ``dist``, or of its .tgz."""
    if path.is_dir():
        file = path / ("dist" if (path / "dist").is_dir() else "") / name
        if not file.is_file():
            raise OSError(f"there is no {name} in {file.parent}")
        return file.read_bytes()
    if not path.is_file() or not tarfile.is_tarfile(path):
        raise OSError("not a .tgz" if path.is_file() else "there is no such file or folder")
    with tarfile.open(path) as archive:
        content = archive.extractfile(f"package/dist/{name}")
        return content.read() if content else b""


def write(
    folder: Path, saved: Checkpoint, config: TrainConfig, runtime: Mapping[str, bytes]
) -> Path:
    """Write the page of the ``model.onnx`` beside ``folder`` and of its checkpoint; return it."""
    import onnxruntime  # an optional dependency

    folder.mkdir(parents=True, exist_ok=True)
    names = ("page.css", "demo.css", "demo.js", "demo_worker.js", "viewer.js")
    files: dict[str, str | bytes] = {**runtime, **{name: render(name) for name in names}}
    for name in ("LICENSE", "ThirdPartyNotices.txt"):  # which the package lacks
        text = (Path(onnxruntime.__file__).parent / name).read_bytes()
        files[f"onnxruntime_{Path(name).stem}.txt"] = text
    examples = {}
    if config.data.dataset["_target_"] == "danet.datasets.scenes.Scenes":  # drawn by us
        dataset = make_dataset(config, "val", training=False)
        examples = {f"example_{i}.png": dataset[i].image for i in spread(len(dataset), 3)}
    for name, image in examples.items():
        save_image(folder / name, image)
    is_wide = len(saved["classes"]) > IGNORE
    # Of other variants the energies are not products of what the two convolutions give.
    head = config.model["head"]
    is_plain = head.get("similarity", "dot") == "dot" and head.get("scale", "none") == "none"
    program = folder.parent / "model.onnx"
    files["index.html"] = render(
        "demo.html",
        saved=saved,
        examples=list(examples),
        has_attention=give_classes(
            program, folder / NETWORK, is_wide=is_wide, with_attention=is_plain
        ),
        untinted=[i for i, name in enumerate(saved["classes"]) if is_background(name)],
        smallest=SMALLEST,
        network=NETWORK,
        runtime=RUNTIME,
        opacity=Legend((), ()).opacity,
    )
    for name, content in files.items():
        write_file(folder / name, content)
    return folder


def give_classes(program: Path, path: Path, *, is_wide: bool, with_attention: bool = True) -> bool:
    """Copy an ONNX file, with ``classes``, (B, H, W), as its output in place of logits.

    They are uint8, or uint16 if ``is_wide``. If it has position attention, its ``queries`` and
    ``keys``, float32 (B, D, h, w), are given as well. Return whether they are.
    """
    import onnx  # an optional dependency
    from onnx import TensorProto, helper

    copy = onnx.load(program)
    argmax = helper.make_node("ArgMax", ["logits"], ["index"], axis=1, keepdims=0)
    kind = TensorProto.UINT16 if is_wide else TensorProto.UINT8
    added = [argmax, helper.make_node("Cast", ["index"], ["classes"], to=kind)]
    outputs = [helper.make_tensor_value_info("classes", kind, [None] * 3)]
    layers = (("queries", "query"), ("keys", "key")) if with_attention else ()
    for name, layer in layers:
        weight = f"network.head.position.attention.{layer}.weight"
        for node in copy.graph.node:
            if weight in node.input:
                added.append(helper.make_node("Identity", node.output, [name]))
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4))
    copy.graph.node.extend(added)
    del copy.graph.output[:]
    copy.graph.output.extend(outputs)
    with atomic_write(path) as temporary:
        onnx.save(copy, temporary)
    return len(outputs) > 1
