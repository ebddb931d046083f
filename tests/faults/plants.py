"""Faults to plant in a process before a tool runs in it. Each replaces a function of the product.

A ``place`` is the dotted name of a function or of a value.
"""

import functools
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace


def set_value(place, value):
    """Gives a name of a module another value."""
    owner, _, name = place.rpartition(".")
    setattr(resolve_name(owner), name, value)


def rest(seconds):
    """Sleeps in short pieces.

    Python handles a signal that comes between the call of a sleep and the start of it, while the
    call waits to release the GIL, only when that sleep has ended.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


def hold(place=None, path=None, seconds=60.0):
    """Says that a function is reached, and takes its time there; without one, before the tool."""

    def wait():
        if path is not None:
            Path(path).touch()
        rest(seconds)

    def slow(*arguments, **values):
        wait()
        return original(*arguments, **values)

    if place is None:
        wait()
    else:
        original = resolve_name(place)
        set_value(place, slow)


def _around_step(change):
    """Put ``change(update, train_step, group, step)`` in the place of the update of a step."""
    from danet.engine.train_step import TrainStep

    update = TrainStep.__call__

    def changed(self, group, step):
        return change(functools.partial(update, self), self, group, step)

    TrainStep.__call__ = changed


def _after_step(step, action):
    """Call ``action()`` when the updates of a step are done."""

    def change(update, _, group, now):
        terms = update(group, now)
        if now + 1 == step:
            action()
        return terms

    _around_step(change)


def call(place, arguments, step=None):
    """Calls a function once, before the tool starts or after a step."""
    if step is None:
        resolve_name(place)(*arguments)
    else:
        _after_step(step, lambda: resolve_name(place)(*arguments))


def signal_after(step, name="SIGKILL", times=1, pause=0.0, once=None):
    """Sends this process a signal; SIGKILL is that of the system's out-of-memory killer.

    With a file ``once`` it does so only where that is not there yet, and makes it.
    """

    def action():
        if once is None or not Path(once).exists():
            if once is not None:
                Path(once).touch()
            for _ in range(times):
                os.kill(os.getpid(), signal.Signals[name])
                rest(pause)

    _after_step(step, action)


def hold_save(path, seconds, step):
    """Says that it is here when half of a checkpoint is written, and goes on later."""
    from danet import filesystem

    def slow(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".tmp") and f"step_{step:09d}" in name:
            Path(path).touch()
            rest(seconds)
        os.fsync(handle)

    filesystem.os = SimpleNamespace(**{**vars(os), "fsync": slow})


def die_before_rename(step):
    """Ends the process when the temporary file is whole and not yet renamed."""
    replace = Path.replace

    def dying(self, target):
        if Path(target).name == f"step_{step:09d}.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = dying


def record(folder, means_after=None):
    """Leaves what this process trained on (a line a step) and the step at which it ended.

    And the running means of its network after a step and at the end, if a step is given.
    """
    import torch

    from danet.engine.trainer import Trainer

    folder, rank = Path(folder), os.environ.get("RANK", "0")
    fit = Trainer.fit

    def leave(model, moment):
        means = {k: v.clone() for k, v in model.named_buffers() if k.endswith("running_mean")}
        torch.save(means, folder / f"means-{moment}-{rank}.pt")

    def change(update, train_step, group, step):
        terms = update(group, step)
        names = [name for batch in group for name in batch.name]
        sums = [int(image.sum()) for batch in group for image in batch.image]
        with open(folder / f"samples-{rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "names": names, "sums": sums}) + "\n")
        if step + 1 == means_after:
            leave(train_step.model, "training")
        return terms

    def recorded_fit(self, batches):
        try:
            fit(self, batches)
        finally:
            (folder / f"ended-{rank}").write_text(str(self.step))
        if means_after:
            leave(self.train_step.model, "end")

    _around_step(change)
    Trainer.fit = recorded_fit


def extra(settings):
    """Gives this process other settings."""
    sys.argv += settings


def other_code():
    """Makes a source of the package differ in this process."""
    read = Path.read_bytes

    def read_bytes(self):
        data = read(self)
        return data + b"\n# another line" if self.name == "train_step.py" else data

    Path.read_bytes = read_bytes


def skip_mean(step, pause=0.0):
    """Leaves out the exchange of losses from a step on, and perhaps does something else."""
    from danet.distributed import collectives

    exchange, skips = collectives.sum_in_place, []

    def skipping(values, name="sum of counts"):
        if name == "mean of losses" and skips:
            rest(pause)
        else:
            exchange(values, name)

    _after_step(step, lambda: skips.append(True))
    collectives.sum_in_place = skipping


def no_network():
    """Lets no connection leave the process, nor a name be looked up."""

    def refuse(*arguments, **_):
        raise OSError(101, "Network is unreachable")

    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = socket.create_connection = refuse


def weigh(path, steps):
    """Leaves the resident memory in MB after certain steps, a line each."""

    def action():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(path, "a") as file:
            file.write(f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.1f}\n")

    for step in steps:
        _after_step(step, action)


def full_disk(module, step, number=28):
    """Lets a module open no file for writing from a step on: a full (28) or read-only (30) disk."""

    def refuse(path, mode="r", *arguments, **values):
        if mode[0] in "aw":
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *arguments, **values)

    _after_step(step, lambda: setattr(resolve_name(module), "open", refuse))


def spoil(what, step, value=255):
    """Makes all labels of a step equal, or its loss or one weight after it no number."""
    import torch

    def change(update, train_step, group, now):
        if now + 1 == step and what == "labels":
            for batch in group:
                batch.mask.fill_(value)
        terms = update(group, now)
        if now + 1 == step and what == "weight":
            next(train_step.model.parameters()).data.view(-1)[0] = float(value)
        if now + 1 == step and what == "loss":
            terms = {name: torch.full_like(term, float(value)) for name, term in terms.items()}
        return terms

    _around_step(change)


def hang_on(name):
    """Makes a loader's process read one sample for long, as storage that is gone does."""
    from torch.utils.data import get_worker_info

    from danet.datasets.folder import Folder

    read = Folder.read

    def slow(self, index):
        if get_worker_info() is not None and self.items[index].name == name:
            time.sleep(1000)
        return read(self, index)

    Folder.read = slow


def fail(step, for_users):
    """Raises an error after a step: one for users, or one of a program with a fault."""
    from danet.errors import InputError

    def action():
        raise InputError("a planted error") if for_users else LookupError("a planted error")

    _after_step(step, action)


def full_shared_memory():
    """Lets a loader's process find no room for what it read."""
    import torch

    def refuse(*_, **__):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on "
            "device (28)"
        )

    torch.UntypedStorage._new_shared = refuse
