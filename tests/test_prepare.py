"""Official archives land where the loaders look; hostile ones leave no trace; a kill is mended."""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import ROOT
from PIL import Image
from test_config import compose
from test_reproduce import script

from danet.config.build import make_dataset
from danet.config.validate import check
from danet.errors import InputError, StorageError

SCRIPT = ROOT / "scripts" / "prepare.py"
prepare = script("prepare")
archives = sys.modules["archives"]  # beside it

KINDS = ["zip", "tar", "tgz"]
FILES = {f"images/a/{i}.jpg": bytes([i]) * (7 * i) for i in range(4)} | {"images/b.txt": b"x" * 9}
"""What the tests about interruptions unpack."""


def pack(path, files, compression=zipfile.ZIP_DEFLATED, *, name="", content=b"", flag=0, **fields):
    """Writes an archive of the kind that its name says, and a member with these fields if named."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            for member, data in files.items():
                archive.writestr(zipfile.ZipInfo(member), data, compression)
            if name:
                info = zipfile.ZipInfo("bad")
                info.filename, info.external_attr = name, fields.get("mode", 0) << 16
                archive.writestr(info, content)
                info.flag_bits |= flag
        return path
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if name:
            info = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info)
    return path


def pack_odd(path, name="bad", **fields):
    """Writes an archive of a good file and a member with these fields."""
    return pack(path, {"images/gööd.jpg": b"abc"}, name=name, **fields)


def tree(root):
    """Returns relative path -> content of every file, hidden ones too."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def extract(path, root, limits=archives.DEFAULT_LIMITS, seen=lambda size: None):
    sizes = archives.read_table(path, limits)
    return archives.unpack(path, sizes, {member: member for member in sizes}, root, seen)


# Archives as published

LABEL = np.array([[7, 8, 11], [11, 8, 7]], np.uint8)


def encoded(save, *values):
    file = io.BytesIO()
    save(file, *values)
    return file.getvalue()


CONTEXT = np.array([[2, 9, 0], [18, 459, 458]], np.uint16)
CONTENTS = {
    "jpeg": encoded(Image.new("RGB", LABEL.shape[::-1]).save, "JPEG"),
    "png": encoded(Image.new("RGB", LABEL.shape[::-1]).save, "PNG"),
    "label": encoded(Image.fromarray(LABEL).save, "PNG"),
    "label-1": encoded(Image.fromarray(LABEL - 1).save, "PNG"),
    "S": encoded(scipy.io.savemat, {"S": LABEL}),
    "LabelMap": encoded(scipy.io.savemat, {"LabelMap": CONTEXT}),
}
PUBLISHED = """
cityscapes left.zip README text
cityscapes left.zip leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png png
cityscapes left.zip leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png png
cityscapes fine.zip README another
cityscapes fine.zip gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png label
cityscapes fine.zip gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png label
pascal_voc voc.tar VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt 2007_000032
pascal_voc voc.tar VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt 2007_000032
pascal_voc voc.tar VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg jpeg
pascal_voc voc.tar VOCdevkit/VOC2012/SegmentationClass/2007_000032.png label
pascal_voc sbd.tgz benchmark_RELEASE/dataset/cls/2008_000002.mat text
pascal_context voc2010.tar VOCdevkit/VOC2010/ImageSets/Main/train.txt 2008_000002
pascal_context voc2010.tar VOCdevkit/VOC2010/ImageSets/Main/val.txt 2008_000002
pascal_context voc2010.tar VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg jpeg
pascal_context voc2010.tar ./VOCdevkit/VOC2010/Annotations/a.xml text
pascal_context trainval.tar.gz ./trainval/2008_000002.mat LabelMap
coco_stuff_10k 10k.zip README text
coco_stuff_10k 10k.zip images/COCO_train2014_000000000077.jpg jpeg
coco_stuff_10k 10k.zip annotations/COCO_train2014_000000000077.mat S
coco_stuff_10k 10k.zip imageLists/train.txt COCO_train2014_000000000077
coco_stuff_10k 10k.zip imageLists/test.txt COCO_train2014_000000000077
coco_stuff_164k train2017.zip train2017/
coco_stuff_164k train2017.zip train2017/000000000139.jpg jpeg
coco_stuff_164k val2017.zip val2017/000000000139.jpg jpeg
coco_stuff_164k maps.zip train2017/000000000139.png label-1
coco_stuff_164k maps.zip val2017/000000000139.png label-1
ade20k ade.zip ADEChallengeData2016/images/training/ADE_train_00000001.jpg jpeg
ade20k ade.zip ADEChallengeData2016/images/validation/ADE_val_00000001.jpg jpeg
ade20k ade.zip ADEChallengeData2016/annotations/training/ADE_train_00000001.png label
ade20k ade.zip ADEChallengeData2016/annotations/validation/ADE_val_00000001.png label
ade20k ade.zip __MACOSX/ADEChallengeData2016/._images text
"""
"""Data set, archive, true name of a member, and its content: a key of CONTENTS or a text."""


