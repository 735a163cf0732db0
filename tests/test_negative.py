"""Negative prompts: the formulas, the attention processor, and what `sbrush sample --negative` draws and refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import sbrush as package
from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.evaluate import candidates
from sbrush.evaluate.candidates import teacher_candidate
from sbrush.evaluate.stickers import evaluate_stickers
from sbrush.models import negative as negative_formulas
from sbrush.models.load import load_student, load_teacher
from sbrush.models.negative import NegativeGuidance, nag, nasa
from sbrush.models.negative_attention import (
    DEFAULTS,
    NegativeAttention,
    cross_attention,
    guided_away,
    negative_guidance,
    negative_processors,
)
from sbrush.sampling.files import SampleRequest, sample_to_files
from sbrush.sampling.generation import student_images, teacher_images
from sbrush.sampling.guidance import at_guidance, teacher_with_negative, with_negative
from sbrush.sampling.images import parameters
from sbrush.sampling.negative_request import Negative
from sbrush.sampling.targets import Images, Target


def attended(seed=0, tokens=5, width=6, batch=3):
    """Z+ and Z- of random images, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, tokens, width, generator=generator, dtype=torch.float64)


def test_nag_is_its_formula_written_out_token_by_token():
    positive, negative = attended()
    phi, tau, a = 3.0, 1.5, 0.4
    found = nag(positive, negative, phi, tau, a)
    clipped = 0
    for b in range(len(positive)):
        for n in range(positive.shape[1]):
            z, away = positive[b, n].tolist(), negative[b, n].tolist()
            guided = [p + phi * (p - m) for p, m in zip(z, away, strict=True)]
            ratio = sum(map(abs, guided)) / sum(map(abs, z))
            clipped += ratio > tau
            shrunk = [g * min(ratio, tau) / ratio for g in guided]
            wanted = torch.tensor([a * s + (1 - a) * p for s, p in zip(shrunk, z, strict=True)])
            assert torch.allclose(found[b, n].float(), wanted, atol=1e-5)
    assert 0 < clipped  # else the limit was never reached


def test_the_formulas_import_only_torch():
    source = Path(negative_formulas.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:from|import) (\w+)", source, re.M)) == {"__future__", "dataclasses", "typing", "torch"}


def test_nasa_is_its_formula():
    positive, negative = attended()
    assert torch.equal(nasa(positive, negative, 0.3), positive - 0.3 * negative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_scale_0_nothing_changes_to_the_bit(dtype):
    positive, negative = attended().to(dtype)
    positive[0, 0] = 0  # a token whose norm no ratio can be taken of
    assert torch.equal(nag(positive, negative, 0.0, 2.5, 0.375), positive)
    assert torch.equal(nag(positive, negative, 0.0, 1.0, 1.0), positive)
    assert torch.equal(nasa(positive, negative, 0.0), positive)


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9])
def test_nasa_is_nag_without_limit_scaled_down(a):
    positive, negative = attended()
    unlimited = nag(positive, negative, a / (1 - a), float("inf"), 1.0)
    assert torch.allclose(nasa(positive, negative, a), (1 - a) * unlimited)


def test_a_token_of_many_large_numbers_is_limited_in_float16_too():
    """The sum of a token's 1,280 numbers is beyond float16's 65,504."""
    positive, negative = 60 * torch.ones(1, 2, 1280), torch.zeros(1, 2, 1280)
    halves = nag(positive.half(), negative.half(), 4.0, 2.5, 1.0)
    assert torch.allclose(halves.float(), nag(positive, negative, 4.0, 2.5, 1.0), rtol=1e-3)
    assert torch.allclose(halves.float(), torch.full_like(positive, 150), rtol=1e-3)


def test_the_processor_is_attention_written_out(tiny_teacher):
    """One layer: softmax(q k / sqrt(d)) v for the prompt and for the negative one, head by head, then to_out."""
    unet = load_teacher(str(tiny_teacher)).unet
    layer = next(iter(cross_attention(unet).values()))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, layer.to_q.in_features, generator=generator)
    text, away = torch.randn(2, 4, 16, generator=generator), torch.randn(1, 3, 16, generator=generator)
    guidance = NegativeGuidance("nasa", 0.3)
    with torch.no_grad():
        layer.set_processor(NegativeAttention(away, guidance))
        found = layer(x, encoder_hidden_states=text)

        def attend(tokens):
            out = []
            for query, key, value in zip(
                *(y.chunk(layer.heads, dim=-1) for y in (layer.to_q(x), layer.to_k(tokens), layer.to_v(tokens))),
                strict=True,
            ):
                weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
                out.append(weights @ value)
            return torch.cat(out, dim=-1)

        wanted = layer.to_out[0](attend(text) - 0.3 * attend(away.expand(2, -1, -1)))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["nag", "nasa"])
