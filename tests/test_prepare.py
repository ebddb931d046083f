"""Official archives land where the loaders look; hostile ones leave no trace; a kill is mended."""

import errno
import hashlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import ROOT
from PIL import Image
from test_config import compose

from danet.archives import unpack as unpacking
from danet.archives.members import read_listing
from danet.archives.rules import DEFAULT_LIMITS, Limits
from danet.archives.unpack import unpack
from danet.config.build import make_dataset
from danet.config.validate import check
from danet.datasets.ade20k import ADE20K
from danet.datasets.cityscapes import Cityscapes
from danet.datasets.coco_stuff import CocoStuff10k, CocoStuff164k
from danet.datasets.pascal_context import PascalContext60
from danet.datasets.pascal_voc import PascalVOC
from danet.errors import InputError, StorageError

SCRIPT = ROOT / "scripts" / "prepare.py"
SPEC = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)

FILES = {f"images/a/{i}.jpg": bytes([i]) * (7 * i) for i in range(4)} | {"images/b.txt": b"x" * 9}
"""What the tests about interruptions unpack."""

# Writing archives


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_with(path, kind="w", **fields):
    """Writes a good file and a member with these fields."""
    with tarfile.open(path, kind) as archive:
        good = tarfile.TarInfo("images/good.jpg")
        good.size = 3
        archive.addfile(good, io.BytesIO(b"abc"))
        info = tarfile.TarInfo("bad")
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(bytes(info.size)) if info.size else None)
    return path


