"""`sbrush export --to hub`, against a Hub on this machine: what is uploaded, and when nothing is."""

import io
import json

import pytest
from huggingface_hub import constants, metadata_load
from PIL import Image

from conftest import sbrush
from hub_stand_in import stand_in
from sbrush.exports import hub as uploading


@pytest.fixture
def hub(monkeypatch):
    with stand_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def test_a_student_is_uploaded_whole_with_card_and_examples(hub, tmp_path):
    done = sbrush("export", "stickers", "--to", "hub", "-o", "me/fast", "--private", "--json")
    assert done.returncode == 0, done.stderr
    told, files = json.loads(done.stdout), hub.repositories["me/fast"]
    assert told["path"] == f"{hub.endpoint}/me/fast" and "me/fast" in hub.private
    assert {"README.md", "sbrush.json", "model_index.json", "examples.png", *told["files"]} <= files.keys()
    assert "hf_secret" not in done.stderr + done.stdout and "Bearer hf_secret" in hub.tokens
    examples = Image.open(io.BytesIO(files["examples.png"]))
    assert examples.size[0] > 4 * 128 and len(examples.getcolors(1 << 24)) > 1000
    card = tmp_path / "README.md"
    card.write_bytes(files["README.md"])
    assert metadata_load(card)["license"] == "apache-2.0"
    text = card.read_text()
    assert "(examples.png)" in text and 'from_pretrained("me/fast")' in text and "path/to/this" not in text
    for name, content in files.items():  # and it can be drawn with
        if name != "examples.png":
            (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "student" / name).write_bytes(content)
    drawn = sbrush("sample", "a cat", "--student", tmp_path / "student", "-o", tmp_path / "cat.png")
    assert drawn.returncode == 0, drawn.stderr
    again = sbrush("export", "stickers", "--to", "hub", "-o", "me/fast")
    assert again.returncode == 2 and "me/fast on the Hub is not empty" in again.stderr


@pytest.mark.parametrize(
    ("path", "status", "code", "said"),
    [
        ("/repos/create", 403, 1, "does not let you write to me/fast"),
        ("/commit/", 500, 1, "refused me/fast with status 500"),
        ("/models/", 401, 1, "does not let you write to me/fast"),
    ],
)
def test_what_the_hub_refuses_is_told_and_leaves_no_half(hub, monkeypatch, path, status, code, said):
    monkeypatch.setattr(uploading, "example_images", lambda student: Image.new("RGB", (8, 8)))
    monkeypatch.setattr("sbrush.exports.export.example_images", lambda student: Image.new("RGB", (8, 8)))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.refusals[path] = status
    done = sbrush("export", "stickers", "--to", "hub", "-o", "me/fast")
    assert done.returncode == code and said in done.stderr, done.stderr
    assert set(hub.repositories.get("me/fast", {})) <= {".gitattributes"}


def test_without_a_token_or_a_connection_nothing_is_tried(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    done = sbrush("export", "stickers", "--to", "hub", "-o", "me/fast")
    assert done.returncode == 1 and "needs a token" in done.stderr and "hf auth login" in done.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = sbrush("export", "stickers", "--to", "hub", "-o", "me/fast")
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set" in done.stderr
    assert not hub.repositories and not hub.tokens


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    done = sbrush("export", "stickers", "--to", "hub", "-o", "me/fast")
    assert done.returncode == 1 and "cannot upload to me/fast on the Hub: ConnectError" in done.stderr


def test_no_other_format_uploads(hub, tmp_path):
    done = sbrush("export", "stickers", "--to", "diffusers", "-o", tmp_path / "copy")
    assert done.returncode == 0 and not hub.tokens
