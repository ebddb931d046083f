"""A pair from the cache is the pair of the files as they are now, whatever else happens."""

import errno
import itertools
import multiprocessing
import os
import pickle
import time
from functools import partial

import numpy as np
import pytest
from conftest import make_folder, write_pair
from test_config import compose

from danet.config.build import checked_config, make_dataset
from danet.config.resume import RESUMABLE
from danet.config.schema import DataFolder
from danet.config.validate import check
from danet.data.loader import train_batches
from danet.data.transforms import Pipeline, ScaleCrop
from danet.datasets import base
from danet.datasets import cache as module
from danet.datasets.base import Reading
from danet.datasets.cache import Cache, cache_folder
from danet.errors import InputError, StorageError
from danet.types import Sample


def write(root, name, seed, size=(30, 40)):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = rng.integers(0, 3, size, dtype=np.uint8)
    write_pair(root, "train", name, image, mask, labels="masks")
    return image, mask


@pytest.fixture(autouse=True)
def _room(monkeypatch):
    """Gives the cache room, however full the disk of this machine is."""
    monkeypatch.setattr(module, "_room", lambda folder: 2**40)


@pytest.fixture
def tree(tmp_path):
    """Makes four pairs and returns (the root, a function that makes the data set)."""
    for seed, name in enumerate("pqrs"):
        write(tmp_path / "data", name, seed)
    return tmp_path / "data", partial(make_cached, tmp_path)


def make_cached(place, cache="disk", *, gib=1.0, **settings):
    reading = Reading(cache=cache, cache_dir=str(place / "cache"), cache_gib=gib)
    settings = {"root": place / "data", "classes": ("a", "b", "c"), **settings}
    return make_folder(split="train", reading=reading, **settings)


def kept(tmp_path):
    """Returns the files of the cache but the count."""
    return sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != "used")


def count(tmp_path):
    return int((tmp_path / "cache" / "used").read_text())


def same(one, two):
    return np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1]) and one[2] == two[2]


@pytest.fixture
def decoded(monkeypatch):
    """Returns a list that grows by a name with every pair that is decoded."""
    names, read = [], base.read_bands

    def read_bands(path, bands, **settings):
        names.append(path.stem)
        return read(path, bands, **settings)

    monkeypatch.setattr(base, "read_bands", read_bands)
    return names


def test_the_second_read_decodes_nothing_and_gives_the_same(tree, decoded):
    wanted = [tree[1]("none")[i] for i in range(4)]
    data = tree[1]()
    decoded.clear()
    for again in (data, data, tree[1](), pickle.loads(pickle.dumps(data))):
        assert all(same(again[i], wanted[i]) for i in range(4))
        assert decoded == ["p", "q", "r", "s"]


def read_all(make, times):
    for _ in range(times):
        data = make()
        for i in range(4):
            data[i]


def test_many_processes_may_fill_one_cache(tree, tmp_path):
    _, make = tree
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=read_all, args=(make, 5)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(kept(tmp_path)) == 4
    size = sum(path.stat().st_size for path in kept(tmp_path))
    # Processes that decode one pair at the same time each count it, at most once.
    assert size <= count(tmp_path) <= len(workers) * (size + 4 * 256)
    assert all(same(make()[i], make("none")[i]) for i in range(4))


@pytest.mark.slow
def test_another_process_finds_what_one_has_stored(tree, decoded, monkeypatch):
    """No name of a file depends on an address, or on the hash of a text."""
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    other = multiprocessing.get_context("spawn").Process(target=read_all, args=(tree[1], 1))
    other.start()
    other.join()
    assert other.exitcode == 0
    read_all(tree[1], 1)
    assert decoded == []


