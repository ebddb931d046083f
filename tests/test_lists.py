"""Split lists: those that ship are the publishers', those of users are read or refused."""

import pytest

from danet.datasets.lists import SHIPPED, read_list
from danet.errors import InputError

VOC = {"train": 1464, "val": 1449, "test": 1456, "trainaug": 10582, "seg11valid": 736}


def names_of(path):
    return [name for name, _ in read_list(path).names]


def test_the_shipped_lists_are_the_splits_of_the_publication():
    names = {split: names_of(SHIPPED / f"voc2012/{split}.txt") for split in VOC}
    assert {split: len(found) for split, found in names.items()} == VOC
    train, val, test, aug, reduced = map(set, names.values())
    assert train < aug
    assert reduced < val
    assert not aug & val
    assert not (aug | val) & test
    assert names_of(SHIPPED / "voc2012/trainval.txt") == sorted(train | val)


def test_every_shipped_list_can_be_read_and_names_nothing_twice():
    paths = sorted(SHIPPED.rglob("*.txt"))
    assert len(paths) >= 12
    for path in paths:
        assert len(names_of(path)) == len(set(names_of(path)))
        assert path.parent.name in (SHIPPED / "README.md").read_text()


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
