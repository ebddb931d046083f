"""Split lists: those that ship are the publishers', those of users are read or refused."""

from collections import Counter

import pytest

from danet.datasets.lists import SHIPPED, read_list
from danet.errors import InputError

COUNTS = {
    "cityscapes": {"train": 2975, "val": 500, "test": 1525},
    "cocostuff10k": {"train": 9000, "test": 1000},
    "pascal_context": {"train": 4998, "val": 5105},
    "voc2012": {
        **{"train": 1464, "val": 1449, "trainval": 2913, "test": 1456},
        **{"trainaug": 10582, "seg11valid": 736},
    },
}


def names_of(path):
    return [name for name, _ in read_list(path).names]


@pytest.mark.parametrize("data_set", COUNTS)
def test_the_shipped_lists_are_as_long_as_published_and_name_nothing_twice(data_set):
    names = {path.stem: names_of(path) for path in (SHIPPED / data_set).glob("*.txt")}
    assert {split: len(found) for split, found in names.items()} == COUNTS[data_set]
    assert {split: len(set(found)) for split, found in names.items()} == COUNTS[data_set]
    assert data_set in (SHIPPED / "README.md").read_text()


def test_the_shipped_lists_are_the_splits_of_the_publications():
    train, val, test, aug, reduced = (
        set(names_of(SHIPPED / f"voc2012/{split}.txt"))
        for split in ("train", "val", "test", "trainaug", "seg11valid")
    )
    assert train < aug
    assert reduced < val
    assert not aug & val
    assert not (aug | val) & test
    assert names_of(SHIPPED / "voc2012/trainval.txt") == sorted(train | val)
    cities = Counter(name.split("/")[0] for name in names_of(SHIPPED / "cityscapes/val.txt"))
    assert cities == {"frankfurt": 267, "lindau": 59, "munster": 174}


def test_a_list_of_a_user_may_have_marks_blanks_and_windows_line_ends(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffein Bild \r\n\r\n  北京/b\t\r\nc\rd\x85e\n\na:b c..d".encode())
    found = read_list(path).names
    assert found == [("ein Bild", 1), ("北京/b", 3), ("c", 4), ("d\x85e", 5), ("a:b c..d", 7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n../../c\n", "list.txt, line 3: the path '../../c' leaves"),
        (b"x\n..\\a", r"line 2: the path .* leaves"),
        (b"a.png\t/b.png", r"line 1: the path .* leaves"),
        (b"\xff\xfe\x00", "not a UTF-8 text"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / "list.txt")
