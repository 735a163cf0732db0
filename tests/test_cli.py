"""The command line: quick answers without torch, one error and one hint for bad input, exit codes, clean stdout."""

import json
import subprocess
import sys

import pytest

from conftest import sbrush


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["distill", "--help"], 0),
        (["sample", "a cat", "--no-such-flag"], 2),
        (["distill", "missing.txt"], 2),
        (["sample"], 2),
        (["sample", "a cat", "--seed", "8-1"], 2),
        (["eval", "--limit", "many"], 2),
    ],
)
def test_cheap_answers_do_not_import_torch(arguments, code):
    program = (
        "import sys; sys.argv[0] = 'sbrush'\n"
        "from sbrush.cli.app import main\n"
        "try: main()\n"
        "finally: print('HEAVY', sorted(set(sys.modules) & {'torch', 'numpy', 'PIL', 'diffusers', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert "HEAVY []" in done.stdout


def assert_refused(done, said, code=2):
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), done.stderr
    assert said in lines[0] and len(lines[1]) > 10
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such-flag"], "No such option"),
        (["distil"], "distill"),
        (["distill"], "no prompts"),
        (["distill", "missing.txt"], "does not exist"),
        (["distill", "."], "is a folder"),
        (["distill", "p.txt", "--recipe", "mine"], "mine"),
        (["distill", "p.txt", "--steps", "0"], "--steps"),
        (["sample"], "no prompt"),
        (["sample", " "], "empty prompt"),
        (["sample", "a cat", "--seed", "x"], "not a range of seeds: x"),
        (["sample", "--prompts", "missing.txt"], "does not exist"),
    ],
)
def test_a_wrong_command_line_gets_one_error_and_one_hint(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    assert_refused(sbrush(*arguments), said)
    assert [p.name for p in tmp_path.iterdir()] == ["p.txt"]


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["distill", "binary.txt"], "not text", 2),
        (["distill", "latin.txt"], "not UTF-8", 2),
        (["distill", "empty.txt"], "holds no prompt", 2),
        (["distill", "p.txt", "--teacher", "notes"], "is no Stable Diffusion model", 2),
        (["distill", "p.txt", "--teacher", "p.txt"], "is a file", 2),
        (["distill", "p.txt", "--device", "tpu"], "", 2),
        (["distill", "p.txt", "--out", "notes"], "no run of sbrush", 2),
        (["distill", "p.txt", "--out", "/proc/none"], "cannot write", 1),
        (["sample", "a cat", "--student", "notes"], "is no Stable Diffusion model", 2),
        (["sample", "a cat", "-o", "x.jpg"], "images are PNG", 2),
        (["sample", "a cat", "-o", "/proc/none/x.png"], "cannot write", 1),
        (["eval", "--student", "notes"], "is no Stable Diffusion model", 2),
        (["eval", "--report", "none/report.html"], "cannot write", 2),
    ],
)
def test_bad_input_is_refused_and_nothing_is_damaged(tmp_path, monkeypatch, arguments, said, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0\0")
    (tmp_path / "latin.txt").write_bytes("ein K\xe4tzchen\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert_refused(sbrush(*arguments), said, code)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_distill_then_sample_from_the_command_line(tmp_path, tiny_teacher, prompt_file):
    run = tmp_path / "run"
    options = ["--teacher", tiny_teacher, "--steps", 2, "--batch", 2, "--out", run, "--precision", "float32"]
    done = sbrush("distill", prompt_file, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(run / "student")]  # data on stdout, talk on stderr
    assert "1 blank, 1 duplicate" in done.stderr and "next: sbrush sample" in done.stderr
    image = tmp_path / "cat.png"
    done = sbrush("sample", "a cat", "--student", run, "-o", image)
    assert done.returncode == 0 and done.stdout.splitlines() == [str(image)] and image.stat().st_size > 500
    changed = sbrush("distill", prompt_file, *options, "--seed", 5)
    assert_refused(changed, "seed was 0, now 5")


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, tiny_teacher, prompt_file):
    command = ["distill", prompt_file, "--teacher", tiny_teacher, "--out", tmp_path / "run", "--steps", 500]
    done = sbrush(*command, "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "run").exists()
    for said in ("recipe: swiftbrush, with steps 500 (244000)", "expected peak", "9 UNet forwards of"):
        assert said in done.stdout
    assert len(done.stdout.splitlines()) < 40


def test_recipes_stand_side_by_side(prompt_file):
    table = sbrush("distill", prompt_file, "--recipes").stdout
    for said in ("swiftbrush", "stickers", "student_lr", "244000", "lcm", "stickers-guided", "this run"):
        assert said in table


def test_a_dry_run_plans_for_a_card_that_is_elsewhere(tiny_teacher, prompt_file):
    plan = ("distill", prompt_file, "--teacher", tiny_teacher, "--dry-run", "--ema-on-cpu", "--device")
    card, here = sbrush(*plan, "cuda"), sbrush(*plan, "cpu")
    assert "device: cuda, bfloat16" in card.stdout and "student's weights, bfloat16 copy" in card.stdout
    assert card.returncode == here.returncode == 0 and "hours at" in card.stdout and "hours" not in here.stdout
    assert_refused(sbrush(*plan, "warp"), "no such device")


def test_terminal_escapes_in_names_are_not_obeyed(tmp_path):
    done = sbrush("distill", tmp_path / "\x1b[31mred\x07.txt")
    assert done.returncode == 2 and "\x1b" not in done.stderr and "\x07" not in done.stderr
    assert "\\x1b" in done.stderr


def test_debug_shows_the_traceback(tmp_path):
    done = sbrush("distill", tmp_path / "none.txt", SBRUSH_DEBUG="1")
    assert "Traceback" in done.stderr and done.returncode == 2


def test_eval_json_is_clean(tmp_path, tiny_stickers):
    done = sbrush("eval", "--student", tiny_stickers, "--teacher", tiny_stickers, "--limit", 100, "--diversity", 2,
                  "--teacher-steps", 2, "--report", tmp_path / "r.html", "--json",
                  XDG_CACHE_HOME=str(tmp_path / "cache"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "r.html").stat().st_size > 1000