@pytest.mark.parametrize("folder", ["tiny_teacher", "tiny_xl"])
def test_scale_0_draws_the_same_image_and_others_another(request, folder, method):
    student = load_student(str(request.getfixturevalue(folder)))
    texts, seeds = ["a cat", "a big dog"], [1, 2]

    def drawn(model):
        return torch.cat(list(student_images(model, texts, seeds)))

    plain = drawn(student)
    assert torch.equal(drawn(with_negative(student, Negative("red", method, 0.0))), plain)
    away = drawn(with_negative(student, Negative("red", method, 1.0)))
    assert not torch.equal(away, plain)
    assert torch.equal(drawn(student), plain)  # the processors are back
    assert not torch.equal(drawn(with_negative(student, Negative("a star", method, 1.0))), away)


def test_only_cross_attention_changes_and_comes_back(tiny_teacher):
    unet = load_teacher(str(tiny_teacher)).unet
    before = dict(unet.attn_processors)
    student = with_negative(load_student(str(tiny_teacher)), Negative("red"))
    with pytest.raises(ValueError), guided_away(unet, student.negative):
        now = unet.attn_processors
        changed = {name for name in now if now[name] is not before[name]}
        assert changed == {f"{name}.processor" for name in cross_attention(unet)} and 0 < len(changed) < len(before)
        raise ValueError
    assert all(unet.attn_processors[name] is before[name] for name in before)


def test_a_negative_prompt_is_encoded_once_and_its_keys_projected_once_for_a_batch(tiny_teacher, monkeypatch):
    student = load_student(str(tiny_teacher))
    encoded, projected = [], []
    monkeypatch.setattr(student.text_encoder, "forward", count_calls(student.text_encoder.forward, encoded))
    for layer in cross_attention(student.unet).values():
        monkeypatch.setattr(layer.to_k, "forward", count_calls(layer.to_k.forward, projected))
    away = with_negative(student, Negative("red"))
    list(student_images(away, ["a cat"] * 6, range(6), batch=3))
    assert len(encoded) == 1 + 2  # the negative prompt, and the prompts of two batches
    layers = len(cross_attention(student.unet))
    assert len(projected) == 2 * 2 * layers and {len(args[0]) for args in projected} == {1, 3}


def count_calls(function, calls):
    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return counted


def test_a_lora_acts_on_both_prompts_and_stays(tiny_teacher):
    """A LoRA in the projections: the image is that of the weights with the LoRA in them."""
    from peft import LoraConfig

    student = load_student(str(tiny_teacher))
    student.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_k", "to_v"], init_lora_weights=False))
    away = with_negative(student, Negative("red", scale=3.0))
    (ours,) = student_images(away, ["a cat"], [1])
    merged = load_student(str(tiny_teacher))
    own, theirs = dict(student.unet.named_modules()), dict(merged.unet.named_modules())
    changed = 0
    for name, layer in own.items():
        if hasattr(layer, "lora_A"):
            theirs[name].weight.data += layer.get_delta_weight("default")
            changed += 1
    (wanted,) = student_images(with_negative(merged, Negative("red", scale=3.0)), ["a cat"], [1])
    assert changed and (ours.int() - wanted.int()).abs().max() <= 1
    (plain,) = student_images(student, ["a cat"], [1])
    assert not torch.equal(plain, ours) and student.unet.active_adapters() == ["default"]


