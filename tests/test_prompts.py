"""Prompt files: what is kept, what is counted, what is refused; the order in which a run sees them."""

import pytest

from sbrush.console import SbrushError
from sbrush.prompts import ShuffledPrompts, make_prompts, read_prompts


def test_blank_and_duplicate_lines_are_dropped_and_counted(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n  a cat  \r\nein Kätzchen\r\n\u3000\r\n".encode())
    prompts = read_prompts(file)
    assert prompts.texts == ("a cat", "ein Kätzchen")
    assert (prompts.blank, prompts.duplicate) == (2, 1)
    assert "2 prompts" in prompts.describe() and "2 blank, 1 duplicate" in prompts.describe()


def test_the_hash_is_of_the_list_not_of_the_file():
    assert make_prompts(["a", "", "b", "a"], "x").sha256 == make_prompts(["a", "b"], "y").sha256
    assert make_prompts(["b", "a"], "x").sha256 != make_prompts(["a", "b"], "x").sha256


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not text"),
        ("a caf\xe9".encode("latin-1"), "not UTF-8 (line 1)"),
        (b"a cat\n" + b"x" * 100_001, "more than 100000 characters"),
    ],
)
def test_what_is_no_prompt_file_is_refused(tmp_path, content, said):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(SbrushError) as refusal:
        read_prompts(file)
    assert said in str(refusal.value) and refusal.value.code == 2 and refusal.value.hint


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, said in ((tmp_path / "none", "no prompt file"), (tmp_path, "is a folder")):
        with pytest.raises(SbrushError, match=said):
            read_prompts(path)


def test_each_epoch_is_another_permutation_fixed_by_the_seed():
    prompts = make_prompts([f"prompt {i}" for i in range(50)], "x")
    one, again, other = ShuffledPrompts(prompts, 1), ShuffledPrompts(prompts, 1), ShuffledPrompts(prompts, 2)
    first, second = [one[i] for i in range(50)], [one[i] for i in range(50, 100)]
    assert sorted(first) == sorted(second) == sorted(prompts.texts)
    assert first != second and first != [other[i] for i in range(50)]
    assert [again[i] for i in range(99, -1, -1)] == [*reversed(second), *reversed(first)]  # whatever is asked first