def zip_with(path, name="bad", mode=0, flag=0, content=b"x"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/good.jpg", b"abc")
        info = zipfile.ZipInfo("bad")
        info.filename = name
        info.external_attr = mode << 16
        archive.writestr(info, content)
        info.flag_bits |= flag
    return path


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def jpg(shape):
    file = io.BytesIO()
    Image.new("RGB", shape[::-1]).save(file, "JPEG")
    return file.getvalue()


def mat(**fields):
    file = io.BytesIO()
    scipy.io.savemat(file, fields)
    return file.getvalue()


def tree(root):
    """Returns relative path -> content of every file, hidden ones too."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def extract(path, root, limits=DEFAULT_LIMITS, seen=lambda size: None):
    listing = read_listing(path, limits)
    return unpack(listing, {m.path: m.path for m in listing.members}, root, seen)


def run(*settings, code=0):
    """Runs the tool as a process."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, settings)], capture_output=True, text=True
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


# Archives as published

LABEL = np.array([[7, 8, 11], [11, 8, 7]], np.uint8)
PICTURE = jpg(LABEL.shape)


def city(split, folder, suffix):
    return f"{folder}/{split}/ulm/ulm_000000_000019_{suffix}"


def archives_of(data, folder):
    """Writes small replicas of the archives of a data set: true member names, license files."""
    both = {"README": b"read", "license.txt": b"terms"}
    if data == "cityscapes":
        picture = png(np.zeros((*LABEL.shape, 3), np.uint8))
        left = {city(s, "leftImg8bit", "leftImg8bit.png"): picture for s in ("train", "val")}
        fine = {city(s, "gtFine", "gtFine_labelIds.png"): png(LABEL) for s in ("train", "val")}
        yield write_zip(folder / "leftImg8bit_trainvaltest.zip", {**both, **left})
        yield write_zip(folder / "gtFine_trainvaltest.zip", {"README": b"another", **fine})
    elif data == "pascal_voc":
        base = "VOCdevkit/VOC2012"
        files = {
            f"{base}/ImageSets/Segmentation/{s}.txt": b"2007_000032\n" for s in ("train", "val")
        }
        files[f"{base}/JPEGImages/2007_000032.jpg"] = PICTURE
        files[f"{base}/SegmentationClass/2007_000032.png"] = png(LABEL)
        yield write_tar(folder / "voc.tar", files)
        sbd = {"benchmark_RELEASE/dataset/cls/2008_000002.mat": b"mat"}
        yield write_tar(folder / "sbd.tgz", sbd, "w:gz")
    elif data.startswith("pascal_context"):
        base = "VOCdevkit/VOC2010"
        files = {f"{base}/ImageSets/Main/{s}.txt": b"2008_000002\n" for s in ("train", "val")}
        files[f"{base}/JPEGImages/2008_000002.jpg"] = PICTURE
        yield write_tar(folder / "voc2010.tar", {**files, f"./{base}/Annotations/a.xml": b"<a/>"})
        label = mat(LabelMap=np.array([[2, 9, 0], [18, 459, 458]], np.uint16))
        yield write_tar(folder / "trainval.tar.gz", {"./trainval/2008_000002.mat": label}, "w:gz")
    elif data == "coco_stuff_10k":
        name = "COCO_train2014_000000000077"
        files = {f"images/{name}.jpg": PICTURE, f"annotations/{name}.mat": mat(S=LABEL)}
        lists = {f"imageLists/{s}.txt": f"{name}\n".encode() for s in ("train", "test", "all")}
        yield write_zip(folder / "cocostuff-10k-v1.1.zip", {**both, **files, **lists})
    elif data == "coco_stuff_164k":
        for split in ("train2017", "val2017"):
            files = {f"{split}/": b"", f"{split}/000000000139.jpg": PICTURE}
            yield write_zip(folder / f"{split}.zip", files, zipfile.ZIP_STORED)
        maps = {f"{split}/000000000139.png": png(LABEL - 1) for split in ("train2017", "val2017")}
        yield write_zip(folder / "stuffthingmaps_trainval2017.zip", maps)
    else:
        files = {}
        for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
            files[f"ADEChallengeData2016/images/{split}/{name}.jpg"] = PICTURE
            files[f"ADEChallengeData2016/annotations/{split}/{name}.png"] = png(LABEL)
        files["__MACOSX/ADEChallengeData2016/._images"] = b"junk"
        yield write_zip(folder / "ade.zip", files)


LOADERS = {
    "cityscapes": (Cityscapes, ("train", "val")),
    "pascal_voc": (PascalVOC, ("train", "val")),
    "pascal_context": (PascalContext60, ("train", "val")),
    "pascal_context_60": (PascalContext60, ("train", "val")),
    "coco_stuff_10k": (CocoStuff10k, ("train", "test")),
    "coco_stuff_164k": (CocoStuff164k, ("train", "val")),
    "ade20k": (ADE20K, ("train", "val")),
}


@pytest.mark.parametrize("data", [d for d in prepare.LAYOUTS if d != "cityscapes"])
def test_the_config_makes_the_data_set_of_what_is_unpacked(tmp_path, data):
    archives = [f"archive={path}" for path in archives_of(data, tmp_path)]
    prepare.main([f"data={data}", f"root={tmp_path}", *archives])
    config = check(compose(f"data={data}", f"data.root={tmp_path}"), needs_data=True)
    if data == "pascal_voc":  # its training needs 10,582 pictures
        config.data.train_split = "train"
    for split in (config.data.train_split, config.data.val_split):
        dataset = make_dataset(config, split, training=True)
        sample = dataset[0]
        assert sample.image.shape == (480, 480, 3) or data == "pascal_voc"
        assert sample.mask.max() <= 255
        assert len(dataset.classes) == config.data.num_classes


@pytest.mark.parametrize("data", list(prepare.LAYOUTS))
def test_what_is_unpacked_is_where_the_loader_looks(tmp_path, data, capsys):
    archives = list(archives_of(data, tmp_path))
    root = tmp_path / "new" / "root"
    settings = [f"data={data}", f"root={root}", *(f"archive={path}" for path in archives)]
    prepare.main(settings)
    loader, splits = LOADERS[data]
    for split in splits:
        dataset = loader(root=root, split=split)
        assert len(dataset) == 1
        assert dataset.read(0)[1].shape == LABEL.shape
    said = capsys.readouterr().out
    assert f"next: python tools/check_data.py data={data} data.root={root}\n" in said
    assert not [name for name in tree(root) if name.startswith((".", "README", "__"))]
    before = tree(root)
    prepare.main(settings)
    assert "0 files written" in capsys.readouterr().out
    assert tree(root) == before


def test_every_data_set_with_archives_has_a_config():
    configs = {path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")}
    assert set(prepare.LAYOUTS) <= configs


# Archives that must be refused

HOSTILE_TARS = {
    "traversal": ({"name": "images/../../x"}, "leads out"),
    "absolute": ({"name": "/etc/x"}, "absolute path"),
    "symlink": ({"name": "x", "type": tarfile.SYMTYPE, "linkname": "/etc"}, "link to '/etc'"),
    "inner link": ({"name": "x", "type": tarfile.SYMTYPE, "linkname": "images"}, "symbolic link"),
    "hard link": ({"name": "x", "type": tarfile.LNKTYPE, "linkname": "../y"}, "hard link to '../y"),
    "character device": ({"name": "x", "type": tarfile.CHRTYPE}, "a device"),
    "block device": ({"name": "x", "type": tarfile.BLKTYPE}, "a device"),
    "pipe": ({"name": "x", "type": tarfile.FIFOTYPE}, "a pipe"),
    "twice": ({"name": "images/good.jpg"}, "is there twice"),
    "twice, spelt otherwise": ({"name": "./images//good.jpg"}, "is there twice"),
    "capitals": ({"name": "images/Good.jpg"}, "differ only in how letters are written"),
    "folder in capitals": ({"name": "Images/x.jpg"}, "differ only in how"),
    "file below a file": ({"name": "images/good.jpg/x"}, "as a file and as a folder"),
    "file that is a folder": ({"name": "images"}, "as a file and as a folder"),
    "drive": ({"name": "C:/x"}, "absolute path"),
    "backslash": ({"name": "..\\x"}, "backslash or a control"),
    "line break": ({"name": "a\nb"}, "backslash or a control"),
    "long name": ({"name": "a" * 300}, "too long for file systems"),
    "unknown type": ({"name": "x", "type": b"Z"}, "special type|damaged"),
}
HOSTILE_ZIPS = {
    "traversal": ({"name": "../../x"}, "leads out"),
    "absolute": ({"name": "/etc/x"}, "absolute path"),
    "symlink": ({"mode": 0o120777, "content": b"/etc"}, "a symbolic link"),
    "device": ({"mode": 0o020666}, "a device"),
    "pipe": ({"mode": 0o010666}, "a pipe"),
    "encrypted": ({"flag": 1}, "encrypted"),
    "backslash": ({"name": "..\\..\\x"}, "backslash or a control"),
    "zero byte": ({"name": "a\0/../../x"}, "backslash or a control"),
    "capitals": ({"name": "images/GOOD.JPG"}, "differ only in how"),
}


def assert_refused(path, tmp_path, says, limits=DEFAULT_LIMITS):
    """The archive is refused with its name; nothing is written, beside, above or inside."""
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    root = tmp_path / "deep" / "er" / "root"
    with pytest.raises(InputError, match=f"{path.name}: .*({says})") as caught:
        extract(path, root, limits)
    assert "\n" not in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.bad_input("F16")
@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("kind", list(HOSTILE_TARS))
def test_a_tar_with_a_hostile_member_is_refused_whole(tmp_path, kind, mode):
    fields, says = HOSTILE_TARS[kind]
    assert_refused(tar_with(tmp_path / "x.tar", mode, **fields), tmp_path, says)


@pytest.mark.bad_input("F16")
@pytest.mark.parametrize("kind", list(HOSTILE_ZIPS))
def test_a_zip_with_a_hostile_member_is_refused_whole(tmp_path, kind):
    fields, says = HOSTILE_ZIPS[kind]
    assert_refused(zip_with(tmp_path / "x.zip", **fields), tmp_path, says)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_is_refused(tmp_path):
    assert_refused(zip_with(tmp_path / "x.zip", name="images/good.jpg"), tmp_path, "there twice")


def test_accents_written_in_two_ways_are_one_name(tmp_path):
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    path = write_zip(tmp_path / "x.zip", dict.fromkeys(names, b""))
    assert_refused(path, tmp_path, "differ only in how letters")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_whatever_members_are_called_nothing_lands_outside(tmp_path, kind):
    """Names from pieces that matter; what is not refused is inside, with its bytes."""
    pieces = [
        "..",
        ".",
        "",
        "a",
        "A",
        "b.png",
        "/",
        "~",
        "c:",
        "\\",
        "é",
        " ",
        "-",
        "nul",
        "%2e%2e",
    ]
    rng, refused, outside = np.random.default_rng(0), 0, tmp_path / "outside"
    outside.mkdir()
    for i in range(200):
        names = {
            "/".join(rng.choice(pieces, rng.integers(1, 5)).tolist())
            for _ in range(rng.integers(1, 4))
        }
        files = {name: str(j).encode() for j, name in enumerate(sorted(names))}
        path = tmp_path / f"x.{kind}"
        (write_zip if kind == "zip" else write_tar)(path, files)
        root = outside / "deep" / "er" / str(i)
        try:
            done = extract(path, root)
        except InputError:
            refused += 1
            assert not root.exists()
            continue
        found = tree(root) if root.exists() else {}
        assert done.written == len(found)
        assert set(found.values()) <= set(files.values())
    assert 20 < refused < 180
    assert [p.name for p in outside.iterdir()] == ["deep"]
    assert [p.name for p in (outside / "deep").iterdir()] == ["er"]


def test_names_of_any_alphabet_are_unpacked(tmp_path):
    files = {f"图 像/{name}": b"x" for name in ("ß.jpg", "-rf", "🚲.png", "a b.txt", "%00", "ñ'")}
    for path in (write_zip(tmp_path / "x.zip", files), write_tar(tmp_path / "x.tar", files)):
        root = tmp_path / path.suffix
        extract(path, root)
        assert tree(root) == files


@pytest.mark.bad_input("F17")
@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_bomb_is_refused_by_its_table_of_contents(tmp_path, kind):
    files = {f"{i}.png": bytes(2**20) for i in range(4)}
    path = tmp_path / f"x.{kind}"
    write_zip(path, files) if kind == "zip" else write_tar(path, files, "w:gz")
    assert_refused(path, tmp_path, r"unpacks to [\d,]+ or more; at most 200 times its size")
    assert_refused(path, tmp_path, "4,000,000 bytes are unpacked", Limits(10000, 4000000))
    assert extract(path, tmp_path / "root", Limits(10000)).written == 4


@pytest.mark.bad_input("F17")
def test_a_bomb_of_members_that_share_their_bytes_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a": bytes(5000), "b": bytes(5000)})
    content = bytearray(path.read_bytes())
    second = content.index(b"PK\1\2", content.index(b"PK\1\2") + 4)
    content[second + 42 : second + 46] = bytes(4)  # offset of its header: that of the first
    path.write_bytes(content)
    assert_refused(path, tmp_path, "'b' overlaps another|damaged")


@pytest.mark.parametrize("claim", [1, 499, 501, 5000])
def test_a_zip_that_lies_about_a_size_is_refused(tmp_path, claim):
    content = np.random.default_rng(0).bytes(500)
    path = write_zip(tmp_path / "x.zip", {"a.png": b"good", "b.png": content})
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\1\2")
    raw[entry + 24 : entry + 28] = claim.to_bytes(4, "little")
    path.write_bytes(raw)
    assert_refused(path, tmp_path, "damaged or cut off|claims")


def test_a_zip_member_with_a_wrong_checksum_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a.png": b"good", "b.png": b"bad"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"bad", b"bat"))
    assert_refused(path, tmp_path, "damaged or cut off .Bad CRC")


def test_a_tar_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 4 * 2**30
    path.write_bytes(info.tobuf() + bytes(10240))
    assert_refused(path, tmp_path, "a header of 4,294,967,296 bytes")


@pytest.mark.bad_input("F18")
@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_an_archive_cut_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    rng = np.random.default_rng(0)
    files = {f"{i}.png": rng.bytes(300) for i in range(4)}
    if kind == "zip":
        write_zip(path, files)
    else:
        write_tar(path, files, "w:gz" if kind == "tgz" else "w")
    whole = path.read_bytes()
    end = whole.rstrip(b"\0").__len__() // 512 * 512 + 512 if kind == "tar" else len(whole)
    for cut in sorted({0, 1, 100, 512, end - 1, *rng.integers(0, end, 40).tolist()}):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=rf"x.{kind}: (damaged|not a zip|.*claims)"):
            extract(path, tmp_path / "root")
        assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_a_damaged_archive_is_refused_or_unpacked_inside(tmp_path, kind):
    path, rng, refused = tmp_path / f"x.{kind}", np.random.default_rng(1), 0
    files = {f"images/{i}.png": rng.bytes(200) for i in range(3)}
    if kind == "zip":
        write_zip(path, files)
    else:
        write_tar(path, files, "w:gz" if kind == "tgz" else "w")
    whole = path.read_bytes().rstrip(b"\0") + bytes(1024)
    for i in range(50):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(whole) - 1024)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            extract(path, tmp_path / "roots" / str(i))
        except InputError:
            refused += 1
            assert not (tmp_path / "roots" / str(i)).exists()
    assert refused > 10
    assert {p.name for p in tmp_path.iterdir()} <= {path.name, "roots"}


