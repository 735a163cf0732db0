"""Prompts from pipes and in other encodings: what is read, and the command that converts what is not."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conftest import process, sbrush
from sbrush.console import SbrushError
from sbrush.prompts import make_prompts, read_prompts
from sbrush.prompts.encoding import guess

TEXTS = {  # a few lines of each, in the encodings that the language's files are in
    "un café à Orléans\nune forêt très enneigée\n": ["latin-1", "cp1252", "mac_roman"],
    "ein süßes Kätzchen\nGrüne Äpfel im Körbchen\n": ["latin-1", "mac_roman"],
    "un niño con una piñata\n¿qué hace el león?\n": ["latin-1"],
    "a “red” dog’s house – big…\n": ["cp1252", "mac_roman"],
    "żółta łódka na jeziorze\nczarny kot śpi\n": ["cp1250"],
    "kırmızı bir kedi ağaçta\ngüneşli bir gün\n": ["cp1254"],
    "красный кот сидит на траве\nбольшая собака в лесу\n": ["cp1251", "koi8_r", "cp866", "utf_16_le", "utf_16_be"],
    "μια κόκκινη γάτα στο γρασίδι\n": ["cp1253"],
    "חתול אדום יושב על הדשא\n": ["cp1255"],
    "قطة حمراء على العشب\n": ["cp1256"],
    "แมวสีแดงบนสนามหญ้า\n": ["cp874"],
    "一只红色的猫坐在草地上\n雪山下的小木屋，油画风格\n": ["gb18030", "utf_16_le", "utf_16_be"],
    "一隻紅色的貓坐在草地上\n雪山下的小木屋，油畫風格\n": ["big5"],
    "草の上に座っている赤い猫\n雪山のふもとの小さな木の家\n": ["cp932", "euc_jp"],
    "풀밭 위에 앉아 있는 빨간 고양이\n눈 덮인 산 아래 작은 오두막\n": ["cp949"],
    "a cat\na dog\n": ["utf_16_le", "utf_16_be"],
}


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
@pytest.mark.parametrize(("text", "encoding"), [(text, name) for text, names in TEXTS.items() for name in names])
def test_the_hint_is_a_command_that_truly_converts(tmp_path, text, encoding):
    file = tmp_path / "it's mine.csv"
    file.write_bytes(("prompt\n" + text).encode(encoding))
    with pytest.raises(SbrushError, match="is not UTF-8") as refusal:
        read_prompts(file)
    assert text.split("\n")[0] in str(refusal.value) or encoding.startswith("utf_16")  # it is shown as it would read
    command = refusal.value.hint.partition(": ")[2]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert read_prompts(tmp_path / "utf8.csv").texts == tuple(text.split("\n")[:-1])


def test_what_is_no_text_is_no_encoding(tmp_path):
    import random

    for seed in range(20):
        assert guess(random.Random(seed).randbytes(400)) is None
    file = tmp_path / "x.txt"
    for content, said in (
        (b"\x1f\x8b\x08\0rest", "is a gzip archive, not text"),
        (b"PK\x03\x04\0\0\xff", "is a zip archive or a spreadsheet"),
        (b"PAR1\0\xff", "is a Parquet file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not text"),
        (b"a cat\0\n", "NUL bytes"),
        (b"\xff\xfe\x00", "begins as UTF-16, and its byte 3 is none"),
        (b"\x80\x81\x82\xff\xfe\n", "is not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(SbrushError, match=said) as refusal:
            read_prompts(file)
        assert refusal.value.code == 2 and refusal.value.hint
    file.write_bytes(b"\x1f\x8b\x08\0")
    with pytest.raises(SbrushError) as refusal:
        read_prompts(file)
    assert refusal.value.hint == f"zcat {shlex.quote(str(file))} | sbrush ... -"


def piped(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_the_standard_input(monkeypatch):
    piped(monkeypatch, "prompt,id\na cat,1\n".encode("utf-16"))
    prompts = read_prompts(Path("-"))
    assert prompts.texts == ("a cat",) and prompts.source == "standard input" and prompts.stem == "prompts"
    for content, said in ((b"", "is empty"), (b"\n", "holds no prompt")):
        piped(monkeypatch, content)
        with pytest.raises(SbrushError, match=said):
            read_prompts(Path("-"))
    piped(monkeypatch, "a café\n".encode("latin-1"))
    with pytest.raises(SbrushError) as refusal:
        read_prompts(Path("-"))
    assert refusal.value.hint.endswith("... | iconv -f WINDOWS-1252 -t UTF-8 | sbrush ... -")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SbrushError, match="closed"):
        read_prompts(Path("-"))


def test_of_several_processes_none_reads_a_pipe(monkeypatch):
    piped(monkeypatch, b"a cat\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SbrushError, match="by one process only"):
        read_prompts(Path("-"))


def test_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a cat\na dog\n",))
    writer.start()
    prompts = read_prompts(tmp_path / "pipe")
    writer.join()
    assert prompts.texts == ("a cat", "a dog") and prompts.stem == "prompts"


def test_what_a_shell_hands_over(tmp_path):
    """<(...), | and <, each in a true shell; the run is one, so the second goes on with the first."""
    program = (
        "import sys, pathlib; from sbrush.prompts import read_prompts; p = read_prompts(pathlib.Path(sys.argv[1]))\n"
    )
    program += "print(p.source, p.stem, *p.texts, sep='|')"
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    python = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    for command, source in (
        (f"{python} <(cat p.txt)", "pipe"),
        (f"cat p.txt | {python} -", "standard input"),
        (f"cat p.txt | {python} /dev/stdin", "standard input"),
        (f"{python} /dev/stdin < p.txt", "standard input"),
        (f"{python} - < p.txt", "standard input"),
    ):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout == f"{source}|prompts|a cat|a dog\n", done.stderr


def test_a_run_from_a_pipe_goes_on_with_the_same_prompts(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = "--teacher", tiny_teacher, "--batch", 2, "--grid-every", 0, "--student-lora", 2, "--steps", 1
    piped(monkeypatch, b"a cat\na dog\n")
    first = sbrush("distill", "-", *shape)
    assert first.returncode == 0, first.stderr
    config = json.loads((tmp_path / "runs" / "prompts" / "config.json").read_text())
    expected = make_prompts(["a cat", "a dog"], "")
    assert config["prompts"] == {"source": "standard input", "sha256": expected.sha256, "count": 2}
    piped(monkeypatch, b"a cat\na dog\n")
    assert sbrush("distill", "-", *shape, "--extend", 1).returncode == 0
    piped(monkeypatch, b"a cat\na bird\n")
    other = sbrush("distill", "-", *shape)
    assert other.returncode == 2 and "prompts.sha256" in other.stderr


def test_a_prompt_file_is_refused_before_torch(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    for file, said in (("none.txt", "no prompt file"), ("x.csv", "no column"), (".", "is a folder")):
        for command in (("distill", tmp_path / file), ("sample", "--prompts", tmp_path / file)):
            done = process(*command, PYTHONPROFILEIMPORTTIME="1")
            assert done.returncode == 2 and said in done.stderr and "import time" in done.stderr
            assert " torch\n" not in done.stderr
