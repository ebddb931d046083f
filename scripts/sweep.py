"""Search settings with Optuna: every trial is a training in a process of its own.

python scripts/sweep.py FOLDER TRIALS SETTING=VALUE ... KEY=SPACE ...

A SPACE is log(LOW,HIGH), uniform(LOW,HIGH), int(LOW,HIGH) or choice(A,B,...); everything else is
passed to each training, also run.processes=N for several processes. The study is stored in FOLDER,
so the same command again resumes it: finished trials count, interrupted ones are resumed.
Needs `pip install -e '.[sweep]'`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # trainings are started with the same Python
    sys.path.insert(0, str(ROOT))
    from danet.interpreter import require_packages

    require_packages(__file__)

TRAIN = ROOT / "tools" / "train.py"
DIVERGED = 3
"""Exit code of a training whose loss is not finite: a result, and a bad one."""

_SPACE = re.compile(r"(log|uniform|int|choice)\((.*)\)")


def suggest(trial: Any, key: str, space: str) -> str:
    """Draw a value of a setting for a trial, as text."""
    found = _SPACE.fullmatch(space)
    assert found is not None
    kind, values = found[1], [value.strip() for value in found[2].split(",")]
    if kind == "choice":
        return str(trial.suggest_categorical(key, values))
    if len(values) != 2:
        sys.exit(f"error: {key}={space}: expected {kind}(LOW,HIGH)")
    low, high = map(float, values)
    if kind == "int":
        return str(trial.suggest_int(key, int(low), int(high)))
    return str(trial.suggest_float(key, low, high, log=kind == "log"))


def best_miou(folder: Path) -> float:
    """Return the best mean IoU of a run's validations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(max(line["miou"] for line in lines if line["kind"] == "val"))


def train(folder: Path, settings: Sequence[str]) -> None:
    """Run one training, or resume it; raise CalledProcessError."""
    command = [sys.executable, str(TRAIN), f"run.dir={folder}", "resume=auto", *settings]
    subprocess.run(command, check=True)


def search(
    folder: Path,
    trials: int,
    arguments: Sequence[str],
    start: Callable[[Path, Sequence[str]], None] = train,
) -> Any:
    """Run trials up to the given number; return the study.

    Args:
        folder: Of the study; trial N is the run ``trial_N`` in it.
        trials: Total number, those of earlier calls included.
        arguments: Settings and spaces.
        start: Runs one training.
    """
    try:
        import optuna
    except ImportError:
        from danet.extras import how_to_install

        sys.exit(f"error: optuna is not installed: {how_to_install('sweep')}")
    spaces = dict(a.split("=", 1) for a in arguments if _SPACE.fullmatch(a.partition("=")[2]))
    fixed = [a for a in arguments if a.partition("=")[0] not in spaces]
    if not spaces:
        sys.exit("error: nothing to search: give a space, as in optimizer.lr='log(0.0005,0.02)'")
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="danet",
        storage=f"sqlite:///{folder.absolute() / 'study.db'}",
        direction="maximize",
        load_if_exists=True,
    )
    asked = sorted([*fixed, *(f"{key}={space}" for key, space in spaces.items())])
    before = study.user_attrs.get("settings", asked)
    if before != asked:
        changed = " ".join(sorted({*before} ^ {*asked}))
        sys.exit(f"error: {folder}: its trials had other settings ({changed}); name another folder")
    study.set_user_attr("settings", asked)
    # A later start must not draw what an earlier one has drawn.
    study.sampler = optuna.samplers.TPESampler(seed=1 + len(study.trials))
    states = optuna.trial.TrialState
    finished = (states.COMPLETE, states.PRUNED)
    taken = {_folder_of(t) for t in study.get_trials(states=(*finished, states.WAITING))}
    for cut_off in study.get_trials(states=(states.RUNNING, states.FAIL)):
        if cut_off.state == states.RUNNING:
            study.tell(cut_off.number, state=states.FAIL)
        if cut_off.params and _folder_of(cut_off) not in taken:
            taken.add(_folder_of(cut_off))
            study.enqueue_trial(cut_off.params, user_attrs={"folder": _folder_of(cut_off)})

    def objective(trial: Any) -> float:
        settings = [f"{key}={suggest(trial, key, space)}" for key, space in spaces.items()]
        run = folder / _folder_of(trial)
        print(f"trial {trial.number}: {' '.join(settings)}", flush=True)
        try:
            start(run, [*fixed, *settings])
        except subprocess.CalledProcessError as error:
            if error.returncode == DIVERGED:
                raise optuna.TrialPruned from error
            sys.exit(f"error: {run}: the training ended with code {error.returncode}")
        return best_miou(run)

    while len(study.get_trials(states=finished)) < trials:
        study.optimize(objective, n_trials=1)
    return study


def _folder_of(trial: Any) -> str:
    return str(trial.user_attrs.get("folder", f"trial_{trial.number:04d}"))


def main() -> None:
    """Search, and print the trials, the best first."""
    if len(sys.argv) < 4 or not sys.argv[2].isdigit():
        sys.exit(str(__doc__))
    folder = Path(sys.argv[1])
    study = search(folder, int(sys.argv[2]), sys.argv[3:])
    finished = [trial for trial in study.trials if trial.value is not None]
    for trial in sorted(finished, key=lambda trial: -trial.value):
        named = " ".join(f"{key}={value}" for key, value in trial.params.items())
        print(f"{100 * trial.value:.2f}  {folder / _folder_of(trial)}  {named}")


if __name__ == "__main__":
    main()
