"""Faults to plant in a process before a tool runs in it. Each replaces one function of the product.

An argument ``once`` is a file: the fault happens only where it is not there yet, and makes it.
"""

import functools
import importlib
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path


def _is_due(once):
    if once is None:
        return True
    if Path(once).exists():
        return False
    Path(once).touch()
    return True


def _around_step(change):
    """Put ``change(update, train_step, group, step)`` in the place of the update of a step."""
    from danet.engine.train_step import TrainStep

    update = TrainStep.__call__

    def changed(self, group, step):
        return change(functools.partial(update, self), self, group, step)

    TrainStep.__call__ = changed


def _after_step(action):
    """Call ``action(step)`` when the updates of a step are done."""

    def change(update, _, group, step):
        terms = update(group, step)
        action(step + 1)
        return terms

    _around_step(change)


def kill_after(step, once=None):
    """Ends the process as the system's out-of-memory killer does."""

    def action(now):
        if now == step and _is_due(once):
            os.kill(os.getpid(), signal.SIGKILL)

    _after_step(action)


def signal_after(step, name, times=1, pause=0.0):
    """Sends this process a signal, perhaps several times."""

    def action(now):
        if now == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(pause)

    _after_step(action)


def slow_steps(seconds):
    """Makes steps last."""
    _after_step(lambda _: time.sleep(seconds))


def hold_at_import(path):
    """Says that it is here, and waits as a slow file system would."""
    Path(path).touch()
    time.sleep(60)


def hold_evaluation(path, seconds=60.0, times=1):
    """Says that it is here, then evaluates slowly, ``times`` times."""
    from danet.evaluation import evaluate as module

    original, left = module.evaluate, [times]

    def evaluate(*arguments, **values):
        if left[0] > 0:
            left[0] -= 1
            Path(path).touch()
            time.sleep(seconds)
        return original(*arguments, **values)

    module.evaluate = evaluate


def hold_save(path, seconds=3.0, step=None):
    """Says that it is here when half of a checkpoint is written, and goes on later."""
    from danet import filesystem

    fsync = os.fsync

    def slow(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".tmp") and (step is None or f"step_{step:09d}" in name):
            Path(path).touch()
            time.sleep(seconds)
        fsync(handle)

    filesystem.os = _Replaced(os, fsync=slow)


class _Replaced:
    """A module with some of its names replaced, for one other module."""

    def __init__(self, module, **names):
        self.__dict__.update(vars(module))
        self.__dict__.update(names)


def die_before_rename(step):
    """Ends the process when the temporary file is whole and not yet renamed."""
    replace = Path.replace

    def dying(self, target):
        if Path(target).name == f"step_{step:09d}.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = dying


def record(folder):
    """Leaves what this process trained on (a line a step) and the step at which it ended."""
    from danet.engine.trainer import Trainer

    rank = os.environ.get("RANK", "0")
    path = Path(folder) / f"samples-{rank}.jsonl"
    fit = Trainer.fit

    def change(update, _, group, step):
        terms = update(group, step)
        names = [name for batch in group for name in batch.name]
        sums = [int(image.sum()) for batch in group for image in batch.image]
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "names": names, "sums": sums}) + "\n")
        return terms

    def recorded_fit(self, batches):
        try:
            fit(self, batches)
        finally:
            (Path(folder) / f"ended-{rank}").write_text(str(self.step))

    _around_step(change)
    Trainer.fit = recorded_fit


def record_buffers(folder, at):
    """Leaves the running means of this process's network after a step, and at the end."""
    import torch

    from danet.engine.trainer import Trainer

    fit = Trainer.fit

    def leave(model, moment):
        buffers = model.named_buffers()
        means = {name: value.clone() for name, value in buffers if name.endswith("running_mean")}
        rank = os.environ.get("RANK", "0")
        torch.save(means, Path(folder) / f"means-{moment}-{rank}.pt")

    def recorded(self, batches):
        fit(self, batches)
        leave(self.train_step.model, "end")

    def change(update, train_step, group, step):
        terms = update(group, step)
        if step + 1 == at:
            leave(train_step.model, "training")
        return terms

    Trainer.fit = recorded
    _around_step(change)


def extra(settings):
    """Gives this process other settings."""
    sys.argv += settings


def other_version(name):
    """Makes this process another release of the package."""
    import danet

    danet.__version__ = name


def other_code():
    """Makes a source of the package differ in this process."""
    read = Path.read_bytes

    def read_bytes(self):
        data = read(self)
        return data + b"\n# another line" if self.name == "losses.py" else data

    Path.read_bytes = read_bytes


def time_out(seconds):
    """Makes waiting for other processes short."""
    from danet.distributed import failures

    failures.TIMEOUT = timedelta(seconds=seconds)


def skip_mean(step, pause=0.0):
    """Leaves out the exchange of losses from a step on, and perhaps does something else."""
    from danet.distributed import collectives

    exchange, now = collectives.sum_in_place, [0]

    def skipping(values, name="sum of counts"):
        if name == "mean of losses" and now[0] >= step:
            time.sleep(pause)
        else:
            exchange(values, name)

    _after_step(lambda done: now.__setitem__(0, done))
    collectives.sum_in_place = skipping


