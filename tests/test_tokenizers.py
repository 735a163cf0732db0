"""A tokenizer that is not its text encoder's is refused, in every format; prompts that are cut off are counted."""

import gzip
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conftest import sbrush
from ldm import whole_file
from sbrush.console import SbrushError
from sbrush.models.load import load_shapes, load_student, load_teacher
from sbrush.models.tokenizers import check_tokenizers, truncated_prompts
from sbrush.sampling.generation import student_images
from test_models import exported


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def encoder(folder, **changes):
    """The text encoder of a tokenizer's folder built again with other settings."""
    here = folder.with_name(folder.name.replace("tokenizer", "text_encoder"))
    kind = CLIPTextModelWithProjection if here.name.endswith("_2") else CLIPTextModel
    kind(CLIPTextConfig(**(CLIPTextConfig.from_pretrained(here).to_dict() | changes))).save_pretrained(here)


def nothing(folder):
    for file in folder.iterdir():
        file.unlink()


def only_its_configuration(folder):
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()


def another_kinds_words(folder):
    only_its_configuration(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\ncat\nred\ndog\n")


def whole_words(folder):
    """Of a tokenizer that knows words and no letters: all others are unknown."""
    only_its_configuration(folder)
    marks = {"<|startoftext|>": 617, "<|endoftext|>": 618}
    words = {word: i for i, word in enumerate(("a", "small", "car"))}
    (folder / "vocab.json").write_text(json.dumps(words | marks))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def as_two_files(folder):
    """Its vocabulary and merges in place of tokenizer.json, as folders from before that have them."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((folder.parent / "tokenizer" / name).read_bytes())
    (folder / "tokenizer.json").unlink()


def no_merges(folder):
    as_two_files(folder)
    (folder / "merges.txt").unlink()


def merges_cut_off(folder):
    as_two_files(folder)
    lines = (folder / "merges.txt").read_text().splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(lines[: len(lines) // 2]))


def words_beyond_the_embedding(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra</w>"] = 700
    (folder / "tokenizer.json").write_text(json.dumps(content))


def another_end(folder):
    edit(folder.with_name(folder.name.replace("tokenizer", "text_encoder")) / "config.json", eos_token_id=617)


def another_start(folder):
    edit(folder.with_name(folder.name.replace("tokenizer", "text_encoder")) / "config.json", bos_token_id=7)


def another_filling(folder):
    edit(folder.with_name(folder.name.replace("tokenizer", "text_encoder")) / "config.json", pad_token_id=7)


def a_smaller_models(folder):
    encoder(folder, vocab_size=4000, bos_token_id=0, eos_token_id=2, pad_token_id=1)


def room_for_no_word(folder):
    edit(folder / "tokenizer_config.json", model_max_length=2)


DAMAGES = {
    nothing: "has no vocabulary", only_its_configuration: "has no vocabulary", another_kinds_words: "has no vocabulary",
    no_merges: "has no vocabulary", whole_words: "does not know the words", merges_cut_off: "splits words of its own",
    words_beyond_the_embedding: "words that the text encoder does not know: id 700",
    another_end: "has eos_token_id 618", another_start: "has bos_token_id 617", another_filling: "has pad_token_id 618",
    a_smaller_models: "ends prompts with id 618", room_for_no_word: "into the same tokens",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_that_is_none_is_refused_whatever_is_loaded(tmp_path, request, damage, which):
    folder = request.getfixturevalue("tiny_xl" if which == "tokenizer_2" else "tiny_teacher")
    folder = shutil.copytree(folder, tmp_path / "teacher")
    damage(folder / which)
    for load in (load_teacher, load_student, load_shapes):
        with pytest.raises(SbrushError) as refused:
            load(str(folder))
        assert DAMAGES[damage] in str(refused.value) and which in str(refused.value)
        assert "damaged" not in refused.value.hint and refused.value.code == 2


@pytest.mark.parametrize("damage", [nothing, whole_words, another_end])
def test_so_is_that_of_a_single_files_configuration_and_of_a_student(tmp_path, tiny_teacher, damage, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = whole_file(tiny_teacher, tmp_path / "model.safetensors")
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    damage(folder / "tokenizer")
    for load in (load_teacher, load_shapes):
        with pytest.raises(SbrushError, match="tokenizer"):
            load(str(file), config=str(folder))
    teacher = load_teacher(str(tiny_teacher))
    exported(teacher, tmp_path / "student")
    damage(tmp_path / "student" / "tokenizer")
    with pytest.raises(SbrushError, match="tokenizer"):
        load_student(str(tmp_path / "student"))


def test_ids_that_every_published_text_encoder_states_are_accepted_and_change_nothing(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit(folder / "text_encoder" / "config.json", bos_token_id=0, eos_token_id=2, pad_token_id=1)
    ours, theirs = (next(student_images(load_student(str(f)), ["a cat"], [1])) for f in (folder, tiny_teacher))
    assert torch.equal(ours, theirs)


def test_a_vocabulary_with_its_merges_alone_is_enough(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    as_two_files(folder / "tokenizer")
    ours, theirs = (next(student_images(load_student(str(f)), ["a cat"], [1])) for f in (folder, tiny_teacher))
    assert torch.equal(ours, theirs)


def test_two_tokenizers_that_cut_at_different_lengths_are_refused(tmp_path, tiny_xl):
    folder = shutil.copytree(tiny_xl, tmp_path / "teacher")
    edit(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=12)
    with pytest.raises(SbrushError, match=r"different lengths, \[12, 16\]"):
        load_teacher(str(folder))


@pytest.fixture(scope="module")
def clips_own(tmp_path_factory):
    """CLIP's own tokenizer, of 49,408 tokens, from the list of merges that open_clip carries."""
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    text = gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    folder = tmp_path_factory.mktemp("clips-own")
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return CLIPTokenizer.from_pretrained(folder)


def model(tokenizer, **config):
    """As much of a model as its text side is."""
    said = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    encoder = SimpleNamespace(config=SimpleNamespace(**said | config))
    return SimpleNamespace(name="it", parts=("tokenizer",), text_parts=((tokenizer, encoder),))


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # SD 1.x's, and that of SD 2.x and of XL's second tokenizer
def test_clips_own_tokenizer_is_accepted_with_what_published_folders_say(clips_own, pad):
    clips_own.pad_token = pad
    check_tokenizers(model(clips_own))
    check_tokenizers(model(clips_own, bos_token_id=49406, eos_token_id=49407))
    check_tokenizers(model(clips_own, vocab_size=49408 + 64))  # rows for words of one's own, or to a round number
    with pytest.raises(SbrushError, match="ends prompts"):
        check_tokenizers(model(clips_own, vocab_size=100_000))


def test_truncated_prompts_are_those_that_the_tokenizer_cuts(clips_own):
    chance = random.Random(0)
    words = [
        "a",
        "cat",
        "Constantinople,",
        "naïve",
        "(red:1.2)",
        "4k",
        "猫",
        "İstanbul\u00a0x",
        "\tb",
        "<|endoftext|>",
        "",
    ]
    texts = [" ".join(chance.choices(words, k=chance.choice((3, 20, 35, 60)))) for _ in range(300)]
    expected = sum(len(ids) > 77 for ids in clips_own(texts, verbose=False).input_ids)
    assert 50 < expected < 250 and truncated_prompts(model(clips_own).text_parts, texts) == expected
    edge = ["a " * 75, "a " * 76, "x" * 80]  # 77 tokens, 78, and a word of few
    assert truncated_prompts(model(clips_own).text_parts, edge) == 1


def test_a_tokenizer_whose_tokens_reach_over_spaces_is_counted_text_by_text():
    def call(texts, **_):
        if texts == "":
            return SimpleNamespace(input_ids=[0, 0])
        return SimpleNamespace(input_ids=[[1] * len(text) for text in texts])  # a token a letter, spaces too

    counted = type("Spaced", (), {"__call__": staticmethod(call), "model_max_length": 10})()
    assert truncated_prompts(((counted, None),), ["ab cd efg", "ab cd"]) == 1


def test_every_command_states_how_many_prompts_are_cut_off(tmp_path, tiny_teacher):
    long = "a small red cat on a blue background and " * 3
    (tmp_path / "p.txt").write_text(f"a cat\n{long}one\n{long}two\n")
    said = "note: 2 of 3 prompts are longer than the 16 tokens read; their ends are cut off"
    out = sbrush("sample", "--prompts", tmp_path / "p.txt", "--student", tiny_teacher, "-o", tmp_path / "images")
    assert out.returncode == 0 and out.stderr.count(said) == 1, out.stderr
    dry = sbrush("distill", tmp_path / "p.txt", "--teacher", tiny_teacher, "--dry-run", "--device", "cpu")
    assert dry.returncode == 0 and "truncated prompts: 2\n" in dry.stdout, dry.stderr
    run = sbrush(
        "distill", tmp_path / "p.txt", "--teacher", tiny_teacher, "--out", tmp_path / "run", "--steps", 1, "--batch", 2,
        "--grid-every", 0, "--device", "cpu",
    )  # fmt: skip
    assert run.returncode == 0 and run.stderr.count(said) == 1, run.stderr
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    out = sbrush("sample", "--prompts", tmp_path / "p.txt", "--student", tiny_teacher, "-o", tmp_path / "images-2")
    assert "cut off" not in out.stderr


def test_evaluations_report_how_many_captions_a_model_cuts_off(tmp_path, tiny_teacher, monkeypatch):
    from sbrush.device import Arithmetic
    from sbrush.evaluate import candidates
    from sbrush.evaluate.coco.protocols import PROTOCOLS
    from sbrush.evaluate.coco.subjects import Generator
    from sbrush.evaluate.report import Report
    from sbrush.evaluate.request import CocoRequest, Models, StickersRequest

    texts = ["a cat", "a small red cat on a blue background " * 3]
    monkeypatch.setattr(candidates, "evaluate_stickers", lambda *_, **__: Report([], {}))
    monkeypatch.setattr(candidates, "pairs", lambda n: [(SimpleNamespace(text=text), 0) for text in texts])
    tiny = str(tiny_teacher)
    result = candidates.evaluate(StickersRequest(Models(student=tiny), report=tmp_path / "report.html"))
    assert result.json()["protocol"]["truncated_prompts"] == "1"
    for models in (Models(student=tiny), Models(teacher=tiny)):
        (subject,) = Generator(CocoRequest(models), PROTOCOLS["swiftbrush"], "cpu", Arithmetic()).subjects([])
        assert subject.truncated(texts) == 1
