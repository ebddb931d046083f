"""Runs a tool in this process with faults planted; what the tests here start instead of the tool.

Either as a script, under torchrun or alone, with a specification in JSON; or as the target of a
process that is forked from one which has everything imported, since imports take seconds.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run(spec):
    """Plants the faults and runs the tool, which ends the process where it fails.

    Args:
        spec: tool: its name. settings: its arguments. plants: function of faults.plants -> its
            arguments. pids: folder where this process leaves its id as a file name.
    """
    (Path(spec["pids"]) / str(os.getpid())).touch()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    from faults import plants

    # As the interpreter reads them from the system, also where that knows ASCII only.
    settings = [os.fsdecode(setting.encode()) for setting in spec["settings"]]
    sys.argv = [f"{spec['tool']}.py", *settings]
    for name, values in spec["plants"].items():
        if "rank" not in values or str(values["rank"]) == os.environ.get("RANK", "0"):
            getattr(plants, name)(**{k: v for k, v in values.items() if k != "rank"})
    importlib.import_module(f"danet.tools.{spec['tool']}").main()


def child(spec, environment):
    """Is the target of a forked process: a session of its own, output to files."""
    os.setsid()
    # As in a process of one's own; it would be that of the server which forked this one.
    multiprocessing.set_start_method("fork", force=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{spec['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.chdir(spec["cwd"])
    os.environ.update(environment)
    run(spec)


if __name__ == "__main__":
    sys.path[0] = str(TESTS)
    sys.path.insert(0, str(TESTS.parent))
    run(json.loads(sys.argv[1]))
