"""Text that a terminal, a file system or a locale cannot express: it is shown as well as can be, or refused.

Nothing of it ends a command after its work is done.
"""

import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import process, sbrush
from sbrush.storage.files import write_json, write_text

ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-8", "cp932"]
ARGUMENTS = st.binary(min_size=1, max_size=40).filter(lambda b: b"\0" not in b).map(os.fsdecode) | st.text(
    st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=40
)


def assert_ended_well(done) -> None:
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr and "this is a bug" not in done.stderr, done.stderr
    if done.returncode:
        error, hint = done.stderr.splitlines()[-2:]
        assert error.startswith("error: ") and hint.startswith("hint: "), done.stderr


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=ARGUMENTS, name=ARGUMENTS, encoding=st.sampled_from(ENCODINGS), as_json=st.booleans())
def test_any_prompt_any_name_any_terminal(tmp_path_factory, tiny_teacher, prompt, name, encoding, as_json):
    folder = tmp_path_factory.mktemp("any")
    out = f"{folder}/{name.replace('/', '_')}"[:200] + "/"
    command = ["--student", tiny_teacher, "-o", out, *["--json"] * as_json]
    done = sbrush("sample", *command, "--", prompt, PYTHONIOENCODING=encoding)
    assert_ended_well(done)
    if done.returncode:
        assert not list(folder.rglob("*.png"))
        return
    (file,) = folder.rglob("*.png")
    if as_json:
        (entry,) = json.loads(done.stdout)
        assert (Path(entry["path"]), entry["seed"]) == (file, 0)
    else:  # a path is its bytes, whatever the terminal's encoding
        assert done.stdout.encode(encoding, "surrogateescape") == os.fsencode(file) + b"\n"


def test_a_prompt_that_is_no_text_is_refused_and_one_of_another_locale_is_read(tmp_path, tiny_teacher):
    options = ["--student", tiny_teacher, "--json", "-o", f"{tmp_path}/o/"]
    done = sbrush("sample", os.fsdecode(b"caf\xe9"), *options)
    assert done.returncode == 2 and "error: the prompt caf\\xe9 is not UTF-8 text" in done.stderr
    cat = "\u732b".encode().decode("ascii", "surrogateescape")  # what Python makes of it in the C locale
    assert json.loads(sbrush("sample", cat, *options).stdout)[0]["prompt"] == "\u732b"


def test_distill_with_names_that_are_no_text(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = Path(os.fsdecode(b"pr\xe9.txt"))
    prompts.write_text("a cat\na \u732b\n", encoding="utf-8")
    options = ["--steps", 1, "--batch", 2, "--grid-every", 0]
    done = sbrush("distill", prompts, "--teacher", tiny_teacher, *options, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/pr_/student\n" and "pr\\xe9.txt" in done.stderr
    assert sbrush("distill", prompts, "--teacher", tiny_teacher, *options).returncode == 0  # the same run
    assert sbrush("sample", "a cat", "--student", "runs/pr_", PYTHONIOENCODING="ascii").returncode == 0
    for flag in ("--out", "--teacher", "--init"):
        Path(os.fsdecode(b"caf\xe9")).mkdir(exist_ok=True)
        refused = sbrush("distill", prompts, flag, os.fsdecode(b"caf\xe9"))
        assert refused.returncode == 2 and "error: the name caf\\xe9 is not UTF-8" in refused.stderr
    refused = sbrush("merge", "runs/pr_", "runs/pr_", "-o", os.fsdecode(b"m\xe9"))
    assert refused.returncode == 2 and "error: the name m\\xe9 is not UTF-8" in refused.stderr


@pytest.mark.parametrize("command", [["--help"], ["eval", "--help"], ["sample", "\u732b", "--device", "\u732b"]])
def test_a_terminal_that_is_ascii(command):
    done = process(*command, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert_ended_well(done) if done.returncode else None
    assert done.stdout.isascii() and done.stderr.isascii() and len(done.stdout + done.stderr) > 50


def test_files_hold_any_name(tmp_path):
    name = os.fsdecode(b"caf\xe9 ") + "\u732b"
    write_json(tmp_path / "a.json", {"name": name})
    write_text(tmp_path / "a.txt", name)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": name}
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\\udce9 \u732b"


@given(st.text(string.printable + "\u732b\udce9\U0001f408"))
def test_json_is_json_in_every_encoding(text):
    import io

    from sbrush import console

    for encoding in ENCODINGS:
        with pytest.MonkeyPatch.context() as patch:
            stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
            patch.setattr("sys.stdout", stream)
            console.prepare_streams()
            console.out_json([text])
            assert json.loads(stream.buffer.getvalue().decode(encoding)) == [text]