def test_a_changed_file_is_never_served_from_before(tree, tmp_path):
    """Same size of file, same time of writing, so only the time of change differs."""
    root, make = tree
    make()[0]
    path = root / "images" / "train" / "p.png"
    state, length = path.stat(), path.stat().st_size
    time.sleep(0.02)
    image, _ = write(root, "p", seed=99)
    with open(path, "ab") as file:
        file.truncate(max(length, path.stat().st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert np.array_equal(make()[0].image, image)
    masks = root / "masks" / "train"
    (masks / "p.png").write_bytes((masks / "q.png").read_bytes())
    data = make()
    assert np.array_equal(data[0].mask, make("none")[1].mask)
    assert len(kept(tmp_path)) == 1, "the new pair takes the place of the old"
    path.unlink()
    with pytest.raises(InputError, match=r"p.png: .*the file does not exist"):
        data[0]


def test_other_meanings_of_the_labels_have_files_of_their_own(tree):
    _, make = tree
    for values in (None, {0: 1, 1: 0, 2: 2}, {0: 1, 1: 255, 2: 2}):
        assert same(make(values=values)[0], make("none", values=values)[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: b"",
        lambda data: data.replace(b"30", b"15"),
        lambda data: data.replace(b"|u1", b"|i1"),
        lambda data: data.replace(b"'descr'", b"'descr "),
        lambda data: data[:-700] + bytes([77]) + data[-699:],
    ],
    ids=["cut", "empty", "height", "type", "header", "value of the mask"],
)
def test_a_damaged_file_of_the_cache_is_made_again(tree, tmp_path, decoded, damage):
    _, make = tree
    make()[0]
    (path,) = kept(tmp_path)
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    decoded.clear()
    assert same(make()[0], make("none")[0])
    assert decoded == ["p", "p"]
    assert path.read_bytes() == data
    assert kept(tmp_path) == [path]


def test_what_a_reader_writes_stays_with_the_reader(tree):
    sample = [tree[1]()[0] for _ in range(2)][1]
    sample.image[:], sample.mask[:] = 0, 77
    assert same(tree[1]()[0], tree[1]("none")[0])


def read_times(folder, times, pair):
    """Returns a pair as the cache gives it at last."""
    cache = Cache(folder / "cache", root=folder / "data", kind=b"", limit=2**30)
    (folder / "a").write_bytes(b"x")
    return [cache.read(str(folder / "a"), None, lambda: pair) for _ in range(times)][-1]


def test_a_split_without_labels_is_kept_without_them(tmp_path):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    for times in (1, 2):
        got, mask = read_times(tmp_path, times, (image, None))
        assert np.array_equal(got, image)
        assert mask is None


# Bounds


@pytest.mark.parametrize("content", [None, "", "rubbish", str(10**12)])
def test_a_full_cache_is_reported_once_and_images_are_decoded(tree, tmp_path, capfd, content):
    """Whatever an earlier run has left as the count."""
    _, make = tree
    make()[0]
    (path,) = kept(tmp_path)
    if content is not None:
        (tmp_path / "cache" / "used").write_text(content)
    data = make(gib=2.5 * path.stat().st_size / 2**30)
    for _ in range(2):
        assert all(same(data[i], make("none")[i]) for i in range(4))
    assert len(kept(tmp_path)) == 2
    assert 0 <= count(tmp_path) - sum(path.stat().st_size for path in kept(tmp_path)) < 2 * 256
    reported = capfd.readouterr().err
    assert reported.count("warning") == 1
    assert f"the cache in {tmp_path / 'cache'} is full" in reported
    assert "data.cache_gib" in reported


def test_what_killed_processes_left_is_removed_when_space_is_short(tree, tmp_path):
    _, make = tree
    make()[0]
    old, young = (kept(tmp_path)[0].parent / name for name in (".x.1.tmp", ".y.2.tmp"))
    for draft in (old, young):
        draft.write_bytes(bytes(100))
    os.utime(old, (0, 0))
    (tmp_path / "cache" / "used").write_text(str(2**40))
    make()[1]
    assert not old.exists()
    assert young in kept(tmp_path)


def test_a_full_disk_warns_once_and_leaves_nothing_behind(tree, tmp_path, monkeypatch, capfd):
    def refuse(file, record):
        file.write(bytes(10))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.np, "save", refuse)
    batches = train_batches(tree[1](), batch_size=2, seed=0, num_workers=2)
    names = [name for batch in itertools.islice(batches, 4) for name in batch.name]
    assert sorted(names) == sorted("pqrs" * 2)
    reported = capfd.readouterr().err
    assert reported.count("warning") == reported.count(os.strerror(errno.ENOSPC)) == 1
    assert kept(tmp_path) == []


def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


class SlowFlag:
    """A flag in shared memory that changes between a look at it and what follows from it."""

    def __init__(self, flag):
        self.flag = flag

    def __getitem__(self, index):
        found = self.flag[index]
        time.sleep(0.5)
        return found

    def __setitem__(self, index, value):
        self.flag[index] = value


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_whose_disk_is_full_at_once_warn_once(tmp_path, monkeypatch, capfd, locks):
    if not locks:
        monkeypatch.setattr(module, "file_lock", refuse)
    cache = Cache(tmp_path / "cache", root=tmp_path / "data", kind=b"", limit=1)
    cache._warned = SlowFlag(cache._warned)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=cache._stop, args=("full",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    count = capfd.readouterr().err.count("warning: full")
    assert count == 1 if locks else count >= 1


# Use


def resident(path):
    """Returns the bytes of a mapped file that this process has touched."""
    found, total = False, 0
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0]:
                found = line.rstrip().endswith(str(path))
            elif found and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc")
def test_a_crop_reads_its_own_rows_only(tmp_path):
    """Of 32768 rows 64 are asked for; the system maps some neighbours, up to a MiB, unasked."""
    pair = np.zeros((32768, 256, 3), np.uint8), np.zeros((32768, 256), np.uint8)
    got = read_times(tmp_path, 3, pair)  # stored, verified, and only mapped
    (path,) = kept(tmp_path)
    crop = Pipeline({"crop": ScaleCrop((64, 64), (1.0, 1.0))})
    assert resident(path) < 2**20
    assert crop(Sample(*got, "a"), 3).image.shape == (64, 64, 3)
    assert 64 * 256 * 3 / 2 < resident(path) < path.stat().st_size / 8


# Folders and settings


def test_a_folder_below_the_data_or_one_that_cannot_be_made_is_refused(tree, tmp_path):
    root = tmp_path / "data"
    for folder in (root, root / "cache"):
        with pytest.raises(InputError, match=r"data.cache_dir=.*: it lies below data.root="):
            Cache(folder, root=root, kind=b"", limit=1)
    (tmp_path / "cache").write_text("a file")
    message = rf"data.cache_dir={tmp_path / 'cache'}: Not a directory"
    with pytest.raises(StorageError, match=message):
        tree[1]()


def test_the_folder_is_the_users_own_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "danet"
    assert cache_folder("~/x") == tmp_path / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "y"))
    assert cache_folder(None) == tmp_path / "y" / "danet"


def test_the_keys_of_a_config_reach_the_data_set(tree, tmp_path):
    root, _ = tree
    settings = ["data=folder", f"data.root={root}", "data.classes=[a,b,c]", "data.crop=[32,32]"]
    settings += ["data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gib=0.5"]
    config = check(compose(*settings, "data.max_pixels=5000"))
    data = make_dataset(config, "train", training=True)
    assert data.reading == Reading("disk", str(tmp_path / "cache"), 0.5, 5000)
    assert data[0].image.shape == (32, 32, 3)
    assert len(kept(tmp_path)) == 1
    saved = {"config": config.plain}
    assert checked_config(saved, "last.pt").data.cache == "disk"
    assert checked_config(saved, "last.pt", DataFolder()).data.cache == "none"
    for key in ("cache", "cache_dir", "cache_gib", "max_pixels"):
        assert f"data.{key}" in RESUMABLE
    plain = check(compose("data=folder", f"data.root={root}", "data.classes=[a,b,c]"))
    assert make_dataset(plain, "train", training=False).reading == Reading()
