"""A pair from the cache is the pair of the files as they are now, whatever else happens."""

import errno
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, make_folder, write_pair
from test_config import compose

from danet import memory
from danet.config.build import checked_config, make_dataset
from danet.config.resume import RESUMABLE
from danet.config.schema import DataFolder
from danet.config.validate import check
from danet.data.loader import eval_batches, train_batches
from danet.data.transforms import Pipeline, ScaleCrop
from danet.datasets import base, cache_folder
from danet.datasets import cache as module
from danet.datasets.base import Reading
from danet.datasets.cache import Cache, digest_of
from danet.datasets.cache_folder import disk_folder, memory_folder
from danet.datasets.folder import Folder
from danet.errors import InputError, StorageError
from danet.types import Sample

CLASSES = ("a", "b", "c")


def write(root, name, seed, size=(30, 40)):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = rng.integers(0, 3, size, dtype=np.uint8)
    write_pair(root, "train", name, image, mask, labels="masks")
    return image, mask


@pytest.fixture(autouse=True)
def _room(monkeypatch):
    """Gives the cache room, however full the disk of this machine is."""
    monkeypatch.setattr(module, "free", lambda folder: 2**40)


@pytest.fixture
def tree(tmp_path):
    """Makes four pairs and returns (the root, a function that makes the data set)."""
    root = tmp_path / "data"
    for seed, name in enumerate("pqrs"):
        write(root, name, seed)

    def make(cache="disk", *, gib=1.0, transform=None, **settings):
        reading = Reading(cache=cache, cache_dir=str(tmp_path / "cache"), cache_gib=gib)
        settings = {"classes": CLASSES, **settings}
        return make_folder(
            root=root, split="train", transform=transform, reading=reading, **settings
        )

    return root, make


def kept(tmp_path):
    """Returns the files of pairs in the cache."""
    return sorted(p for p in (tmp_path / "cache").glob("*/*/*") if p.suffix != ".tmp")


def same(one, two):
    return np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1]) and one[2] == two[2]


@pytest.fixture
def decoded(monkeypatch):
    """Returns a list that grows by a name with every pair that is decoded."""
    names, read = [], base.read_image

    def read_image(path, **settings):
        names.append(path.stem)
        return read(path, **settings)

    monkeypatch.setattr(base, "read_image", read_image)
    return names


def test_the_second_read_decodes_nothing_and_gives_the_same(tree, tmp_path, decoded):
    _, make = tree
    plain, cached = make("none"), make()
    wanted = [plain[i] for i in range(4)]
    decoded.clear()
    assert all(same(cached[i], wanted[i]) for i in range(4))
    assert decoded == ["p", "q", "r", "s"]
    assert all(same(cached[i], wanted[i]) for i in range(4))
    assert all(same(make()[i], wanted[i]) for i in range(4))
    assert len(decoded) == 4
    assert {path.stat().st_size for path in kept(tmp_path)} == {64 + 4 * 30 * 40}


def test_a_changed_file_is_never_served_from_before(tree, tmp_path, decoded):
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
    (root / "masks" / "train" / "p.png").write_bytes(
        (root / "masks" / "train" / "q.png").read_bytes()
    )
    assert np.array_equal(make()[0].mask, make("none")[1].mask)
    assert len(kept(tmp_path)) == 1, "the new pair takes the place of the old"


def test_other_meanings_of_the_labels_have_files_of_their_own(tree, decoded):
    _, make = tree
    make()[0]
    swapped = make(values={0: 1, 1: 0, 2: 2})
    assert same(swapped[0], make("none", values={0: 1, 1: 0, 2: 2})[0])
    assert not same(swapped[0], make()[0])
    assert not same(make(values={0: 1, 1: 255, 2: 2})[0], swapped[0])