@pytest.mark.bad_input("F18")
def test_a_wrong_checksum_is_shown_with_the_right_one(tmp_path):
    path = write_zip(tmp_path / "ADEChallengeData2016.zip", {"ADEChallengeData2016/x.txt": b"x"})
    found = hashlib.sha1(path.read_bytes()).hexdigest()
    wanted = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
    done = run("data=ade20k", f"archive={path}", f"root={tmp_path / 'root'}", code=2)
    assert f"error: {path}: sha1 is {found}, expected {wanted}" in done.stderr
    assert not (tmp_path / "root").exists()


def test_permissions_of_an_archive_are_not_taken_over(tmp_path):
    path = tar_with(tmp_path / "x.tar", name="images/tool", mode=0o6777, size=5)
    extract(path, tmp_path / "root")
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "root/images/tool").stat().st_mode & 0o7777 == 0o666 & ~umask


# Interruptions


class Stop(BaseException):
    """Ends a run as nothing of ours catches it."""


def stop_after(calls):
    def seen(size):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Stop

    return seen


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_a_run_stopped_anywhere_is_finished_by_the_next(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        write_zip(path, FILES)
    else:
        write_tar(path, FILES, "w:gz" if kind == "tgz" else "w")
    for calls in range(4):
        root = tmp_path / str(calls)
        with pytest.raises(Stop):
            extract(path, root, seen=stop_after(calls))
        assert all(name.startswith(".unpacking-") for name in tree(root))
        done = extract(path, root)
        # Of the empty file nothing is seen, so it is written before the first call.
        assert (done.written, done.resumed) == (5, calls + 1)
        assert tree(root) == FILES


def test_a_run_stopped_while_folders_are_renamed_is_finished_by_the_next(tmp_path, monkeypatch):
    files = {f"{folder}/{i}.txt": folder.encode() for folder in "abc" for i in range(2)}
    path = write_zip(tmp_path / "x.zip", files)
    rename = Path.rename
    for count in range(4):
        root, left = tmp_path / str(count), [count]
        (root / "b").mkdir(parents=True)
        (root / "b" / "mine.txt").write_bytes(b"mine")

        def renames(source, target, left=left):
            if not left[0]:
                raise Stop
            left[0] -= 1
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", renames)
        with pytest.raises(Stop):
            extract(path, root)
        monkeypatch.setattr(Path, "rename", rename)
        extract(path, root)
        assert tree(root) == {**files, "b/mine.txt": b"mine"}


def interrupted(tmp_path):
    """Returns an archive, a root in which two members are done, and the folder they are in."""
    path, root = write_zip(tmp_path / "x.zip", FILES), tmp_path / "root"
    with pytest.raises(Stop):
        extract(path, root, seen=stop_after(2))
    return path, root, root / ".unpacking-x.zip"


def test_what_an_earlier_run_wrote_is_read_again_before_it_counts(tmp_path):
    path, root, stage = interrupted(tmp_path)
    file = stage / "files/images/a/1.jpg"
    assert file.read_bytes() == FILES["images/a/1.jpg"]
    file.write_bytes(b"\0" * file.stat().st_size)
    assert extract(path, root).resumed == 2
    assert tree(root) == FILES


def test_a_journal_line_that_was_cut_counts_for_nothing(tmp_path):
    path, root, stage = interrupted(tmp_path)
    journal = stage / "journal"
    journal.write_bytes(journal.read_bytes()[:-4])
    with pytest.raises(Stop):
        extract(path, root, seen=stop_after(3))
    assert extract(path, root).resumed == 3
    assert tree(root) == FILES


def test_another_archive_of_the_same_name_starts_anew(tmp_path):
    path, root, _ = interrupted(tmp_path)
    others = {name: content[::-1] + b"y" for name, content in FILES.items()}
    write_zip(path, others)
    assert extract(path, root).resumed == 0
    assert tree(root) == others


def test_an_archive_that_is_replaced_by_a_damaged_one_leaves_nothing(tmp_path):
    path, root, stage = interrupted(tmp_path)
    write_zip(path, {"a": b"good", "b": b"bad"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"bad", b"bat"))
    with pytest.raises(InputError, match="damaged"):
        extract(path, root)
    assert not stage.exists()


@pytest.mark.slow
def test_a_killed_process_is_finished_by_the_next_with_every_byte(tmp_path):
    rng = np.random.default_rng(0)
    files = {f"train2017/{i:012d}.jpg": rng.bytes(20000) for i in range(3000)}
    path = write_zip(tmp_path / "train2017.zip", files, zipfile.ZIP_STORED)
    root = tmp_path / "coco"
    settings = ["data=coco_stuff_164k", f"archive={path}", f"root={root}"]
    journal = root / ".unpacking-train2017.zip" / "journal"
    kills = 0
    for lines in (10, 700, 1900):
        process = subprocess.Popen([sys.executable, str(SCRIPT), *settings])
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
        assert not (root / "images").exists() or process.returncode == 0
    assert kills == 3
    done = run(*settings)
    assert "of them by an earlier run" in done.stdout
    assert tree(root) == {f"images/{name}": content for name, content in files.items()}


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    path, root, stage = interrupted(tmp_path)
    with (stage / "journal").open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process unpacks this archive"):
            extract(path, root)
    assert extract(path, root).resumed == 3


# What is there already, and no place


def test_a_file_of_another_size_is_never_written_over(tmp_path):
    path, root = write_zip(tmp_path / "x.zip", FILES), tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "b.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"images/b.txt: is there with 4 bytes, in x.zip it has 9"):
        extract(path, root)
    assert tree(root) == {"images/b.txt": b"mine"}
    (root / "images" / "b.txt").write_bytes(FILES["images/b.txt"])
    done = extract(path, root)
    assert (done.written, done.present) == (4, 1)
    assert tree(root) == FILES


def test_a_disk_without_space_is_noticed_before_a_byte_is_written(tmp_path, monkeypatch):
    path, root = write_zip(tmp_path / "x.zip", FILES), tmp_path / "root"
    usage = unpacking.shutil.disk_usage(tmp_path)._replace(free=20000)
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs 20,531 bytes more there, 20,000 are free"):
        extract(path, root)
    assert not root.exists()
    monkeypatch.undo()
    assert extract(path, root).written == 5


def test_a_disk_that_fills_up_meanwhile_costs_only_the_rest(tmp_path):
    path, root, written = write_zip(tmp_path / "x.zip", FILES), tmp_path / "root", []

    def full(size):
        written.append(size)
        if len(written) == 3:  # the empty file is written without a call
            raise OSError(errno.ENOSPC, "No space left on device", "images/a/3.jpg")

    with pytest.raises(StorageError, match=r"images/a/3.jpg: No space left .* it goes on where"):
        extract(path, root, seen=full)
    assert extract(path, root).resumed == 3
    assert tree(root) == FILES


def test_a_root_that_cannot_be_made_is_a_storage_error(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"ADEChallengeData2016/a.txt": b"x"})
    (tmp_path / "file").write_bytes(b"")
    root = tmp_path / "file" / "root"
    done = run("data=ade20k", f"archive={path}", f"root={root}", code=4)
    assert f"error: root={root}: " in done.stderr
    with pytest.raises(InputError, match="is there and is no folder"):
        prepare.main(["data=ade20k", f"archive={path}", f"root={tmp_path / 'file'}"])


