"""Fixtures of the fault tests: starting processes, the figure of a row, an undisturbed run."""

import pytest

from faults.toy import TOY, Starter, fingerprint


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

    def run(*extra, processes=1):
        key = (extra, processes)
        if key not in known:
            folder = tmp_path_factory.mktemp("straight")
            starter = Starter(folder)
            plants = {"record": {"folder": str(folder)}}
            try:
                common = [*TOY, *extra, "run.dir=run"]
                starter.train_group(*common, processes=processes, plants=plants)
            finally:
                starter.close()
            known[key] = fingerprint(folder / "run/last.pt"), folder
        return known[key]

    return run
