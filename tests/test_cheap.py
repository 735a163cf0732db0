"""What is plainly wrong is refused at once: before torch, numpy, Pillow or diffusers are imported."""

import json
import subprocess
import sys

HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers", "safetensors", "huggingface_hub", "matplotlib"}
PROGRAM = """
import contextlib, io, json, sys
from sbrush.cli.app import main
for arguments in json.load(sys.stdin):
    sys.argv = ["sbrush", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as left:
            code = left.code
    print(json.dumps([code, said.getvalue(), sorted(set(sys.modules) & HEAVY)]))
"""
CASES = {
    "sample": [
        ([], "no prompt"),
        ([" "], "an empty prompt"),
        (["a cat", "--seed", "8-1"], "not a range of seeds"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["a cat", "--prompts", "."], "folder"),
        (["--prompts", "latin.txt"], "not UTF-8"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["a cat", "-o", "x.jpg"], "images are PNG"),
        (["a cat", "-o", "p.txt"], "is a file, and no .png"),
        (["a cat", "-o", "folder.png"], "is a folder"),
        (["a cat", "-o", "p.txt/x.png"], "cannot write to"),
        (["a cat", "-o", "full"], "does not say how it was drawn"),
        (["a cat", "-o", "-", "--json"], "both want stdout"),
        (["a cat", "--seed", "1-9999"], "too many for one grid"),
        (["a cat", "--student", "nowhere"], "no model folder nowhere"),
        (["a cat", "--student", "p.txt"], "is a file"),
        (["a cat", "--student", "notes"], "is no Stable Diffusion model"),
        (["a cat", "--student", "started"], "has no student yet"),
        (["a cat", "--compare", "--teacher", "x.ckpt"], "is a pickle"),
        (["a cat", "--compare", "--teacher", "x.safetensors"], "no file x.safetensors"),
        (["a cat", "--teacher-steps", "5"], "--teacher-steps is for the teacher"),
        (["a cat", "--device", "tpu"], "no such device"),
        (["a cat", "--device", "mps"], "does not run on mps"),
        (["a cat", "--precision", "int8"], "--precision"),
        (["a cat", "--batch", "0"], "--batch"),
        (["--interactive"], "needs a terminal"),
        (["a cat", "--interactive", "--json"], "--json does not go with --interactive"),
        (["--interactive", "--prompts", "p.txt"], "--prompts does not go with --interactive"),
    ],
    "distill": [
        (["missing.txt"], "missing.txt"),
        (["latin.txt"], "not UTF-8"),
        (["empty.txt"], "holds no prompt"),
        (["p.txt", "--teacher", "nowhere"], "no model folder nowhere"),
        (["p.txt", "--teacher", "notes"], "is no Stable Diffusion model"),
        (["p.txt", "--teacher", "x.ckpt"], "is a pickle"),
        (["p.txt", "--init", "nowhere"], "no model folder nowhere"),
        (["p.txt", "--out", "notes"], "holds no run of sbrush"),
        (["p.txt", "--out", "p.txt"], "is a file"),
        (["p.txt", "--device", "tpu"], "no such device"),
        (["p.txt", "--clip-weights", "p.txt"], "--clip-weights"),
        (["p.txt", "--validation-clip", "p.txt"], "--validation-clip"),
        (["p.txt", "--set", "nothing=1"], "nothing"),
    ],
    "serve": [
        (["--student", "nowhere"], "no model folder nowhere"),
        (["--student", "notes"], "is no Stable Diffusion model"),
        (["--host", "203.0.113.1"], "203.0.113.1 is not an address of this machine"),
        (["--host", "no host"], "no such host: no host"),
        (["--host", "0.0.0.0", "--port", "0"], "nothing says who may ask"),
        (["--port", "0", "--api-key", "correct-horse", "--no-auth"], "contradict each other"),
        (["--port", "0", "--api-key", ""], "an API key has at least 8"),
        (["--port", "0", "--api-key", "two words too many"], "no spaces"),
        (["--port", "0", "--allow-origin", "front.example"], "not an origin: front.example"),
        (["correct-horse"], "correct-horse"),
        (["--port", "65536"], "--port"),
        (["--queue", "0"], "--queue"),
        (["--device", "tpu"], "no such device"),
    ],
    "export": [
        (["stickers", "--to", "gguf", "-o", "x"], "--to"),
        (["nowhere", "--to", "lora", "-o", "x"], "no model folder nowhere"),
        (["stickers", "--to", "lora", "-o", "x", "--rank", "0"], "--rank"),
        (["stickers", "--to", "lora", "-o", "notes"], "notes is not empty"),
        (["stickers", "--to", "lora", "-o", "p.txt/x"], "cannot write"),
        (["stickers", "--to", "hub", "-o", "fast"], "no repository's name"),
        (["stickers", "--to", "onnx", "-o", "x", "--rank", "4"], "--rank is for --to lora"),
    ],
    "merge": [
        (["nowhere", "notes", "-o", "x"], "no model folder nowhere"),
        (["a/b", "a/c", "-o", "notes"], "is there already"),
        (["a/b", "a/c", "-o", "p.txt/x"], "cannot write"),
    ],
}


def test_what_is_plainly_wrong_is_refused_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "latin.txt").write_bytes(b"ein K\xe4tzchen\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    for folder in ("folder.png", "notes", "started/checkpoints", "full"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "full" / "0001-a-cat-seed0.png").write_text("mine")
    (tmp_path / "x.ckpt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    commands = [([command, *arguments], said) for command, cases in CASES.items() for arguments, said in cases]
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY!r}\n" + PROGRAM],
        input=json.dumps([arguments for arguments, _ in commands]), capture_output=True, text=True, cwd=tmp_path,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (arguments, said), line in zip(commands, done.stdout.splitlines(), strict=True):
        code, stderr, heavy = json.loads(line)
        assert not heavy, f"{arguments} imports {heavy}"
        error, hint = stderr.splitlines()
        assert error.startswith("error: ") and said in error and hint.startswith("hint: "), (arguments, stderr)
        assert code in (1, 2), arguments
    assert sorted(tmp_path.rglob("*")) == before
