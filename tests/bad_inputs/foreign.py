"""A file of somebody else: fixtures with one that is whole, and every way to use one."""

import functools
import hashlib
import json
import sys

import pytest
import torch
from test_config import compose

import danet
from danet.checkpoint import exported, reading
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.weights import initialise
from danet.config import overlay, resume
from danet.config.build import make, make_dataset, make_model, untrained
from danet.config.validate import check, check_plain
from danet.engine.optimizer import state_of
from danet.errors import UserError
from danet.export import folder

SECRET = "s3cr3t-of-the-reader"
SETTINGS = [
    *("data=scenes", "data.size=[48,96]", "data.lengths={train: 12, val: 5, test: 5}"),
    *("data.batch_size=2", "data.num_workers=0", "data.cue_radius=2"),
    *("model.backbone.width=2", "model.head.reduction=1"),
    *("trainer.precision=float32", "trainer.device=cpu", "trainer.steps=6"),
]
WAYS = ("checkpoint", "folder", "resume", "init_from")

HEARD: list[str] = []
EARS = [False]
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.")


def _listen(event, arguments):
    if EARS[0] and event.startswith(_FORBIDDEN):
        HEARD.append(f"{event} {arguments}")
    elif EARS[0] and event == "open" and "secret" in str(arguments[0]):
        HEARD.append(f"open {arguments[0]}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder with a secret, a module whose functions are heard, and a run's file."""
    sys.addaudithook(_listen)
    root = tmp_path_factory.mktemp("foreign")
    (root / "secret.txt").write_text(f"{SECRET}\n")
    (root / "canary.py").write_text(
        "from foreign import HEARD\n\n\n"
        "def fire(*arguments, **values):\n    HEARD.append('canary.fire')\n\n\n"
        "class Fire:\n    def __init__(self, *arguments, **values):\n"
        "        HEARD.append('canary.Fire')\n"
    )
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


@pytest.fixture(scope="module")
def saved():
    """Returns the content of a run's checkpoint."""
    return content(SETTINGS)


def content(settings):
    """Returns the checkpoint of step 3 of a run with some settings."""
    config = check(compose(*settings))
    torch.manual_seed(3)
    model = make_model(config)
    for attention in (model.head.position.attention, model.head.channel.attention):
        torch.nn.init.constant_(attention.gamma, 0.5)  # as after a training: no identity
    scenes = make_dataset(config, "val", training=False)
    optimizer = make(config.optimizer, "optimizer")(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "format": checkpoint_format.FORMAT,
        "version": "0.2",
        "config": config.plain,
        "classes": list(scenes.classes),
        "palette": [list(color) for color in scenes.palette],
        "model": model.state_dict(),
        "ema": None,
        "optimizer": state_of(optimizer, model),
        "scaler": {},
        "processes": 1,
        "step": 3,
        "evaluated_at": 3,
        "best_score": None,
        "scores": None,
    }


@functools.cache
def network():
    return make_model(check(compose(*SETTINGS)))


def use(way, saved, root, is_file):
    """Uses the content of a file or a folder, as a user of it would.

    With ``is_file`` it is written and read, which takes most of the time.
    """
    path = root / "foreign.pt"
    if way == "folder":
        target = root / "exported"
        if not (target / exported.WEIGHTS).exists():
            folder.save(target, saved, saved["model"])
        facts = json.loads((target / exported.CONFIG).read_text())
        (target / exported.CONFIG).write_text(json.dumps({**facts, "config": saved["config"]}))
        danet.load_model(target)
        return
    saved = saved if way == "resume" else {**saved, "optimizer": None}
    with pytest.MonkeyPatch.context() as patch:
        if is_file:
            torch.save(saved, path)
            seal = hashlib.sha256(path.read_bytes()).digest()
            with open(path, "ab") as file:
                file.write(reading.MARK + seal)
        else:
            patch.setattr(reading, "read", lambda *_, **__: (saved, True))
        if way == "checkpoint":
            danet.load_model(path)
        elif way == "init_from":
            assert "of the backbone all" in initialise(network(), path)[0]
        else:
            _, found, _ = overlay.find(str(path), None)
            stored = overlay.stored_settings(found, path)
            typed = check_plain({**stored, "resume": str(path)})
            settled, found, _ = resume.resolve(typed, [f"resume={path}"], world_size=1)
            groups = ("loss", "optimizer", "schedule", "evaluation")
            parts = {k: make(getattr(settled, k), k) for k in groups}
            resume.refuse_other_states(found, untrained(settled), parts["optimizer"], str(path))


def outcome(way, content, root, is_file=True):
    """Returns None for a file that was used, else the error that a user would read."""
    HEARD.clear()
    EARS[0] = True
    try:
        use(way, content, root, is_file)
    except UserError as error:
        return str(error)
    finally:
        EARS[0] = False
    return None