def published(data, folder):
    """Writes the archives of a data set, with a few of their files."""
    archives = {}
    for line in PUBLISHED.splitlines():
        name, archive, member, *content = [*line.split(), "", "", ""][:4]
        if name and data in (name, f"{name}_60"):
            (content,) = content
            found = CONTENTS.get(content, content.encode())
            archives.setdefault(archive, {})[member] = found
    return [pack(folder / name, files) for name, files in archives.items()]


@pytest.mark.parametrize("data", prepare.LAYOUTS)
def test_what_is_unpacked_is_where_the_config_looks(tmp_path, data, capsys):
    paths = published(data, tmp_path)
    root = tmp_path / "new" / "root"
    settings = [f"data={data}", f"root={root}", *(f"archive={path}" for path in paths)]
    prepare.main(settings)
    assert f"next: python tools/check_data.py data={data} data.root={root}\n" in (
        capsys.readouterr().out
    )
    before = tree(root)
    assert not [name for name in before if name.startswith((".", "README", "__"))]
    prepare.main(settings)
    assert "0 files written" in capsys.readouterr().out
    assert tree(root) == before
    sizes = ["data.crop=[64,64]"]
    config = check(compose(f"data={data}", f"data.root={root}", *sizes), needs_data=True)
    if data == "pascal_voc":  # its training needs 10,582 pictures
        config.data.train_split = "train"
    for split in (config.data.train_split, config.data.val_split):
        dataset = make_dataset(config, split, training=True)
        assert dataset[0].image.shape == (64, 64, 3)
        assert len(dataset.classes) == config.data.num_classes


# Archives that must be refused

ODD_NAME = "absolute, empty, too long, or has .., a backslash or a control character"
HOSTILE = {
    ODD_NAME: [
        *("images/../../x", "images/../x", "/etc/x", "C:/x", "..\\..\\x", "a\nb", ".", "a" * 300)
    ],
    "is there twice": ["images/gööd.jpg", "./images//gööd.jpg"],
    "'images/gööd.jpg' are one name in two ways": [
        *("images/GÖÖD.JPG", "images/go\u0308o\u0308d.jpg", "images/gööd.jpg/x")
    ],
    "'images/' are one name in two ways": ["Images/x.jpg", "images"],
}
NAMES = [({"name": name}, says) for says, names in HOSTILE.items() for name in names]
TARS = [
    ({"name": "x", "type": tarfile.SYMTYPE, "linkname": "/etc"}, "'x' is a link"),
    ({"name": "x", "type": tarfile.SYMTYPE, "linkname": "images"}, "'x' is a link"),
    ({"name": "x", "type": tarfile.LNKTYPE, "linkname": "../y"}, "'x' is a link"),
    ({"type": tarfile.CHRTYPE}, "'bad' is a special file"),
    ({"type": tarfile.BLKTYPE}, "'bad' is a special file"),
    ({"type": tarfile.FIFOTYPE}, "'bad' is a special file"),
    ({"type": b"Z"}, "special|damaged"),
]
ZIPS = [
    ({"mode": 0o120777, "content": b"/etc"}, "'bad' is a link or special"),
    ({"mode": 0o020666}, "is a link or special"),  # a device
    ({"mode": 0o010666}, "is a link or special"),  # a pipe
    ({"flag": 1}, "is a link or special"),  # encrypted
    ({"name": "a\0/../../x"}, ODD_NAME),
]


def assert_refused(path, tmp_path, says, limits=archives.DEFAULT_LIMITS):
    """The archive is refused with its name; nothing is written, beside, above or inside."""
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=f"{path.name}: .*({says})") as caught:
        extract(path, tmp_path / "deep" / "er" / "root", limits)
    assert "\n" not in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


MEMBERS = [
    *((suffix, *case) for suffix in ("tar", "tgz") for case in NAMES + TARS),
    *(("zip", *case) for case in NAMES + ZIPS),
]


