"""Say what scripts/quickstart.sh made and what to type next.

    python scripts/quickstart_end.py RUN FOLDER [SETTING=VALUE ...]

FOLDER is where the user's shell is, the settings are those of the training. A small data set is
written in the layout of one's own pictures, so that the command for these works from the start.
"""

import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import cv2

from danet.config.build import checked_config, load_model, load_saved, make_dataset
from danet.prediction.predict import predict
from danet.visualization.attention import (
    attention_branches,
    choose_points,
    main_class,
    position_maps,
)

CUES = ("mill", "tower", "heath", "lawn")


def write_example(checkpoint: Path, folder: Path, count: int = 20) -> None:
    """Write training images, their masks of class indices, and the names of the classes."""
    config = checked_config(load_saved(str(checkpoint)), checkpoint)
    scenes = make_dataset(config, "train", training=False)
    for index in range(min(count, len(scenes))):
        image, mask, name = scenes[index]
        for kind, array in (("images", image[..., ::-1]), ("masks", mask)):  # OpenCV writes BGR
            path = folder / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), array)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in scenes.classes))


def describe_attention(checkpoint: Path, folder: Path) -> list[str]:
    """Return lines on the attention pictures, those first in which a pixel finds its cue."""
    config = checked_config(load_saved(str(checkpoint)), checkpoint)
    model, scenes, found = load_model(checkpoint), make_dataset(config, "test", training=False), []
    for path in sorted(folder.glob("*_attention.png")):
        image = scenes[int(path.stem.split("_")[1])].image
        prediction = predict(model, image)
        pairs = [scenes.classes.index(name) for name in ("bus", "tram", "kiosk", "booth")]
        points = choose_points(prediction, wanted=pairs)
        share, said = 0.0, ""
        if points and "position" in attention_branches(model):
            for point, weights in zip(points, position_maps(model, image, points), strict=True):
                most, of_all = main_class(weights, prediction)
                if scenes.classes[most] in CUES and of_all > share:
                    own = scenes.classes[prediction[point.y, point.x]]
                    share, said = of_all, f"  its {own} attends to the {scenes.classes[most]}"
        found.append((-share, f"{path}{said}"))
    lines = [
        f"{'' if i else 'what it attends to:':<22} {x}" for i, (_, x) in enumerate(sorted(found))
    ]
    if lines:
        lines.append(
            "One class of bus and tram, and one of kiosk and booth, looks for its cue on the left;"
        )
        lines.append("the other is recognised by its absence and may attend to anything.")
    return lines


def main() -> None:
    """Print scores, files and commands."""
    run, shell, settings = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    others = [s for s in settings if not s.startswith(("model/head=", "model.head."))]
    network = [s for s in settings if s.startswith("model")]
    best, example = run / "best.pt", run / "example"
    write_example(best, example)
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    print(f"\nmIoU on scenes the network has not seen: {100 * metrics['miou']:.1f}")
    print(f"the best checkpoint:   {best}  (step {metrics['step']})")
    print(f"its predictions:       {run / 'pictures' / 'contact_sheet.png'}")
    for line in describe_attention(best, run / "pictures"):
        print(line)
    here = Path.cwd()
    go = f"cd {shlex.quote(str(here))} && " if shell.resolve() != here.resolve() else ""
    place = [f"data.root={example}", f"data.classes={example}/classes.txt", "data.crop=[64,256]"]
    short = ["trainer.steps=100", f"init_from={best}", f"run.dir={run}_own"]
    own = shlex.join(["data=folder", *place, *short, *network])
    fcn = shlex.join(["model/head=fcn", f"run.dir={run}_fcn", *others])
    print(
        f"""
Next, each from the folder of this project:

{go}source .venv/bin/activate

# a page with scores, best and worst images, an attention viewer: {run}/pictures_test/report.html
python tools/visualize.py checkpoint={best} split=test report=true

# your own pictures: images/ and masks/ in a folder, and the names of the classes; here an example
python tools/train.py {own}

# the same network without attention, then both side by side
python tools/train.py {fcn}
python tools/compare.py {run} {run}_fcn
"""
    )


if __name__ == "__main__":
    main()