# The command line


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["dta=ade20k"], r"dta=ade20k: there is no such setting; did you mean data=...\?"),
        (["--data=ade20k"], "did you mean data="),
        (["data=ade"], r"data=ade: choices: cityscapes, .*did you mean ade20k\?"),
        (["data="], "data=: no value is given"),
        ([], "data: no value is given; choices: cityscapes"),
        (["data=ade20k", "root=x"], "archive: no value is given; data=ade20k needs\n.*ADEChall"),
        (["data=ade20k", "archive=x"], "root: no value is given"),
        (["data=ade20k", "data=ade20k"], "data: given 2 times"),
        (["data=ade20k", "archive=x", "root=y", "max_gib=0"], "max_gib=0: expected a number above"),
        (["data=ade20k", "archive=x", "root=y", "max_ratio=a"], "max_ratio=a: expected a number"),
        (["data=ade20k", "archive=/no/x", "root=y"], "archive=/no/x: there is no such file"),
        (["data=ade20k", "archive=/", "root=y"], "archive=/: is a folder"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, says):
    with pytest.raises(InputError, match=says):
        prepare.main(settings)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "not a zip, tar or tgz .*<!DOCTYPE.*logged"),
        (b"", "not a zip, tar or tgz .it is empty"),
    ],
)
def test_a_page_saved_as_an_archive_is_recognized(tmp_path, content, says):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match=f"archive={tmp_path / 'x.zip'}: {says}"):
        prepare.main(["data=ade20k", f"archive={tmp_path / 'x.zip'}", "root=/no"])


def test_an_archive_of_another_data_set_is_recognized(tmp_path):
    (path,) = archives_of("ade20k", tmp_path)
    with pytest.raises(InputError, match=r"nothing in it belongs to data=cityscapes; it looks lik"):
        prepare.main(["data=cityscapes", f"archive={path}", f"root={tmp_path / 'root'}"])
    write_zip(path, {"a/train2017/000000000001.jpg": b"", "b/train2017/000000000001.jpg": b""})
    with pytest.raises(InputError, match="holds the data set twice"):
        prepare.main(["data=coco_stuff_164k", f"archive={path}", f"root={tmp_path / 'root'}"])
    assert not (tmp_path / "root").exists()


def test_the_downloads_are_listed_without_torch():
    done = run("data=pascal_voc")
    assert "md5:82b4d87ceb2ed10f6038a1cba92111cb" in done.stdout
    code = (
        "import runpy, sys; sys.argv = ['prepare.py']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='prepare')\n"
        "print(sorted({'torch', 'numpy', 'hydra', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