@pytest.mark.bad_input("F16")
@pytest.mark.fault("T49", "an archive with members that lead out, links or devices")
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("suffix", "fields", "says"), MEMBERS)
def test_an_archive_with_a_hostile_member_is_refused_whole(tmp_path, suffix, fields, says):
    assert_refused(pack_odd(tmp_path / f"x.{suffix}", **fields), tmp_path, says)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_any_alphabet_are_unpacked_without_permissions(tmp_path, kind):
    names = ("ß.jpg", "-rf", "🚲.png", "a b.txt", "%00", "ñ'")
    files = {f"图 像/{name}": b"x" for name in names}
    extract(pack(tmp_path / f"x.{kind}", files), tmp_path / "root")
    assert tree(tmp_path / "root") == files
    umask = os.umask(0o022)
    os.umask(umask)
    extract(pack_odd(tmp_path / "x.tar", name="images/tool", mode=0o6777), tmp_path / "root")
    assert (tmp_path / "root/images/tool").stat().st_mode & 0o7777 == 0o666 & ~umask


@pytest.mark.bad_input("F17")
@pytest.mark.fault("T48", "a small picture or archive that unpacks to gigabytes")
@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_bomb_is_refused_by_its_table_of_contents(tmp_path, kind):
    path = pack(tmp_path / f"x.{kind}", {f"{i}.png": bytes(2**20) for i in range(4)})
    assert_refused(path, tmp_path, r"unpacks to [\d,]+ or more; at most 200 times its size")
    assert_refused(path, tmp_path, "4,000,000 bytes are unpacked", archives.Limits(10000, 4000000))
    most = archives.Limits(10000, members=3)
    assert_refused(path, tmp_path, "4 or more members, .*, 3 members", most)
    assert extract(path, tmp_path / "root", archives.Limits(10000)) == 4


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("claim", [1, 499, 500, 501, 5000])
def test_a_zip_with_a_wrong_size_or_checksum_is_refused(tmp_path, claim, method):
    content = np.random.default_rng(0).bytes(500)
    path = pack(tmp_path / "x.zip", {"a": b"good", "b": content}, method)
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\1\2")
    raw[entry + 24 : entry + 28] = claim.to_bytes(4, "little")
    raw[raw.index(b"b", 40) + 60] ^= claim == 500
    path.write_bytes(raw)
    assert_refused(path, tmp_path, "damaged, cut off")


def test_a_tar_header_of_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 4 * 2**30
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(10240))
    assert_refused(tmp_path / "x.tar", tmp_path, "a header or an end of more than 1,048,576 bytes")


@pytest.mark.bad_input("F18")
@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_cut_or_damaged_anywhere_is_refused_or_unpacked_inside(tmp_path, kind):
    rng, refused = np.random.default_rng(0), 0
    path = pack(tmp_path / f"x.{kind}", {f"images/{i}.png": rng.bytes(300) for i in range(4)})
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(1024 - len(whole) % 512) if kind == "tar" else b""
    end = len(whole) - 512 * (kind == "tar")
    for cut in sorted({0, 1, 100, 512, end - 1, *rng.integers(0, end, 40).tolist()}):
        path.write_bytes(whole[:cut])
        assert_refused(path, tmp_path, "damaged, cut off, or no zip, tar or tgz")
    for i in range(50):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(end)] = rng.integers(256)
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
    path = pack(tmp_path / "ADEChallengeData2016.zip", {"ADEChallengeData2016/x.txt": b"x"})
    found = hashlib.sha1(path.read_bytes()).hexdigest()
    wanted = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
    says = rf"{path}: sha1 is {found}, expected {wanted}: .*; fetch it again \(an archive you"
    with pytest.raises(InputError, match=says):
        prepare.main(["data=ade20k", f"archive={path}", f"root={tmp_path / 'root'}"])
    assert not (tmp_path / "root").exists()
    own = path.rename(tmp_path / "mine.zip")
    prepare.main(["data=ade20k", f"archive={own}", f"root={tmp_path / 'root'}"])
    assert (tmp_path / "root/ADEChallengeData2016/x.txt").exists()


def test_a_python_without_filters_unpacks_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(InputError, match=r"take 3\.10\.12, 3\.11\.4, 3\.12 or later"):
        archives.read_table(pack(tmp_path / "x.zip", FILES))


# Interruptions