def test_a_teachers_guidance_takes_the_negative_prompt_as_plain_diffusers_does(tiny_teacher, tiny_xl):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    for folder, kind in ((tiny_teacher, StableDiffusionPipeline), (tiny_xl, StableDiffusionXLPipeline)):
        pipe = kind.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )
        theirs = pipe(
            "a cat", negative_prompt="red", num_inference_steps=3, guidance_scale=3, output_type="np",
            generator=torch.Generator().manual_seed(9),
        ).images[0]  # fmt: skip
        teacher = teacher_with_negative(load_teacher(str(folder)), Negative("red"))
        (ours,) = teacher_images(teacher, ["a cat"], [9], steps=3, guidance=3)
        difference = (torch.from_numpy(theirs * 255).round().permute(2, 0, 1) - ours[0].float()).abs()
        assert difference.max() <= 1
        (without,) = teacher_images(load_teacher(str(folder)), ["a cat"], [9], steps=3, guidance=3)
        assert not torch.equal(ours, without)


def test_plain_diffusers_draws_our_image_with_the_processors(tiny_teacher, tiny_xl, tmp_path, prompt_file):
    from diffusers import DiffusionPipeline

    for folder in (tiny_teacher, tiny_xl):
        run = tmp_path / folder.name
        flags = ["--steps", 1, "--batch", 2, "--grid-every", 0, "--device", "cpu"]
        done = sbrush("distill", prompt_file, "--teacher", folder, "--out", run, *flags)
        assert done.returncode == 0, done.stderr
        student = load_student(str(run))
        pipe = DiffusionPipeline.from_pretrained(run / "student")
        pipe.set_progress_bar_config(disable=True)
        tokens = pipe.encode_prompt("red", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        for method in ("nag", "nasa"):
            pipe.unet.set_attn_processor(
                negative_processors(pipe.unet, tokens, negative_guidance(pipe.unet, method, 0.8))
            )
            theirs = pipe(
                "a cat", num_inference_steps=1, guidance_scale=1, output_type="np",
                generator=torch.Generator().manual_seed(7),
            ).images[0]  # fmt: skip
            (ours,) = student_images(with_negative(student, Negative("red", method, 0.8)), ["a cat"], [7])
            (plain,) = student_images(student, ["a cat"], [7])
            difference = (torch.from_numpy(theirs * 255).round().permute(2, 0, 1) - ours[0].float()).abs()
            assert difference.max() <= 1 and not torch.equal(ours, plain)


def test_another_programs_processors_are_refused(tiny_teacher):
    class Foreign:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    student = load_student(str(tiny_teacher))
    student.unet.set_attn_processor(Foreign())
    with pytest.raises(SbrushError, match="Foreign") as caught:
        list(student_images(with_negative(student, Negative("red")), ["a cat"], [1]))
    assert caught.value.hint


def test_a_family_is_told_by_its_tokens_and_has_the_papers_numbers():
    class Unet:
        def __init__(self, width):
            self.config = type("config", (), {"cross_attention_dim": width})

    told = {(m, w): negative_guidance(Unet(w), m) for m in ("nag", "nasa") for w in (768, 1024, 2048)}
    assert told["nag", 768] == NegativeGuidance("nag", 2.0, 2.5, 0.375)
    assert told["nag", 2048] == NegativeGuidance("nag", 2.0, 2.5, 0.5)
    assert (told["nasa", 768].scale, told["nasa", 1024].scale) == (0.1, 0.2)
    assert negative_guidance(Unet(123), "nag") == told["nag", 768]
    assert negative_guidance(Unet(2048), "nag", 7.0) == NegativeGuidance("nag", 7.0, 2.5, 0.5)
    assert all(one.method == method for method, families in DEFAULTS.items() for one in families.values())


def test_an_image_says_how_it_was_drawn_and_a_folder_goes_on_by_it(tiny_teacher, tmp_path):
    flags = ["a cat", "--seed", "1-2", "--student", tiny_teacher, "--device", "cpu", "-o", f"{tmp_path}/cats/"]
    away = ["--negative", "red", "--negative-method", "nasa", "--negative-scale", 0.4]
    done = sbrush("sample", *flags, *away)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "cats" / "0001-a-cat-seed1.png"
    with Image.open(file) as image:
        text = dict(image.text)
    record = json.loads(text["sbrush"])
    assert (record["negative"], record["negative_method"], record["negative_scale"]) == ("red", "nasa", 0.4)
    assert text["parameters"].split("\n")[1] == "Negative prompt: red"
    written = file.read_bytes()
    file.unlink()
    again = sbrush("sample", *flags, *away)
    assert again.returncode == 0 and file.read_bytes() == written and "1 of 2 images already" in again.stderr
    for other in ([], ["--negative", "blue"], [*away[:-1], 0.5], [*away[:3], "nag", *away[4:]]):
        refused = sbrush("sample", *flags, *other)
        assert refused.returncode == 2 and "another image (negative" in refused.stderr, other


def test_without_metadata_a_folder_knows_the_negative_prompt_too(tiny_teacher, tmp_path):
    flags = ["a cat", "--student", tiny_teacher, "--device", "cpu", "-o", f"{tmp_path}/cats/", "--no-metadata"]
    assert sbrush("sample", *flags, "--negative", "red").returncode == 0
    assert sbrush("sample", *flags, "--negative", "red").returncode == 0
    assert sbrush("sample", *flags).returncode == 2


def test_a_negative_prompt_cannot_forge_the_parameters_chunk():
    about = dict.fromkeys(("steps", "sampler", "guidance", "seed", "size", "model", "version"), 1)
    assert parameters(about | {"prompt": "a", "negative": "b\nSteps: 50"}).count("\n") == 2


def test_the_python_api_draws_what_the_command_does(tiny_teacher, tmp_path):
    student = package.load_student(str(tiny_teacher), device="cpu")
    flags = ["a cat", "--seed", 3, "--student", tiny_teacher, "--device", "cpu", "-o", tmp_path / "cat.png"]
    done = sbrush("sample", *flags, "--negative", "red")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cat.png") as image:
        written = image.convert("RGB").tobytes()
    assert student("a cat", seed=3, negative="red").tobytes() == written != student("a cat", seed=3).tobytes()
    assert (
        student("a cat", seed=3, negative=package.Negative("red", scale=0)).tobytes() == student("a cat", 3).tobytes()
    )
    with pytest.raises(SbrushError, match="not a negative prompt: ''"):
        student("a cat", negative="")


def test_several_steps_and_an_image_to_start_from_go_with_it(tiny_teacher, tmp_path, prompt_file):
    flags = ["--student-steps", 2, "--steps", 1, "--batch", 2, "--grid-every", 0, "--device", "cpu"]
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--out", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    student = load_student(str(tmp_path / "run"))
    away = with_negative(student, Negative("red", scale=3.0))
    for steps in (1, 2):
        (plain,), (other,) = (student_images(one, ["a cat"], [1], steps=steps) for one in (student, away))
        assert not torch.equal(plain, other)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--negative", " "], "not a negative prompt: ' '"),
        (["--negative", "red", "--negative-scale", 1.5, "--negative-method", "nasa"], "--negative-scale 1.5 is out of"),
        (["--negative", "red", "--negative-scale", -1], "--negative-scale -1 is out of range for nag"),
        (["--negative", "red", "--negative-scale", 21], "--negative-scale 21 is out of range for nag"),
        (["--negative", "red", "--negative-scale", "nan"], "--negative-scale nan is out of range for nag"),
        (["--negative-scale", 1], "--negative-scale is for a negative prompt"),
        (["--negative-method", "nag"], "--negative-method is for a negative prompt"),
        (["--negative", "red " * 20], "the negative prompt is longer than the 16 tokens"),
        (["--guidance", 3], "takes no guidance scale"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(tiny_teacher, tmp_path, flags, error):
    base = ["sample", "a cat", "--student", tiny_teacher, "--device", "cpu", "-o", tmp_path / "cat.png"]
    done = sbrush(*base, *flags)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    lines = done.stderr.splitlines()
    assert [line[:6] for line in lines[-2:]] == ["error:", "hint: "] and error in lines[-2]
    if "--guidance" in flags:
        assert "--negative" in lines[-1]


def test_the_teacher_beside_the_student_is_told_too_or_a_note_says_that_it_is_not(tiny_teacher, tmp_path):
    base = ["sample", "a cat", "--student", tiny_teacher, "--teacher", tiny_teacher, "--compare", "--device", "cpu"]
    steps = ["--teacher-steps", 2, "--overwrite", "--negative"]
    for scale, told in ((1, True), (3, False)):
        images = []
        for text in ("red", "a star"):
            done = sbrush(*base, *steps, text, "--teacher-guidance", scale, "-o", tmp_path / "cat.png")
            assert done.returncode == 0 and ("without the negative prompt" in done.stderr) is told, done.stderr
            with Image.open(tmp_path / "cat.png") as image:
                images.append(image.crop((image.width // 2 + 4, 0, image.width, image.height)).tobytes())
        assert (images[0] == images[1]) is told  # the teacher's half


def test_a_student_that_takes_a_guidance_scale_is_drawn_at_another(tiny_teacher, tmp_path, prompt_file):
    flags = ["--recipe", "lcm", "--steps", 1, "--batch", 2, "--grid-every", 0, "--device", "cpu"]
    run = tmp_path / "run"
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--out", run, *flags)
    assert done.returncode == 0, done.stderr
    student = load_student(str(run))
    assert student.guidance_input == 8.5
    file = tmp_path / "cat.png"
    told = sbrush("sample", "a cat", "--student", run, "--guidance", 12, "--device", "cpu", "-o", file)
    assert told.returncode == 0 and "learned guidance scales" not in told.stderr
    with Image.open(file) as image:
        assert json.loads(image.text["sbrush"])["guidance"] == 12
    beyond = sbrush("sample", "a cat", "--student", run, "--guidance", 20, "--device", "cpu", "-o", file)
    assert beyond.returncode == 0 and "learned guidance scales from 6 to 16" in beyond.stderr
    torch.nn.init.ones_(student.unet.time_embedding.cond_proj.weight)  # as after more than one training step
    (one,), (other,) = (student_images(s, ["a cat"], [1]) for s in (student, at_guidance(student, 12.0)))
    assert not torch.equal(one, other)
    assert at_guidance(student, None) is student


@pytest.mark.parametrize("coco", [False, True])
def test_an_evaluation_is_told_and_says_so(coco, tiny_stickers, tmp_path, monkeypatch):
    """On the built-in world; on COCO only what is refused."""
    report = tmp_path / "report.html"
    base = ["eval", "--report", report, "--device", "cpu", "--negative", "red", "--negative-scale", 1]
    if coco:
        (tmp_path / "images").mkdir()
        done = sbrush(*base, "--coco-30k", "--images", tmp_path / "images")
        assert done.returncode == 2 and "--negative is for a model" in done.stderr
        return
    monkeypatch.setattr(  # a student on eight captions will do
        candidates, "evaluate_stickers", lambda c, judge, **_: evaluate_stickers(c[:1], judge, n=8, per_caption=2)
    )
    models = ["--student", tiny_stickers, "--teacher", tiny_stickers, "--teacher-steps", 1]
    done = sbrush(*base, *models, "--limit", 100, "--diversity", 2)
    assert done.returncode == 0, done.stderr
    protocol = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))["protocol"]
    assert (protocol["negative"], protocol["negative_method"], protocol["negative_scale"]) == ("red", "nag", "1.0")


def test_a_teachers_cached_metrics_are_of_its_negative_prompt(tiny_stickers):
    teacher = load_teacher(str(tiny_stickers))
    keys = [
        teacher_candidate(one, 1, 3.0).cache_key for one in (teacher, teacher_with_negative(teacher, Negative("red")))
    ]
    assert keys[0] and keys[0] in keys[1] and keys[0] != keys[1]


def test_words_that_the_world_has_never_seen_are_told_of_a_negative_prompt_too(tmp_path):
    request = SampleRequest(Images(["a cat"], [1]), Target.parse(str(tmp_path / "x.png")), negative=Negative("blurry"))
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbrush.sampling.notes.info", told.append)
        list(sample_to_files(request))
    assert any("has never seen: blurry" in line for line in told)


def test_a_student_drawn_by_onnxruntime_is_loaded_for_torch(tmp_path, capsys):
    student = package.load_student(device="cpu")
    assert student.model.runtime == "onnx"
    first = student("a cat", 1, negative="red")
    assert "needs torch" in capsys.readouterr().err
    assert student("a cat", 1, negative="red").tobytes() == first.tobytes() != student("a cat", 1).tobytes()
    assert capsys.readouterr().err == "" and student.model.runtime == "onnx"
    done = sbrush("sample", "a cat", "--negative", "red", "--seed", 1, "--device", "cpu", "-o", tmp_path / "cat.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cat.png") as image:
        assert image.convert("RGB").tobytes() == first.tobytes()
    for flag in (["--negative", "red"], ["--guidance", 3]):
        refused = sbrush("sample", "a cat", "--runtime", "onnx", *flag, "-o", tmp_path / "cat.png")
        assert refused.returncode == 2 and f"{flag[0]} needs torch" in refused.stderr
