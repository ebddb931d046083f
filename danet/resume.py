"""Going on with a run: which checkpoint, and with which config."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from danet.assemble import checked_config
from danet.engine import checkpoint, saver
from danet.engine.checkpoint import Checkpoint
from danet.errors import InputError

FREE = (
    "resume",
    "init_from",
    "dry_run",
    "device_memory",
    "run.dir",
    "run.name",
    "data.root",
    "data.dataset.root",
    "data.num_workers",
    "data.cache",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_pixels",
    "data.batch_size",
    "trainer.accumulate",
    "trainer.stop_at",
    "trainer.eval_every",
    "trainer.log_every",
    "trainer.save_every",
    "trainer.keep_last",
    "trainer.keep_best",
    "trainer.keep_every",
    "trainer.save_in_background",
    "trainer.device",
)
"""Keys that do not change what a step computes, and so may differ in a resumed run; the two that
make up the global batch only together with the number of processes."""


def settle(
    config: dict[str, Any], overrides: Iterable[str], *, world: int
) -> tuple[dict[str, Any], Checkpoint | None, list[str]]:
    """Settles on the config to train with and the checkpoint to go on from.

    With nothing but free keys on the command line the config is the checkpoint's, with those keys
    from the command line. With other settings the whole config must be the checkpoint's.

    Args:
        config: Checked, from the command line.
        overrides: The settings of the command line as typed.
        world: The number of processes.

    Returns:
        The config; the checkpoint, None for a fresh start; lines to tell the user.

    Raises:
        InputError: No such checkpoint, or settings that differ; each is named with both values.
    """
    if config["resume"] is None:
        return config, None, []
    path = Path(config["resume"])
    notes: list[str] = []
    if config["resume"] == "auto":
        if config["run"]["dir"] is None:
            raise InputError("resume=auto: say which run with run.dir=<folder>")
        folder = Path(config["run"]["dir"]).expanduser()
        if not saver.by_age(folder):
            return config, None, [f"resume=auto: nothing in {folder} yet, starting from step 0"]
        path, saved, notes = _newest_good(folder)
    else:
        saved = checkpoint.load(path, key="resume")
    stored = checked_config(saved, path)
    typed = {override.lstrip("+~").split("=")[0] for override in overrides}
    if typed <= set(FREE):
        settled = deepcopy(stored)
        settled["trainer"]["stop_at"] = None  # it stopped there; now it goes on
        for key in typed:
            _put(settled, key, _get(config, key))
        if "data.root" in typed and "root" in settled["data"]["dataset"]:
            settled["data"]["dataset"]["root"] = config["data"]["root"]
    else:
        different = differences(stored, config)
        if different:
            raise InputError(f"resume={path}: the run had other settings:\n" + "\n".join(different))
        settled = deepcopy(config)
    settled["resume"], settled["init_from"] = str(path), None
    if config["run"]["dir"] is None:
        settled["run"]["dir"] = str(path.parent)
    return settled, saved, notes + _compare_batches(saved, stored, settled, world)


def _newest_good(folder: Path) -> tuple[Path, Checkpoint, list[str]]:
    """Returns the newest checkpoint of a run that is whole, and what to say about newer ones.

    Raises:
        InputError: None is; a run never starts from zero over what is left of it.
    """
    damaged = []
    for path in saver.by_age(folder):
        try:
            saved = checkpoint.load(path, key="resume")
        except InputError as error:
            damaged.append(str(error))
            continue
        if damaged:
            damaged.append(
                f"resume=auto: going on from {path} instead, at step {saved['step']}; the steps "
                "after it are done again"
            )
        return path, saved, damaged
    raise InputError(
        "\n".join(damaged) + f"\nresume=auto: no checkpoint in {folder} is whole; to start anew "
        "give another run.dir"
    )


def _compare_batches(
    saved: Checkpoint, stored: Mapping[str, Any], config: Mapping[str, Any], world: int
) -> list[str]:
    """Refuses another global batch; says what another number of processes means."""

    def describe(of: Mapping[str, Any], processes: int) -> tuple[int, str]:
        size, times = of["data"]["batch_size"], of["trainer"]["accumulate"]
        text = f"data.batch_size={size} x trainer.accumulate={times} x {processes} process(es)"
        return size * times * processes, text

    old, old_text = describe(stored, saved["processes"])
    new, new_text = describe(config, world)
    if old != new:
        raise InputError(
            f"resume: the run had {old} images a step ({old_text}), now it would have {new} "
            f"({new_text}); choose the two settings so that the product is the same"
        )
    if saved["processes"] == world:
        return []
    return [
        f"resume: {world} process(es) instead of {saved['processes']}: every step has the same "
        "samples as before, but sums are added in another order, so weights are not bit-equal"
    ]


def differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Returns a line for every key that differs and is not free."""
    old, new = _flat(stored), _flat(config)
    return [
        f"  {key}: {old.get(key, 'not set')} in the checkpoint, {new.get(key, 'not set')} now"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE and old.get(key) != new.get(key)
    ]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix.rstrip("."): node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{prefix}{name}.")
    return flat


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config[part]
    if value is not None or last in config:
        config[last] = value
