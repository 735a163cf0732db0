"""Files are there whole or not at all."""

import json

import pytest

from sbrush.storage.files import atomic_write, write_json, write_text


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), atomic_write(file) as partial:
        partial.write_text("half of the n")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with atomic_write(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old" and partial.parent == tmp_path  # beside it: a rename must not cross disks
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_json_is_utf_8_and_has_no_nan(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"prompt": "猫"})
    assert "猫" in file.read_text(encoding="utf-8") and json.loads(file.read_text(encoding="utf-8")) == {"prompt": "猫"}
    with pytest.raises(ValueError):
        write_json(file, float("nan"))
    assert json.loads(file.read_text(encoding="utf-8")) == {"prompt": "猫"}


def test_who_has_the_old_file_open_reads_it_to_its_end(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with file.open() as reading:
        write_text(file, "new")
        assert reading.read() == "old"