class Stop(BaseException):
    """Ends a run as nothing of ours catches it."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_anywhere_leaves_nothing_and_is_finished_by_the_next(tmp_path, kind):
    path, root = pack(tmp_path / f"x.{kind}", FILES), tmp_path / "deep" / "root"
    for left in range(5):

        def seen(size):
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop

        with pytest.raises(Stop):
            extract(path, root, seen=seen)
        assert not root.parent.exists()
    assert extract(path, root) == 5
    assert tree(root) == FILES


def test_a_run_stopped_while_files_are_renamed_is_finished_by_the_next(tmp_path, monkeypatch):
    path, rename = pack(tmp_path / "x.zip", FILES), Path.rename
    for count in range(5):
        root, left = tmp_path / str(count), [None] * count
        (root / "images").mkdir(parents=True)
        (root / "images" / "mine.txt").write_bytes(b"mine")

        def renames(source, target, left=left):
            if not left:
                raise Stop
            left.pop()
            return rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", renames)
            with pytest.raises(Stop):
                extract(path, root)
        assert extract(path, root) == 5 - count
        assert tree(root) == {**FILES, "images/mine.txt": b"mine"}


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path):
    path, root = pack(tmp_path / "x.zip", FILES), tmp_path / "root"

    def again(size):
        with pytest.raises(InputError, match="another process unpacks this archive"):
            extract(path, root)

    assert extract(path, root, seen=again) == 5
    assert tree(root) == FILES


# What is there already, and no place


def test_a_file_of_another_size_is_never_written_over(tmp_path):
    path, root = pack(tmp_path / "x.zip", FILES), tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "b.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"images/b.txt: is there with 4 bytes, in x.zip it has 9"):
        extract(path, root)
    assert tree(root) == {"images/b.txt": b"mine"}
    (root / "images" / "b.txt").write_bytes(FILES["images/b.txt"])
    assert extract(path, root) == 4
    assert tree(root) == FILES


def test_a_disk_without_space_is_named_before_or_meanwhile(tmp_path, monkeypatch):
    def full(size):
        raise OSError(errno.ENOSPC, "No space left on device", "images/a/3.jpg")

    path, root = pack(tmp_path / "x.zip", FILES), tmp_path / "root"
    usage = shutil.disk_usage(tmp_path)._replace(free=50)
    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StorageError, match=r"x.zip needs 51 bytes more there, 50 are free"):
            extract(path, root)
    with pytest.raises(
        StorageError, match=r"images/a/3.jpg: No space left .* x.zip is unpacked from the start"
    ):
        extract(path, root, seen=full)
    assert not root.exists()
    assert extract(path, root) == 5


def test_a_root_that_cannot_be_made_is_a_storage_error(tmp_path):
    path = pack(tmp_path / "x.zip", {"ADEChallengeData2016/a.txt": b"x"})
    (tmp_path / "file").write_bytes(b"")
    root = tmp_path / "file" / "root"
    with pytest.raises(StorageError, match=f"^{root}"):
        prepare.main(["data=ade20k", f"archive={path}", f"root={root}"])
    with pytest.raises(InputError, match="is there and is no folder"):
        prepare.main(["data=ade20k", f"archive={path}", f"root={tmp_path / 'file'}"])


# The command line


def test_what_is_another_file_is_recognized(tmp_path):
    path, root = tmp_path / "x.zip", tmp_path / "root"
    path.write_bytes(b"<!DOCTYPE html><html>Please log in</html>")
    with pytest.raises(InputError, match=r"x.zip: .*no zip, tar or tgz .*<!DOCTYPE.*logging in"):
        prepare.main(["data=ade20k", f"archive={path}", f"root={root}"])
    (path,) = published("ade20k", tmp_path)
    with pytest.raises(InputError, match=r"nothing in it belongs to data=cityscapes; it looks lik"):
        prepare.main(["data=cityscapes", f"archive={path}", f"root={root}"])
    pack(path, {"a/train2017/000000000001.jpg": b"", "b/train2017/000000000001.jpg": b""})
    with pytest.raises(InputError, match="holds the data set twice"):
        prepare.main(["data=coco_stuff_164k", f"archive={path}", f"root={root}"])
    assert not root.exists()


def test_the_downloads_are_listed_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['prepare.py', 'data=pascal_voc']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally: print(sorted({'torch', 'numpy', 'hydra', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "md5:82b4d87ceb2ed10f6038a1cba92111cb" in done.stdout
    assert done.stdout.endswith("\n[]\n")