def no_network():
    """Lets no connection leave the process, nor a name be looked up."""

    def refuse(*arguments, **_):
        raise OSError(101, "Network is unreachable")

    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = socket.create_connection = refuse


def weigh(path, steps):
    """Leaves the resident memory in MB after certain steps, a line each."""

    def action(now):
        if now in steps:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(path, "a") as file:
                file.write(f"{now} {pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.1f}\n")

    _after_step(action)


def ignore_labels(step):
    """Makes all labels of a step ignored, on the processes where it is planted."""

    def change(update, _, group, now):
        if now + 1 == step:
            for batch in group:
                batch.mask.fill_(255)
        return update(group, now)

    _around_step(change)


def full_disk(step, number=28, count=10**9):
    """Makes writing checkpoints fail from a step on, as a full (28) or read-only (30) disk does."""
    from danet.checkpoint import format as checkpoint_format

    left = [count]

    def opened(path, mode="r", *arguments, **values):
        if "w" in mode and f"step_{step:09d}" in str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *arguments, **values)

    checkpoint_format.open = opened


def limit_files(step, size):
    """Lets no file grow beyond so many bytes from a step on, as a quota does."""
    import resource

    def action(now):
        if now == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    _after_step(action)


def replace_after(step, path, source):
    """Puts another file in the place of one while the run is under way."""

    def action(now):
        if now == step:
            os.replace(source, path)

    _after_step(action)


def spoil_weight(step, value):
    """Makes one weight no number, as a fault of memory or of an optimizer would."""

    def change(update, train_step, group, now):
        terms = update(group, now)
        if now + 1 == step:
            weight = next(train_step.model.parameters()).data
            weight[(0,) * weight.dim()] = float(value)
        return terms

    _around_step(change)


def spoil_loss(step, value):
    """Makes the loss of one step no number."""
    import torch

    def change(update, _, group, now):
        terms = update(group, now)
        if now + 1 == step:
            terms = {name: torch.full_like(term, float(value)) for name, term in terms.items()}
        return terms

    _around_step(change)


def hang_on(name, seconds=1000.0):
    """Makes a loader's process read one sample for long, as storage that is gone does."""
    from torch.utils.data import get_worker_info

    from danet.datasets.folder import Folder

    read = Folder.read

    def slow(self, index):
        if get_worker_info() is not None and self.items[index].name == name:
            time.sleep(seconds)
        return read(self, index)

    Folder.read = slow


def full_log(step):
    """Makes writing the log fail from a step on."""
    from danet.engine import log

    now = [0]
    _after_step(lambda done: now.__setitem__(0, done))

    def opened(path, mode="r", *arguments, **values):
        if "a" in mode and now[0] >= step:
            raise OSError(28, os.strerror(28), str(path))
        return open(path, mode, *arguments, **values)

    log.open = opened


def threads(count):
    """Gives torch another number of threads."""
    import torch

    torch.set_num_threads(count)


def late(seconds):
    """Makes the tool start late, as on a machine that does other work."""
    time.sleep(seconds)


def late_words(seconds):
    """Lets time pass before an error is printed."""
    from danet.distributed import error_reporting

    is_reported = error_reporting.is_reported

    def slow(error):
        reported = is_reported(error)
        if not reported:
            time.sleep(seconds)
        return reported

    error_reporting.is_reported = slow


def short_grace(seconds):
    """Makes a process that met an error not wait long for the first one of its machine."""
    from danet.distributed import error_reporting

    error_reporting.REPORT = seconds


def stuck_group():
    """Makes leaving the group wait, as NCCL does for processes that do not leave it, too."""
    import torch

    torch.distributed.destroy_process_group = lambda: time.sleep(1000)


def fail(step, for_users):
    """Raises an error after a step: one for users, or one of a program with a fault."""
    from danet.errors import InputError

    def action(now):
        if now == step:
            raise InputError("a planted error") if for_users else LookupError("a planted error")

    _after_step(action)


def ignore_hangup():
    """Ignores SIGHUP as nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def hold(place, path):
    """Says that a function is reached, and takes its time there."""
    module, _, name = place.rpartition(".")
    owner = importlib.import_module(module)
    original = getattr(owner, name)

    def slow(*arguments, **values):
        Path(path).touch()
        time.sleep(60)
        return original(*arguments, **values)

    setattr(owner, name, slow)


def full_shared_memory():
    """Lets a loader's process find no room for what it read."""
    import torch

    def refuse(*_, **__):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on "
            "device (28)"
        )

    torch.UntypedStorage._new_shared = refuse


def overflow():
    """Makes the gradients of every step overflow, as float16 does where a loss is too large."""
    import torch

    from danet.engine.trainer import Trainer

    fit = Trainer.fit

    def overflowing(self, batches):
        self.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
        fit(self, batches)

    Trainer.fit = overflowing
