"""CLIP weights that fit a model and are not made for it: the activation, the width, what stands for a file."""

import hashlib
import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from conftest import build_clip
from sbrush.console import SbrushError
from sbrush.metrics import clip_weights
from sbrush.metrics.clip import ClipScorer
from sbrush.metrics.clip_weights import known_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605143284\n"


@pytest.fixture
def small_models(monkeypatch, clip_folder):
    """open_clip's own ViT-B-32 in both activations, so small that a test can have weights of it."""
    import open_clip
    from open_clip import factory

    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    for name, extra in (("ViT-B-32", {}), ("ViT-B-32-quickgelu", {"quick_gelu": True})):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, config | extra)
    assert open_clip.get_model_config("ViT-B-32")["embed_dim"] == 16


@pytest.mark.parametrize(
    ("digest", "name"),
    [
        ("e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31", "ViT-B-32-quickgelu"),
        ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32-quickgelu"),  # of its address
        ("46683a32" + "0" * 56, "ViT-B-32-quickgelu"),  # LAION-400M's, which was trained so by mistake
        ("55e67d44" + "0" * 56, "ViT-B-16"),
        ("ac4f8c4b88af6d963118cbf40ad93176d092abbedfcb752601ae1866352656e6", "ViT-B-32"),
        ("0" * 64, None),
    ],
)
def test_published_weights_are_known_by_their_hash(digest, name):
    assert known_model(digest) == name


def test_openais_weights_as_a_model_of_gelu_are_refused_and_with_their_own_name_read(
    clip_folder, small_models, monkeypatch, capsys
):
    weights = clip_folder / "open_clip_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_weights.PUBLISHED, digest, "ViT-B-32-quickgelu")
    with pytest.raises(SbrushError, match="holds the weights of ViT-B-32-quickgelu") as refused:
        ClipScorer.load(weights, model_name="ViT-B-32")
    assert "--clip-model ViT-B-32-quickgelu" in refused.value.hint
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    right = ClipScorer.load(weights, model_name="ViT-B-32-quickgelu")
    monkeypatch.delitem(clip_weights.PUBLISHED, digest)
    assert "note" not in capsys.readouterr().err
    wrong = ClipScorer.load(weights, model_name="ViT-B-32")
    assert not torch.allclose(right.score(images, ["a cat"] * 2), wrong.score(images, ["a cat"] * 2), atol=1e-5)
    said = capsys.readouterr().err
    assert "does not say its activation" in said and "need ViT-B-32-quickgelu" in said
    ClipScorer.load(weights, model_name="ViT-B-32", own=True)
    assert "note" not in capsys.readouterr().err


def test_a_folder_whose_configuration_names_the_other_activation_is_refused(tmp_path, monkeypatch):
    folder = build_clip(tmp_path)
    digest = hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(clip_weights.PUBLISHED, digest, "ViT-B-32-quickgelu")
    with pytest.raises(SbrushError, match="names another activation") as refused:
        ClipScorer.load(folder)
    assert 'set "quick_gelu" to true' in refused.value.hint
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert ClipScorer.load(folder)


def test_weights_of_another_width_are_named(clip_folder, small_models, tmp_path):
    import open_clip

    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    save_file(open_clip.CLIP(**config | {"embed_dim": 24}).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(SbrushError, match=r"holds another model than ViT-B-32: its \S+ is \[.*\], not \["):
        ClipScorer.load(tmp_path / "wide.safetensors", model_name="ViT-B-32")


def test_an_archive_of_torchscript_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        archive.writestr("ViT-B-32/code/__torch__/clip.py", "")
    with pytest.raises(SbrushError, match="TorchScript archive, which holds code"):
        ClipScorer.load(tmp_path / "ViT-B-32.pt", model_name="ViT-B-32")


def test_what_stands_for_weights_is_named(tmp_path, clip_folder):
    from sbrush.metrics.inception import Inception

    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    for file in (folder / "open_clip_model.safetensors", tmp_path / "weights.safetensors", tmp_path / "inception.pth"):
        file.write_text(POINTER)
    for load in (
        lambda: ClipScorer.load(folder),
        lambda: ClipScorer.load(tmp_path / "weights.safetensors", model_name="ViT-B-32"),
        lambda: Inception.load(tmp_path / "inception.pth"),
    ):
        with pytest.raises(SbrushError, match="is a Git LFS pointer, not the file itself") as refused:
            load()
        assert "git lfs pull" in refused.value.hint
