"""Every command and every piece of Python in README, CONTRIBUTING and docs does what it says.

Commands of evaluation, pictures, predictions, export and comparing run in this process on a small
network; those that train, or need data sets and several machines, are composed and checked as far
as the start. A command that nothing here knows fails: it is to be taught, or to be left out.
"""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import count

import cv2
import numpy as np
import originals
import pytest
import test_annotations
import test_streams
import torch
from conftest import ROOT, TINY, call, save_picture
from test_config import compose

from danet.config.build import checked_config, load_saved, make_dataset
from danet.config.validate import check
from danet.export.programs import export_onnx, export_torch
from danet.tools import compare
from danet.types import SegmentationOutput

sys.path.insert(0, str(ROOT / "scripts"))

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTERS = ("python", "torchrun", "bash", "sbatch", "make", "tensorboard", "find", "pip", "mkdocs")
"""First words of what is a command; other lines of a block are what it prints, or a tree."""


def blocks(path):
    """Yields the language and the lines of each fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.M | re.S)
    return [(language, body.splitlines()) for language, body in found]


def commands(path):
    """Yields the commands of a document, each as words, with its variables put in."""
    for language, body in blocks(path):
        if language not in ("", "bash"):
            continue
        variables = {}
        text = re.sub(r"\\\n\s*", "", "\n".join(body))
        for line in text.splitlines():
            if assigned := re.match(r'([A-Z])="(.*)"$', line):
                variables[f"${assigned[1]}"] = assigned[2]
            for name, value in variables.items():
                line = line.replace(name, value)
            line = re.sub(r"^((?:[A-Z_]+=\S+ )+)(?=\w)", "", line).removeprefix(".venv/bin/")
            if line.split(" ")[0] in STARTERS:
                yield line


def everything():
    """Returns each command once, with the document that has it first."""
    found = {}
    for path in DOCUMENTS:
        for line in commands(path):
            named = pytest.param(line, id=f"{path.stem}:{line[:70]}")
            found.setdefault(tuple(words_of(line)), named)
    return found.values()


def words_of(line):
    """Splits a command; comments, prose behind two blanks and placeholders are left out."""
    line = re.split(r"\s+#|\s{2,}(?=\S+ \S)", line)[0]
    optional = re.sub(r"\[(\w+=[\w.]+)\]", r"\1", line)
    words = shlex.split(optional)
    return [w for w in words if w not in ("...", "SETTING=VALUE", "[SETTING=VALUE")]


@pytest.fixture(scope="module")
def home(tiny_checkpoint, tmp_path_factory):
    """A folder in which the names that documents use exist."""
    place = tmp_path_factory.mktemp("home")
    config = checked_config(load_saved(tiny_checkpoint), tiny_checkpoint)
    scenes = make_dataset(config, "val", training=False)
    for run in ("a", "b", "c", "x", "y", "cats", "camvid_quick/time", "quickstart/time"):
        folder = place / "runs" / run
        folder.mkdir(parents=True)
        for name in ("last.pt", "best.pt"):
            shutil.copy(tiny_checkpoint, folder / name)
        changed = {**config.plain, "seed": len(run)}
        (folder / "config.yaml").write_text(json.dumps(changed))
        lines = [{"step": 6, "kind": "val", "miou": 0.25, "pixel_accuracy": 0.5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    pictures = place / "pictures"
    for number in range(20):
        image, mask, _ = scenes.read(number % 5)
        image = np.roll(image, number, axis=1)  # a picture that comes twice would be reported
        save_picture(pictures / "images" / f"{number}.png", image)
        save_picture(pictures / "masks" / f"{number}.png", (mask % 3).astype(np.uint8))
    for name in ("pictures/sub/street.jpg", "pictures/street.png", "street.jpg", "a.jpg", "b.jpg"):
        save_picture(place / name, image)
    size = (image.shape[1], image.shape[0])
    video = cv2.VideoWriter(str(place / "drive.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, size)
    for _ in range(2):
        video.write(image)
    video.release()
    return place


def located(word, home):
    """Puts real paths in the place of those that documents use."""
    pictures = str(home / "pictures")
    for said, meant in (
        (r"/data/pictures|~/pictures|\$HOME/pictures", pictures),
        (r"\$HOME/more_pictures", f"{pictures}/sub"),
        (r"images=FOLDER", f"images={pictures}/sub"),
        (r"/data/drive.mp4|(?<==)drive.mp4", str(home / "drive.mp4")),
        (r"checkpoint=PATH", "checkpoint=runs/x/best.pt"),
        (r"<time>|2026-01-31_12-00-00", "time"),
        (r"submission=DIR", "submission=to_the_server"),
        (r"<camvid>|/data/\w+|/elsewhere|(?<=root=)DIR|<folder>", str(home)),
    ):
        word = re.sub(said, meant, word)
    return word


def first_of_sweep(word):
    key, _, value = word.partition("=")
    is_plain = value and value[0] not in "[{'\"(" and "," in value
    return f"{key}={value.split(',')[0]}" if is_plain else word


def check_training(words, home):
    if "--help" in words or "--cfg" in words:
        call("train", *words)
        return
    if "--config-dir" in words:
        words = [w for w in words if w.startswith(("run.", "resume"))]
    settings = [first_of_sweep(word) for word in words if word not in ("-m", "--multirun")]
    if "data.root=EXPORT" in settings and not (home / "EXPORT").exists():
        test_annotations.write(home / "EXPORT")
    if any(word == "data.classes=names.txt" for word in settings):
        (home / "names.txt").write_text("background\ncat\n")
        settings = [w.replace("names.txt", str(home / "names.txt"), 1) for w in settings]
    composed = compose(*settings)
    if composed.dry_run:
        composed.data.root = str(home)
    check(composed)


def eval_tool(words, home):
    # Scenes have no server; that this is reported, and in one line, is what can be seen here.
    is_sent = any(word.startswith("submission=") for word in words)
    words = [word for word in words if is_sent or not word.startswith("data.root=")]
    # All of them need photographs and take long; tests/test_robustness.py has them.
    words = [re.sub(r"(?<=^corruptions=).*", "[contrast]", word) for word in words]
    call("eval", *words, "device=cpu", code=2 if is_sent else 0)


def visualize_tool(words, home):
    words = [re.sub(r"points=.*", "points=[[12,40],[30,5]]", word) for word in words]
    call("visualize", *words, "device=cpu", *["count=1"] * (not any("count" in w for w in words)))


def check_tool(words, home):
    if not any(word.startswith("data=folder") for word in words):
        assert "data" in compose(*words, name="check_data")
        return
    classes = "data.classes=[background,cat,dog]"
    call("check_data", *(classes if w.startswith("data.classes") else w for w in words))


def convert_tool(words, home):
    values = dict(word.split("=", 1) for word in words)
    state = originals.random_state(values["source"], 50)
    torch.save({"state_dict": state}, home / values["input"])
    call("convert", *words)
    assert (home / values["output"]).is_file()


def predict_tool(words, home):
    with pytest.MonkeyPatch.context() as patch:
        if any(re.match(r"images=(\d+$|\w+://)", word) for word in words):  # no camera is here
            test_streams.play(patch)
            words = [*(word for word in words if not word.startswith("frames=")), "frames=3"]
        call("predict", *words, f"output={home / f'out_{next(NUMBERS)}'}", "device=cpu")


NUMBERS = count()
TOOLS = {
    "train": check_training,
    "eval": eval_tool,
    "visualize": visualize_tool,
    "predict": predict_tool,
    "export": lambda words, home: call("export", *words),
    "compare": lambda words, home: compare.main(words),
    "check_data": check_tool,
    "convert": convert_tool,
}


def sweep_script(words, home, monkeypatch):
    import sweep

    started = []

    def start(folder, settings):
        started.append(settings)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"kind": "val", "miou": 0.5}\n')

    monkeypatch.setattr(sweep.search, "__defaults__", (start,))
    monkeypatch.setattr("sys.argv", ["sweep.py", words[0], "2", *words[2:]])
    sweep.main()
    for settings in started:
        check_training(settings, home)


def python_command(words, home, monkeypatch):
    """Runs ``python ...``."""
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words[2:] if not word.startswith("-")]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
        return
    if words[:2] == ["-m", "http.server"]:
        assert words[2] == "-d"
        return
    folder, _, file = words[0].partition("/")
    name = file.removesuffix(".py")
    assert (ROOT / words[0]).is_file(), words[0]
    if folder == "tools":
        assert name in TOOLS, f"{words[0]}: teach tests/test_docs.py how it is run"
        TOOLS[name](words[1:], home)
    elif name == "prepare":
        import prepare

        if not any(word.startswith("archive=") for word in words):
            with pytest.raises(SystemExit, match="0"):
                prepare.main(words[1:])
    elif name == "sweep":
        sweep_script(words[1:], home, monkeypatch)
    else:
        compile((ROOT / words[0]).read_text(), words[0], "exec")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer")
@pytest.mark.parametrize("line", everything())
def test_a_command_of_the_documents_works(line, home, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(home)
    if export := "tools/export.py" in line:
        # test_export.py writes programs; here the command line is what is tried.
        monkeypatch.setattr("danet.tools.export.write_program", lambda *_: [])
        for name, result in (("find_runtime", {}), ("write", "demo")):  # test_demo.py has the page
            monkeypatch.setattr(f"danet.export.demo.{name}", lambda *_, result=result: result)
    assert export == ("export.py" in line)
    if line.startswith("ffmpeg"):
        line = line.split(" | ")[1]
        pictures = b"".join(path.read_bytes() for path in (home / "pictures").rglob("*.png"))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(pictures))))
    if line.startswith("find"):
        listed, line = line.split(" | ")
        assert shlex.split(listed)[0] == "find"
        names = "\n".join(map(str, (home / "pictures" / "images").iterdir()))
        monkeypatch.setattr("sys.stdin", io.StringIO(names))
    words = [located(word, home) for word in words_of(line)]
    program, *words = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words)
        program, words = "python", [options.training_script, *options.training_script_args]
    if program == "python":
        python_command(words, home, monkeypatch)
    elif program in ("bash", "sbatch"):
        subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True)
    elif program == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), words[0]], check=True, capture_output=True)
    elif program == "mkdocs":
        assert (ROOT / "mkdocs.yml").is_file()
    elif program == "tensorboard":
        assert words[0] == "--logdir"
    else:
        raise AssertionError(f"{line}: teach tests/test_docs.py how it is run")


class Program(torch.nn.Module):
    """A network of one convolution, to be exported."""

    def __init__(self):
        super().__init__()
        self.classify = torch.nn.Conv2d(3, 16, 1)

    def example(self, *size):
        return torch.zeros(size[0], 3, *size[1:], dtype=torch.uint8)

    def forward(self, image):
        return SegmentationOutput(self.classify(image.float()), {})


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if any(language == "python" for language, _ in blocks(path))],
    ids=lambda path: path.name,
)
def test_the_python_of_a_document_runs(path, home, monkeypatch):
    monkeypatch.chdir(home)
    image = torch.randint(0, 256, (1, 3, 48, 96), dtype=torch.uint8)
    names = {"image": image, "array": image[0].permute(1, 2, 0).numpy()}
    if path.name == "using.md":
        pytest.importorskip("openvino")
        names["image"] = image.numpy()
        export_onnx(Program(), home / "model.onnx", size=(48, 96))
        export_torch(Program(), home / "model.pt2", size=(48, 96))
    for language, body in blocks(path):
        if language == "python":
            text = "\n".join(body).replace("<time>", "time")
            exec(compile(text, f"{path.name}", "exec"), names)


def test_the_readmes_have_the_same_commands_pictures_numbers_and_links():
    texts = [path.read_text() for path in READMES]
    english, chinese = (
        [
            [re.split(r"\s*#", line)[0] for _, body in blocks(path) for line in body],
            re.findall(r"`([a-z_/]+[.=][^`]*)`", text),
            sorted(set(re.findall(r"(?<![\w.-])\d+\.\d+(?!\.?\w)", text, flags=re.ASCII))),
            re.findall(r"\]\((?!README)([^)]+)\)", text),
        ]
        for path, text in zip(READMES, texts, strict=True)
    )
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours == theirs
        assert len(ours) > 5
    assert texts[0].startswith("English | [简体中文](README.zh-CN.md)\n")
    assert texts[1].startswith("[English](README.md) | 简体中文\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{path.name}: {target}"


def test_settings_and_extras_named_in_the_documents_exist():
    """A key like ``trainer.x=`` in running text is one of the config."""
    setup, composed = (ROOT / "setup.py").read_text(), compose(*TINY)
    extras = set(re.findall(r'^        "(\w+)": ', setup, flags=re.M))
    for path in DOCUMENTS:
        text = path.read_text()
        for group, key in re.findall(r"`(trainer|run)\.(\w+)[=`]", text):
            assert key in composed[group], f"{path.name}: {group}.{key}"
        assert set(re.findall(r"danet\[(\w+)\]", text)) <= extras, path.name
