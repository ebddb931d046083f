"""Fixtures of the fault tests, and the record from which docs/reliability.md gets its table.

With DANET_FAULTS_JSON=FILE the outcome of every test that carries ``fault`` goes into that file.
Those that start whole trainings (marked slow) run only with it or with DANET_FAULTS=1: together
they take longer than all other tests.
"""

import json
import os
from pathlib import Path

import pytest

from faults.toy import TOY, Starter, fingerprint


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(number, what): the row of docs/reliability.md")


def pytest_collection_modifyitems(items):
    if os.environ.get("DANET_FAULTS") or os.environ.get("DANET_FAULTS_JSON"):
        return
    skip = pytest.mark.skip(reason="set DANET_FAULTS=1 to run the faults that take whole trainings")
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture
def start(tmp_path):
    """Starts processes in the test's folder; none outlives the test."""
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture
def figure(record_property):
    """Notes what was counted, for the table."""
    return lambda text: record_property("figure", text)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """Returns SHA-256 of the end of a run that nothing disturbed, and its folder."""
    known = {}

    def run(*extra, processes=1, settings=TOY):
        key = (tuple(settings), extra, processes)
        if key not in known:
            folder = tmp_path_factory.mktemp("straight")
            starter = Starter(folder)
            plants = {"record": {"folder": str(folder)}}
            try:
                common = [*settings, *extra, "run.dir=run"]
                if processes == 1:
                    starter.train(*common, plants=plants)
                else:
                    starter.train_group(*common, processes=processes, plants=plants)
            finally:
                starter.close()
            known[key] = fingerprint(folder / "run/last.pt"), folder
        return known[key]

    return run


_rows = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    mark = item.get_closest_marker("fault")
    is_last_word = report.when == "call" or (report.when == "setup" and not report.passed)
    if mark is None or not is_last_word:
        return
    _rows.append(
        {
            "number": mark.args[0],
            "fault": mark.args[1],
            "test": item.originalname or item.name,
            "outcome": report.outcome,
            "figure": "; ".join(v for k, v in report.user_properties if k == "figure"),
            "seconds": round(report.duration, 1),
        }
    )


def pytest_sessionfinish():
    target = os.environ.get("DANET_FAULTS_JSON")
    if target and _rows:
        path = Path(target)
        old = json.loads(path.read_text()) if path.exists() else []
        ran = {(row["number"], row["test"]) for row in _rows}
        kept = [row for row in old if (row["number"], row["test"]) not in ran]
        rows = sorted(kept + _rows, key=lambda row: (row["number"], row["test"]))
        path.write_text(json.dumps(rows, indent=1) + "\n")
