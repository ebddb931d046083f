"""A file is replaced as a whole or stays as it was, and a lock has one owner or several readers."""

import os

import pytest

from danet.filesystem import atomic_write, file_lock


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path, durable):
    path = tmp_path / "last.pt"
    path.write_text("old")
    with atomic_write(path, durable=durable) as temporary:
        expected = f".last.pt.{os.getpid()}.tmp" if durable else ".last.pt"
        assert temporary == tmp_path / expected
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, error):
    path = tmp_path / "index.png"
    path.write_text("old")

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass  # nothing was written
    assert path.read_text() == "old"


def test_a_lock_excludes_others_until_its_file_is_closed(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "lock"
    with path.open("wb") as first, path.open("rb") as second, path.open("rb") as third:
        assert file_lock(first, wait=False)
        assert not file_lock(second, wait=False)
        assert not file_lock(second, exclusive=False, wait=False)
        first.close()
        assert file_lock(second, exclusive=False, wait=False)
        assert file_lock(third.fileno(), exclusive=False, wait=False)
        assert not file_lock(third, wait=False)