def test_a_digest_sees_into_settings_and_not_at_addresses():
    class Holder:
        def __init__(self, value):
            self.value = value

    values = [1, 1.0, True, "1", None, b"1", (1,), ("1",), {1: 1}, {"1": 1}, np.ones(1), Holder(1)]
    values += [Holder(2), Holder(np.ones(2)), np.ones(1, np.uint8), Holder, ["ab"], ["a", "b"], []]
    values += [[[]], [[], []], {1, 2}, {1, 3}, frozenset(), range(2), range(3), np.uint8(1)]
    prints = [digest_of(value) for value in values]
    assert len(set(prints)) == len(values)
    assert digest_of({3, 1, 2}) == digest_of({2, 3, 1})
    assert digest_of(Holder(np.ones(2))) == digest_of(Holder(np.ones(2)))


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "header", "other format"])
def test_a_damaged_file_of_the_cache_is_made_again(tree, tmp_path, decoded, damage):
    _, make = tree
    wanted = make()[0]
    wanted = wanted._replace(image=wanted.image.copy(), mask=wanted.mask.copy())
    (path,) = kept(tmp_path)
    data = path.read_bytes()
    changed = {
        "cut": data[:-100],
        "longer": data + b"x",
        "empty": b"",
        "header": data[:9] + bytes([data[9] ^ 1]) + data[10:],
        "other format": b"DANETpx0" + data[8:],
    }[damage]
    path.unlink()  # as a mapping of it may still live
    path.write_bytes(changed)
    decoded.clear()
    assert same(make()[0], wanted)
    assert decoded == ["p"]
    assert path.read_bytes() == data


def test_what_a_reader_writes_stays_with_the_reader(tree, tmp_path):
    _, make = tree
    make()[0]
    before = kept(tmp_path)[0].read_bytes()
    sample = make()[0]
    sample.image[:] = 0
    sample.mask[:] = 0
    assert kept(tmp_path)[0].read_bytes() == before
    assert same(make()[0], make("none")[0])


def test_a_split_without_labels_is_kept_without_them(tmp_path):
    cache = Cache(tmp_path / "cache", root=tmp_path / "data", kind=b"", limit=2**30)
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    source = tmp_path / "a"
    source.write_bytes(b"x")
    for _ in range(2):
        got, mask = cache.read(str(source), None, lambda: (image, None))
        assert np.array_equal(got, image)
        assert mask is None


def test_a_full_cache_says_so_once_and_images_are_decoded(tree, tmp_path, capfd, decoded):
    _, make = tree
    size = 64 + 4 * 30 * 40
    data = make(gib=2.5 * size / 2**30)
    for _ in range(2):
        assert all(same(data[i], make("none")[i]) for i in range(4))
    assert len(kept(tmp_path)) == 2
    assert int((tmp_path / "cache" / "used").read_text()) == 2 * size
    reported = capfd.readouterr().err
    assert reported.count("warning") == 1
    assert f"the cache in {tmp_path / 'cache'} is full" in reported
    assert "data.cache_gib" in reported


