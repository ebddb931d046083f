"""A folder with a page that runs an exported network in the browser of whoever opens it.

The network is computed there by onnxruntime-web, whose files are put beside the page. A plain
server of files is enough (``python -m http.server``), and the page asks no other for anything.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import nn

from danet.checkpoint.format import Checkpoint
from danet.config.build import make_dataset
from danet.config.schema import TrainConfig
from danet.errors import InputError, first_line
from danet.export.programs import SMALLEST
from danet.filesystem import atomic_write, write_file
from danet.visualization.attention import attention_branches, spread
from danet.visualization.overlay import Legend, save_image
from danet.visualization.report import render

PACKAGE = "onnxruntime-web@1.30.0"
RUNTIME = {
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
}
"""The files of the package that the page needs, with their SHA-256."""
WASM, NETWORK = "ort-wasm-simd-threaded.wasm", "network.onnx"
HOW = (
    "download https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz "
    f"(as `npm pack {PACKAGE}` does) and set demo_runtime=FILE"
)
PAGE = ("page.css", "demo.css", "demo.js", "demo_worker.js", "viewer.js")
"""Templates that are files beside the page, as they are."""
PIXELS = 2**18
"""Of a picture that the page does not make smaller; more if the crops of the training had more."""
LOGITS = 2**26
"""The most for a picture: 256 MiB, and a browser may hold no more than a few times as much."""
EXAMPLES = 3


def find_runtime(source: str | None, folder: Path) -> dict[str, bytes]:
    """Return the files of onnxruntime-web by name.

    They are read from ``source``, a folder or the package's .tgz; without one from the page's own
    ``folder``, where an earlier export left them, else from the package that ``npm pack`` fetches.

    Raises:
        InputError: There are none, or they are not those of the tested version.
    """
    if source:
        return _read(Path(source).expanduser())
    with suppress(InputError):
        return _read(folder)
    with tempfile.TemporaryDirectory() as place:
        return _read(_pack(Path(place)))


def _read(path: Path) -> dict[str, bytes]:
    """Return the files of RUNTIME of a folder (the package or its ``dist``) or of a .tgz."""
    place = path / "dist" if (path / "dist").is_dir() else path
    try:
        if path.is_dir():
            found = {name: (place / name).read_bytes() for name in RUNTIME}
        else:
            with tarfile.open(path) as archive:
                files = {name: archive.extractfile(f"package/dist/{name}") for name in RUNTIME}
                found = {name: file.read() if file else b"" for name, file in files.items()}
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"demo_runtime={path}: {first_line(error)}; {HOW}") from error
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != RUNTIME[name]:
            raise InputError(f"demo_runtime={path}: {name} is not that of {PACKAGE}; {HOW}")
    return found


def _pack(folder: Path) -> Path:
    """Return the .tgz that npm puts into a folder, from its cache if it is there."""
    npm = shutil.which("npm")
    if not npm:
        raise InputError(f"demo=true needs {PACKAGE}, and there is no npm to fetch it: {HOW}")
    command = [npm, "pack", PACKAGE, "--prefer-offline", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = next(folder.glob("*.tgz"), None)
    if done.returncode or not found:
        reason = first_line(OSError(done.stderr))
        raise InputError(f"demo=true: npm cannot fetch {PACKAGE} ({reason}): {HOW}")
    return found


def write(
    folder: Path,
    program: Path,
    saved: Checkpoint,
    config: TrainConfig,
    *,
    model: nn.Module,
    runtime: Mapping[str, bytes],
) -> None:
    """Write the page and all it needs into a folder.

    ``program`` is the ``model.onnx`` of ``export_onnx``, ``saved``, ``config`` and ``model`` are
    those of its checkpoint, ``runtime`` comes from ``find_runtime``.
    """
    import onnxruntime  # an optional dependency

    folder.mkdir(parents=True, exist_ok=True)
    has_attention = "position" in attention_branches(model)
    give_classes(program, folder / NETWORK, attention=has_attention)
    files: dict[str, str | bytes] = {**runtime, **{name: render(name) for name in PAGE}}
    for name in ("LICENSE", "ThirdPartyNotices.txt"):  # the package of npm has neither
        text = (Path(onnxruntime.__file__).parent / name).read_text("utf-8")
        files[f"onnxruntime_{Path(name).stem}.txt"] = text
    examples = _examples(folder, config)
    crop, classes = config.data.crop or (0, 0), saved["classes"]
    most = max(PIXELS, crop[0] * crop[1])
    loaded = [WASM, NETWORK]
    facts = {
        "classes": classes,
        "palette": saved["palette"],
        "pictures": [],
        "untinted": [i for i, name in enumerate(classes) if name.lower() == "background"],
        "pixels": min(most, LOGITS // len(classes)),
        "smallest": SMALLEST,
        "files": loaded,
        "bytes": len(runtime[WASM]) + (folder / NETWORK).stat().st_size,
    }
    files["index.html"] = render(
        "demo.html",
        saved=saved,
        num_weights=sum(p.numel() for p in model.parameters()),
        examples=examples,
        has_attention=has_attention,
        opacity=Legend((), ()).opacity,
        package=PACKAGE,
        facts=facts,
    )
    for name, content in files.items():
        write_file(folder / name, content)


def _examples(folder: Path, config: TrainConfig) -> list[str]:
    """Write validation pictures that this project draws, which all may pass on; return names."""
    if config.data.dataset["_target_"] != "danet.datasets.scenes.Scenes":
        return []
    dataset = make_dataset(config, "val", training=False)
    names = []
    for index in spread(len(dataset), EXAMPLES):
        names.append(f"example_{index}.png")
        save_image(folder / names[-1], dataset[index].image)
    return names


def give_classes(program: Path, path: Path, *, attention: bool) -> None:
    """Copy an ONNX file, with other outputs than its logits.

    They are ``classes``, uint8 (B, H, W), and with ``attention`` ``queries`` and ``keys`` of the
    position attention, float32 (B, D, h, w), whose weights are softmax_j(query_i . key_j).
    """
    import onnx  # an optional dependency
    from onnx import TensorProto, helper

    copy = onnx.load(program)
    graph = copy.graph
    added = [
        helper.make_node("ArgMax", ["logits"], ["index"], axis=1, keepdims=0),
        helper.make_node("Cast", ["index"], ["classes"], to=TensorProto.UINT8),
    ]
    size = ["batch", "height", "width"]
    outputs = [helper.make_tensor_value_info("classes", TensorProto.UINT8, size)]
    for name, layer in (("queries", "query"), ("keys", "key")) if attention else ():
        weight = f"network.head.position.attention.{layer}.weight"
        (found,) = (node.output[0] for node in graph.node if weight in node.input)
        added.append(helper.make_node("Identity", [found], [name]))
        shape = ["batch", None, "rows", "columns"]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    graph.node.extend(added)
    del graph.output[:]
    graph.output.extend(outputs)
    with atomic_write(path) as temporary:
        onnx.save(copy, temporary)
