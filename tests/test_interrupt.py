"""Stopped on purpose: what is done is kept, the line that says so names the command that goes on, and is no error."""

import os
import shlex
import signal
import subprocess
import sys

from conftest import sbrush
from sbrush.training import loop


def test_a_stopped_run_says_after_which_step_and_how_to_go_on(tmp_path, tiny_teacher, prompt_file, monkeypatch):
    command = ["distill", prompt_file, "--teacher", tiny_teacher, "--steps", 3, "--batch", 2, "--grid-every", 0,
               "-o", tmp_path / "a run"]  # fmt: skip
    monkeypatch.setattr(loop.Stop, "asked", True)
    stopped = sbrush(*command)
    monkeypatch.undo()
    assert stopped.returncode == 130 and stopped.stdout == "" and "error" not in stopped.stderr
    last = stopped.stderr.splitlines()[-1]
    assert last == f"stopped after step 1, saved; to go on: {shlex.join(['sbrush', *map(str, command)])}"
    assert sbrush(*shlex.split(last.partition("to go on: sbrush ")[2])).returncode == 0


def test_of_several_processes_the_launcher_is_part_of_the_command(tmp_path, tiny_teacher, prompt_file, monkeypatch):
    monkeypatch.setattr(loop.Stop, "asked", True)
    monkeypatch.setattr("sbrush.cli.app._launched", lambda: True)
    stopped = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--steps", 2, "--batch", 2, "--grid-every", 0,
                     "-o", tmp_path / "run")  # fmt: skip
    assert stopped.returncode == 130 and stopped.stderr.endswith("to go on: give the same command again\n")


def test_interrupted_work_that_cannot_go_on_is_an_error_that_says_what_to_do(tmp_path, tiny_teacher, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sbrush.sampling.artist.student_images", interrupt)
    for out in ("x.png", "folder/"):  # of which nothing is written yet
        done = sbrush("sample", "a cat", "--student", tiny_teacher, "-o", f"{tmp_path}/{out}")
        assert done.returncode == 130
        assert done.stderr.splitlines()[-2:] == ["error: interrupted", "hint: give the same command again"]


def test_a_signal_leaves_no_half_written_image(tmp_path, tiny_teacher):
    """In its own process, stopped in the middle of writing an image."""
    program = (
        "import sys, time\n"
        "from sbrush.cli.app import main\n"
        "from sbrush.sampling import images\n"
        "def save(self, file, **options):\n"
        "    open(file, 'wb').write(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "images.Image.Image.save = save\n"
        "main()"
    )
    command = ["sample", "a cat", "--student", str(tiny_teacher), "-o", f"{tmp_path}/o/"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout and running.stdout.readline() == "writing\n"
        assert [name.endswith(".partial") for name in os.listdir(tmp_path / "o")] == [True]
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path / "o") == []