def test_the_bound_holds_for_the_folder_and_a_lost_count_is_made_anew(tree, tmp_path):
    _, make = tree
    size = 64 + 4 * 30 * 40
    make()[0], make()[1]
    counter = tmp_path / "cache" / "used"
    for content in (b"", b"rubbish", b"%032d" % 10**12):
        counter.write_bytes(content)
        data = make(gib=2.5 * size / 2**30)
        for i in range(4):
            data[i]
        assert len(kept(tmp_path)) == 2
        assert int(counter.read_text()) == 2 * size


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_warns_once_and_leaves_nothing_behind(tree, tmp_path, monkeypatch, capfd, code):
    _, make = tree
    data, plain = make(), make("none")

    def refuse(file, part):
        os.write(file, bytes(part)[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "_write", refuse)
    assert all(same(data[i], plain[i]) for i in range(4))
    reported = capfd.readouterr().err
    assert reported.count("warning") == 1
    assert os.strerror(code) in reported
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [tmp_path / "cache/used"]
    assert int((tmp_path / "cache" / "used").read_text()) == 0


def test_a_run_leaves_room_on_the_disk(tree, tmp_path, monkeypatch, capfd):
    _, make = tree
    monkeypatch.setattr(module, "free", lambda folder: 2**30 + 100)
    make()[0]
    assert kept(tmp_path) == []
    assert "full" in capfd.readouterr().err


def system(tmp_path, monkeypatch, *, available_kib, limit, used):
    """Stands in for what the system says of 800 blocks, 300 of them free, and of its memory."""
    reported = os.statvfs_result((4096, 4096, 800, 300, 300, 9, 9, 9, 0, 255))
    monkeypatch.setattr(cache_folder.os, "statvfs", lambda folder: reported)
    texts = {
        "/proc/meminfo": f"MemFree: 1 kB\nMemAvailable:  {available_kib} kB\n",
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": used,
    }
    for name, text in texts.items():
        file = tmp_path / name.replace("/", "_")
        file.write_text(text)
        texts[name] = file
    monkeypatch.setattr(memory, "Path", lambda name: texts.get(name, name))
    monkeypatch.setattr(cache_folder, "_SHARED_MEMORY", tmp_path / "memory")


@pytest.mark.parametrize(
    ("available_kib", "limit", "used", "expected"),
    [
        (10_000, "max\n", "7", 200 * 4096),  # the folder, less an eighth of all its blocks
        (100, "max\n", "7", 100 * 1024),
        (10_000, "5000\n", "2000\n", 3000),
    ],
)
def test_memory_has_room_for_what_the_least_of_three_leaves(
    tmp_path, monkeypatch, available_kib, limit, used, expected
):
    system(tmp_path, monkeypatch, available_kib=available_kib, limit=limit, used=used)
    assert cache_folder.free(tmp_path / "memory" / "danet-cache-0") == expected
    assert cache_folder.free(tmp_path / "disk") == 300 * 4096, "memory has no part in a disk"


def test_drafts_of_the_dead_go_when_space_is_short(tree, tmp_path):
    _, make = tree
    make()[0]
    home = kept(tmp_path)[0].parent
    old, young = home / "x.1.tmp", home / "y.2.tmp"
    for draft in (old, young):
        draft.write_bytes(bytes(100))
    os.utime(old, (0, 0))
    (tmp_path / "cache" / "used").write_text(f"{2**40:032}")
    make()[1]
    assert int((tmp_path / "cache" / "used").read_text()) == 2 * (64 + 4 * 30 * 40) + 100
    assert not old.exists()
    assert young.exists()


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
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(files) == 5
    used = int((tmp_path / "cache" / "used").read_text())
    assert used == sum(path.stat().st_size for path in kept(tmp_path))
    assert all(same(make()[i], make("none")[i]) for i in range(4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_without_a_cache_and_whole_images_are_evaluated(tree, num_workers):
    _, make = tree
    crop = Pipeline({"crop": ScaleCrop((32, 32))})
    for _ in range(2):
        streams = [
            train_batches(make(c, transform=crop), batch_size=2, seed=3, num_workers=num_workers)
            for c in ("none", "disk")
        ]
        for one, two in itertools.islice(zip(*streams, strict=True), 4):
            assert (one.image == two.image).all()
            assert (one.mask == two.mask).all()
        whole = [list(eval_batches(make(c), batch_size=2, num_workers=0)) for c in ("none", "disk")]
        for (one,), (two,) in zip(*whole, strict=True):
            assert (one.image == two.image).all()
            assert (one.mask == two.mask).all()


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
    image, mask = np.zeros((32768, 256, 3), np.uint8), np.zeros((32768, 256), np.uint8)
    source = tmp_path / "a"
    source.write_bytes(b"x")
    cache = Cache(tmp_path / "cache", root=tmp_path / "data", kind=b"", limit=2**30)
    cache.read(str(source), None, lambda: (image, mask))
    got = cache.read(str(source), None, lambda: pytest.fail("decoded again"))
    (path,) = kept(tmp_path)
    crop = Pipeline({"crop": ScaleCrop((64, 64), (1.0, 1.0))})
    assert resident(path) < 2**20
    assert crop(Sample(*got, "a"), 3).image.shape == (64, 64, 3)
    assert 64 * 256 * 3 / 2 < resident(path) < path.stat().st_size / 8
    assert path.stat().st_size == 64 + 32768 * 256 * 4


def test_a_pickled_data_set_finds_the_same_cache(tree, decoded):
    _, make = tree
    data = make()
    data[0]
    again = pickle.loads(pickle.dumps(data))
    assert same(again[0], data[0])
    assert decoded == ["p"]


def test_the_cache_is_never_made_below_the_data(tree):
    root, _ = tree
    for folder in (root, root / "cache"):
        with pytest.raises(InputError, match=r"data.cache_dir=.*: it lies below data.root="):
            Folder(
                root=root,
                split="train",
                classes=CLASSES,
                reading=Reading(cache="disk", cache_dir=str(folder)),
            )


def test_a_folder_that_cannot_be_made_is_reported(tree, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        StorageError, match=rf"data.cache_dir={tmp_path / 'cache'}: Not a directory"
    ):
        tree[1]()


def test_the_folder_is_the_users_own_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert disk_folder(None) == tmp_path / ".cache" / "danet"
    assert disk_folder("~/x") == tmp_path / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "y"))
    assert disk_folder(None) == tmp_path / "y" / "danet"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "disc"}, "data.cache=disc: expected one of none, ram, disk"),
        ({"cache_gib": 0}, "data.cache_gib=0: expected a number above 0"),
        ({"cache_gib": "much"}, "data.cache_gib=much: expected a number above 0"),
        ({"cache_dir": 3}, "data.cache_dir=3: expected a folder or null"),
        ({"max_pixels": 0}, "data.max_pixels=0: expected a whole number, at least 1"),
        ({"max_pixels": 1e9}, "data.max_pixels=1000000000.0: expected a whole number"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Reading(**settings)


# Memory

PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from danet.datasets import cache_folder
cache_folder._SHARED_MEMORY = Path({memory!r})
folder = cache_folder.memory_folder()
print(len(list(folder.iterdir())), flush=True)
(folder / sys.argv[1]).write_bytes(b"x")
sys.stdin.readline()
"""


def start(tmp_path, name):
    """Starts a process that holds the folder in memory until it is given a line."""
    program = PROGRAM.format(root=str(ROOT), memory=str(tmp_path))
    command = [sys.executable, "-c", program, name]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    found = int(process.stdout.readline())
    return process, found


def end(process):
    process.communicate("\n")
    return process.returncode


@pytest.mark.slow
def test_memory_is_shared_left_by_the_last_and_cleaned_after_a_crash(tmp_path):
    folder = tmp_path / f"danet-cache-{os.getuid()}"
    first, found = start(tmp_path, "a")
    assert found == 0
    second, found = start(tmp_path, "b")
    assert found == 1, "both have one folder"
    end(first)
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b"], "the second still has it"
    end(second)
    assert not folder.exists()
    killed, _ = start(tmp_path, "c")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert folder.exists()
    third, found = start(tmp_path, "d")
    assert found == 0, "what the killed one left is gone"
    end(third)
    assert not folder.exists()


def test_pairs_in_memory_are_those_of_the_files(tree, tmp_path, monkeypatch, decoded):
    _, make = tree
    monkeypatch.setattr(cache_folder, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(cache_folder, "_held", {})
    plain = [make("none")[i] for i in range(4)]
    decoded.clear()
    for _ in range(2):
        assert all(same(make("ram")[i], plain[i]) for i in range(4))
    assert len(decoded) == 4
    folder = memory_folder()
    assert folder.parent == tmp_path
    cache_folder.leave(folder, os.getpid())
    assert not folder.exists()


def test_without_shared_memory_the_disk_is_advised(monkeypatch, tmp_path):
    monkeypatch.setattr(cache_folder, "_SHARED_MEMORY", tmp_path / "no")
    with pytest.raises(InputError, match=r"data.cache=ram: there is no .*; use data.cache=disk"):
        memory_folder()


# A worker that goes on and on


def private(process):
    """Returns the bytes of memory that a process shares with nobody."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_the_memory_of_a_worker_is_flat_over_2000_samples(tree, cache):
    root, make = tree
    for seed, name in enumerate("tuvw"):
        write(root, name, seed, size=(200, 240))
    crop = Pipeline({"crop": ScaleCrop((96, 96))})
    batches = train_batches(make(cache, transform=crop), batch_size=4, seed=0, num_workers=1)
    held = []
    for number in range(500):
        next(batches)
        if number in (50, 499):
            (worker,) = multiprocessing.active_children()
            held.append(private(worker.pid))
    assert held[1] - held[0] < 20 * 2**20


# From the config


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


def test_a_bad_cache_is_reported_with_its_key(tree):
    root, _ = tree
    settings = ["data=folder", f"data.root={root}", "data.classes=[a,b,c]", "data.cache=disc"]
    with pytest.raises(InputError, match=r"^data.cache=disc: expected one of none, ram, disk$"):
        make_dataset(check(compose(*settings)), "train", training=True)
