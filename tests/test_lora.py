"""LoRAs: read as diffusers reads them, drawn as plain diffusers draws, refused in one line if they do not fit."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import build_tiny_teacher, build_tiny_xl, sbrush
from sbrush import load_student as load_artist
from sbrush.console import SbrushError
from sbrush.models import lora_request
from sbrush.models.export import export_student
from sbrush.models.ladder import Sampling
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.lora import add_loras, made_for
from sbrush.models.lora_request import BUILT_IN, LoraRequest, parse_loras
from sbrush.sampling.generation import student_images, teacher_images

ABOUT = {"version": "0", "teacher": "tiny", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
         "prompts": {"count": 3, "sha256": "0"}}  # fmt: skip
RANK, ALPHA = 2, 6


@pytest.fixture(scope="module", params=["sd", "xl"])
def student(request, tmp_path_factory):
    """An exported student's folder, of SD's and of SDXL's format."""
    return exported(build_tiny_xl if request.param == "xl" else build_tiny_teacher, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return exported(build_tiny_teacher, tmp_path_factory.mktemp("lora-sd"))


def exported(build, folder):
    teacher = load_teacher(str(build(folder / "teacher")))
    scheduler = Sampling().scheduler(teacher.scheduler)
    export_student(folder / "student", teacher, teacher.unet, about=ABOUT, scheduler=scheduler)
    return folder / "student"


def layers_of(model):
    """A LoRA for attention, feed-forward and a convolution: (part, module) -> (A, B)."""
    made = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(model, part, torch.nn.Module()).named_modules():
            if name.endswith(("to_q", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "q_proj", "out_proj", "fc1")):
                draw = torch.Generator().manual_seed(len(made))
                weight = module.weight
                a = torch.randn(RANK, *weight.shape[1:], generator=draw) / weight[0].numel() ** 0.5
                b = torch.randn(weight.shape[0], RANK, *(1 for _ in weight.shape[2:]), generator=draw)
                made[part, name] = a, 0.3 * b
    return made


def in_layout(made, layout, *, xl):
    """A LoRA's tensors under the names of "peft" (as diffusers writes them now), "diffusers" (before), or "kohya"."""
    tensors = {}
    for (part, name), (a, b) in made.items():
        text = part != "unet"
        # Published names, whatever transformers calls them now.
        full = f"text_model.{name.removeprefix('text_model.')}" if text else name
        if layout == "kohya":
            number = {"text_encoder": "1" if xl else "", "text_encoder_2": "2"}
            key = f"lora_te{number.get(part)}_{full}" if text else f"lora_unet_{name}"
            key = key.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
        elif layout == "peft":
            tensors |= {f"{part}.{full}.lora_A.weight": a, f"{part}.{full}.lora_B.weight": b * ALPHA / RANK}
        else:
            inner = "lora_linear_layer" if text else "lora"
            tensors |= {f"{part}.{full}.{inner}.down.weight": a, f"{part}.{full}.{inner}.up.weight": b * ALPHA / RANK}
    return tensors


def written(file, tensors, metadata=None):
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, file, metadata=metadata)
    return file


def plain_diffusers(folder):
    from diffusers import DiffusionPipeline

    more = {"add_watermarker": False} if (folder / "text_encoder_2").is_dir() else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_plainly(pipe):
    options = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "np"}
    image = pipe("a red cat", generator=torch.Generator().manual_seed(5), **options).images[0]
    return torch.from_numpy(image * 255).round().permute(2, 0, 1)


def drawn(model):
    return next(student_images(model, ["a red cat"], [5]))[0].float()


def test_images_are_plain_diffusers_in_every_layout(tmp_path, student):
    pipe, plain = plain_diffusers(student), load_student(str(student))
    made, without = layers_of(plain), drawn(plain)
    assert (drawn_plainly(pipe) - without).abs().max() <= 1
    parts = {part for part, _ in made}
    images = {}
    for layout in ("peft", "diffusers", "kohya"):
        file = written(tmp_path / f"{layout}.safetensors", in_layout(made, layout, xl="text_encoder_2" in parts))
        pipe.load_lora_weights(str(file), adapter_name="one")
        pipe.set_adapters(["one"], [0.7])
        theirs = drawn_plainly(pipe)
        pipe.unload_lora_weights()
        model = load_student(str(student), loras=[LoraRequest(str(file), 0.7)])
        images[layout] = drawn(model)
        assert (images[layout] - theirs).abs().max() <= 1 and (images[layout] - without).abs().max() > 5
        for part in parts:  # by the formula, text encoders included, and nothing of PEFT is left
            ours, before = getattr(model, part), getattr(plain, part).state_dict()
            assert ours.state_dict().keys() == before.keys() and not hasattr(ours, "peft_config")
            for name, value in before.items():
                if (part, name.removesuffix(".weight")) in made and name.endswith(".weight"):
                    a, b = made[part, name.removesuffix(".weight")]
                    change = 0.7 * ALPHA / RANK * (b.flatten(1) @ a.flatten(1)).view_as(value)
                    assert torch.allclose(ours.state_dict()[name], value + change, atol=1e-5), (layout, part, name)
                else:
                    assert torch.equal(ours.state_dict()[name], value), (layout, part, name)
    assert (images["peft"] - images["kohya"]).abs().max() <= 1 and model.fingerprint != plain.fingerprint


def test_sdxl_blocks_by_kohyas_own_numbers_and_diffusers_own_settings(tmp_path):
    folder = exported(build_tiny_xl, tmp_path)
    plain = load_student(str(folder))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = plain.unet.get_submodule(name).weight.clone()
    a, b = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK)
    key = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k"
    kohya = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
    settings = {"unet.r": RANK, "unet.lora_alpha": ALPHA, "unet.target_modules": [name]}
    peft = {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
    metadata = {"lora_adapter_metadata": json.dumps(settings), "format": "pt"}
    for file in (written(tmp_path / "k.safetensors", kohya), written(tmp_path / "p.safetensors", peft, metadata)):
        model = load_student(str(folder), loras=[LoraRequest(str(file))])
        assert torch.allclose(model.unet.get_submodule(name).weight, weight + ALPHA / RANK * b @ a, atol=1e-5), file


def test_several_loras_are_what_diffusers_makes_of_several(tmp_path, sd):
    made = layers_of(load_student(str(sd)))
    one = written(tmp_path / "one.safetensors", in_layout(made, "peft", xl=False))
    other = {key: (a.flip(0), b) for key, (a, b) in made.items()}
    two = written(tmp_path / "two.safetensors", in_layout(other, "kohya", xl=False))
    pipe = plain_diffusers(sd)
    pipe.load_lora_weights(str(one), adapter_name="one")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        pipe.load_lora_weights(str(two), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -0.8])
    ours = drawn(load_student(str(sd), loras=parse_loras([f"{one}:0.5", f"{two}:-0.8"])))
    assert (ours - drawn_plainly(pipe)).abs().max() <= 1
    assert (ours - drawn(load_student(str(sd), loras=parse_loras([f"{one}:0.5"])))).abs().max() > 5


def test_the_command_line_draws_with_them_and_records_them(tmp_path, sd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = layers_of(load_student(str(sd)))
    written(tmp_path / "my:lora:2.safetensors", in_layout(made, "peft", xl=False))
    base = ("sample", "a red cat", "--seed", "5", "--student", sd, "--device", "cpu")
    done = sbrush(*base, "--lora", "my:lora:2.safetensors:0.5", "-o", "images")
    assert done.returncode == 0, done.stderr
    assert "--lora my:lora:2.safetensors:0.5" in done.stderr  # what to try next
    (file,) = (tmp_path / "images").glob("*.png")
    record = json.loads(Image.open(file).text["sbrush"])
    (named,) = record["loras"]
    assert named["name"] == "my:lora:2.safetensors" and named["weight"] == 0.5 and len(named["sha256"]) == 16
    model = load_student(str(sd), loras=[LoraRequest("my:lora:2.safetensors", 0.5)])
    assert record["weights"] == model.fingerprint != load_student(str(sd)).fingerprint
    pixels = torch.tensor(list(Image.open(file).convert("RGB").tobytes())).view(32, 32, 3).permute(2, 0, 1)
    assert torch.equal(pixels.float(), drawn(model))

    again = sbrush(*base, "--lora", "my:lora:2.safetensors:0.5", "-o", "images")
    assert again.returncode == 0 and "has 1 of 1 images already" in again.stderr
    other = sbrush(*base, "--lora", "my:lora:2.safetensors:0.6", "-o", "images")
    assert other.returncode == 2 and "loras" in other.stderr.splitlines()[-2]
    assert "loras" not in json.loads(Image.open(run_without(base, tmp_path)).text["sbrush"])


def run_without(base, tmp_path):
    assert sbrush(*base, "-o", tmp_path / "plain.png").returncode == 0
    return tmp_path / "plain.png"


def test_the_teacher_beside_it_gets_the_same(tmp_path, sd):
    file = written(tmp_path / "x.safetensors", in_layout(layers_of(load_student(str(sd))), "peft", xl=False))
    records = []
    for more in ([], ["--lora", f"{file}:0.5"]):
        done = sbrush(
            "sample", "a cat", "--student", sd, "--compare", "--teacher", sd.parent / "teacher", "--teacher-steps", 2,
            "--device", "cpu", "-o", tmp_path / f"{len(more)}.png", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        records.append(json.loads(Image.open(tmp_path / f"{len(more)}.png").text["sbrush"]))
    teacher = load_teacher(str(sd.parent / "teacher"), loras=[LoraRequest(str(file), 0.5)])
    assert records[1]["teacher_weights"] == teacher.fingerprint != records[0]["teacher_weights"]


def test_what_an_evaluation_caches_and_reports_depends_on_them(tmp_path, sd):
    from sbrush.device import Arithmetic
    from sbrush.evaluate.candidates import describe_loras, teacher_candidate
    from sbrush.evaluate.coco.protocols import PROTOCOLS
    from sbrush.evaluate.coco.subjects import Generator
    from sbrush.evaluate.request import CocoRequest, Models

    file = written(tmp_path / "x.safetensors", in_layout(layers_of(load_student(str(sd))), "peft", xl=False))
    loras = {weight: (LoraRequest(str(file), weight),) if weight else () for weight in (0, 0.5, 1.0)}
    models = [load_teacher(str(sd.parent / "teacher"), loras=some) for some in loras.values()]
    assert len({digest(model) for model in models}) == len({teacher_candidate(m, 2, 1).cache_key for m in models}) == 3
    assert describe_loras(models[1]).startswith(f"{file} (weight 0.5, sha256 ")
    for name in ("student", "teacher"):
        abouts = []
        for some in loras.values():
            request = CocoRequest(Models(str(sd), teacher=str(sd) if name == "teacher" else None, loras=some))
            (subject,) = Generator(request, PROTOCOLS["swiftbrush"], "cpu", Arithmetic()).subjects([])
            abouts.append(subject.key)
        assert "loras" not in abouts[0] and [about["loras"][0]["weight"] for about in abouts[1:]] == [0.5, 1.0]
        assert len({about["sha256"] for about in abouts}) == 3


def test_sbrush_eval_measures_with_them(tmp_path, tiny_stickers, monkeypatch):
    from sbrush.evaluate import candidates

    made = layers_of(load_teacher(str(tiny_stickers)))
    file = written(tmp_path / "x.safetensors", in_layout(made, "kohya", xl=False))
    measured = []

    def few(request):
        measured.append(candidates_evaluate(replace(request, limit=4, per_caption=2)))
        return measured[-1]

    candidates_evaluate = candidates.evaluate
    monkeypatch.setattr(candidates, "evaluate", few)
    done = sbrush(
        "eval", "--student", tiny_stickers, "--teacher", tiny_stickers, "--device", "cpu", "--teacher-steps", 1,
        "--report", tmp_path / "r.html", "--json", "--lora", f"{file}:0.5", XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["protocol"]["loras"].startswith(f"{file} (weight 0.5, sha256 ")


def test_bfloat16_gets_the_rounded_sum(tmp_path, sd):
    plain = load_student(str(sd))
    file = written(tmp_path / "x.safetensors", in_layout(layers_of(plain), "peft", xl=False))
    exact, short = (
        load_student(str(sd), loras=[LoraRequest(str(file), 0.01)], dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name, value in exact.unet.state_dict().items():
        assert torch.equal(short.unet.state_dict()[name], value.bfloat16()), name
    assert short.vae.dtype == short.text_encoder.dtype == torch.bfloat16 and short.loras == exact.loras


UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
GOOD = {f"{UNET}.lora_A.weight": torch.ones(2, 16), f"{UNET}.lora_B.weight": torch.ones(16, 2)}
XL = {f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn2_to_k.lora_down.weight": torch.ones(2, 2048)
      for i in range(6)}  # fmt: skip
XL |= {name.replace("down.", "up."): torch.ones(640, 2) for name in XL}
FLUX = {"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(2, 8),
        "transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight": torch.ones(8, 2)}  # fmt: skip
KOHYA_FLUX = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 8),
              "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(8, 2)}  # fmt: skip
WIDE = {f"{UNET}.lora_A.weight": torch.ones(2, 768), f"{UNET}.lora_B.weight": torch.ones(16, 2)}
BAD = {
    "another base": (XL, "12 of its 12 tensors fit no layer", "made for Stable Diffusion XL"),
    "another width": (WIDE, "1 of its 2 tensors fit no layer", "made for Stable Diffusion 1.x"),
    "flux": (FLUX, "such as transformer.single_transformer_blocks.0", "made for FLUX"),
    "flux, kohya": (KOHYA_FLUX, "such as lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "made for FLUX"),
    "a layer too many": (GOOD | {f"{UNET}x.lora_A.weight": torch.ones(2, 16)}, f"such as {UNET}x.lora_A.weight", ""),
    "no prefix": ({"x.lora_A.weight": torch.ones(2, 16)}, "such as x.lora_A.weight", "does not say for which base"),
    "peft's own": ({f"base_model.model.{k}": v for k, v in GOOD.items()}, "fit no layer", "save_lora_weights"),
    "empty": ({}, "is empty", "fetch or save it again"),
    "nan": (GOOD | {f"{UNET}.lora_A.weight": torch.full((2, 16), float("nan"))}, "not finite, first in unet.", ""),
    "no lora": ({"unet.x.weight": torch.ones(1)}, "is no LoRA", "whole model"),
    "dora": (GOOD | {"unet.x.dora_scale": torch.ones(1)}, "is a DoRA", "plain LoRA"),
    "half of a pair": ({f"{UNET}.lora_A.weight": torch.ones(2, 16)}, "is damaged", "fetch or save it again"),
    "ranks apart": (GOOD | {f"{UNET}.lora_A.weight": torch.ones(3, 16)}, "is damaged", "fetch or save it again"),
    "loha": ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "such as lora_unet_x.hada_w1_a", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, sd, case):
    tensors, error, hint = BAD[case]
    file = written(tmp_path / "bad.safetensors", tensors)
    model = load_student(str(sd))
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    good = written(tmp_path / "good.safetensors", GOOD)
    with pytest.raises(SbrushError) as caught:
        add_loras(model, parse_loras([str(good), str(file)]))
    assert error in str(caught.value) and hint in caught.value.hint, f"{caught.value} / {caught.value.hint}"
    assert "\n" not in f"{caught.value}{caught.value.hint}" and str(caught.value).count(", lora_unet") <= 4
    after = model.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    done = sbrush("sample", "a cat", "--student", sd, "--lora", file, "-o", tmp_path / "x.png", "--device", "cpu")
    lines = done.stderr.splitlines()
    assert done.returncode in (1, 2) and lines[-2].startswith("error: ") and lines[-1].startswith("hint: ")
    assert not (tmp_path / "x.png").exists() and done.stdout == ""


def test_what_is_no_lora_at_all_is_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"\x80\x04")
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "two").mkdir()
    for name in "ab":
        written(tmp_path / "two" / f"{name}.safetensors", GOOD)
    (tmp_path / "none").mkdir()
    for lora, said in {
        tmp_path / "x.pt": "pickle",
        tmp_path / "x.txt": "no .safetensors file",
        tmp_path / "gone.safetensors": "no file",
        tmp_path / "two": "holds 2 .safetensors",
        tmp_path / "none": "holds no .safetensors",
        "cyanotype": "no LoRA cyanotype",
        "blueprint:11": "out of range",
        "blueprint:nan": "out of range",
        ":1": "without a name",
        "": "without a name",
        "a\0b": "",
    }.items():
        for command in (["sample", "a cat"], ["eval"]):
            done = sbrush(*command, "--lora", lora)
            lines = done.stderr.splitlines()
            assert done.returncode == 2 and len(lines) == 2 and "loading" not in done.stderr, (lora, done.stderr)
            assert lines[0].startswith("error: ") and said in lines[0] and lines[1].startswith("hint: "), lines
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "two" / "a.safetensors").read_bytes()[:-8])
    with pytest.raises(SbrushError, match="is no complete"):
        add_loras(load_student(), [LoraRequest(str(tmp_path / "cut.safetensors"))])


def test_names_with_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "b.safetensors"):
        written(tmp_path / name, GOOD)
    written(tmp_path / "c:1.safetensors", GOOD)
    assert LoraRequest.parse("b.safetensors:-1.5") == LoraRequest("b.safetensors", -1.5)
    assert LoraRequest.parse("c:1.safetensors") == LoraRequest("c:1.safetensors")
    assert LoraRequest.parse("c:1.safetensors:2") == LoraRequest("c:1.safetensors", 2)
    (tmp_path / "d:2").mkdir()
    written(tmp_path / "d:2" / "only.safetensors", GOOD)
    for text in ("d:2", "d:2:1"):
        assert LoraRequest.parse(text) == LoraRequest("d:2")
        assert LoraRequest.parse(LoraRequest.parse(text).text) == LoraRequest("d:2")
    assert LoraRequest("d:2").locate().name == "only.safetensors" and LoraRequest.parse("d:2:3").text == "d:2:3"


def test_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(source, name):
        asked.append((source, name))
        return str(written(tmp_path / "hub.safetensors", GOOD))

    files = ["README.md", "one.safetensors"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda source: files)
    assert LoraRequest.parse("someone/style:0.8").locate().is_file() and asked.pop() == ("someone/style", files[1])
    files.append("two.safetensors")
    with pytest.raises(SbrushError, match="holds 2") as caught:
        LoraRequest("someone/style").locate()
    assert "someone/style/one.safetensors" in caught.value.hint
    LoraRequest.parse("someone/style/deep/two.safetensors").locate()
    assert asked.pop() == ("someone/style", "deep/two.safetensors")
    files.append(lora_request.USUAL)
    LoraRequest("someone/style").locate()
    assert asked.pop() == ("someone/style", lora_request.USUAL)


def test_offline_a_hub_lora_comes_from_the_cache_or_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(SbrushError, match="not, or not whole, in the Hub's cache"):
        LoraRequest("someone/style").locate()
    with pytest.raises(SbrushError, match="not, or not whole, in the Hub's cache"):
        LoraRequest("someone/style/x.safetensors").locate()
    written(tmp_path / "x.safetensors", GOOD)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda source, local_files_only: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, name: str(tmp_path / name))
    assert LoraRequest("someone/style").locate() == tmp_path / "x.safetensors"


def test_the_base_is_told_by_cross_attention():
    for width, base in ((768, "1.x"), (1024, "2.x"), (2048, "XL"), (128, "built-in"), (300, "300 wide")):
        for name in (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        ):
            assert base in made_for({name: torch.ones(2, width)}), name


def test_the_built_in_style():
    """The teacher takes it on in one step from T; the student in part (docs/loras.md)."""
    from sbrush.benchmarks.style import style_colours

    assert (BUILT_IN / "blueprint.safetensors").stat().st_size < 800_000
    prompts = ["a red cat on a mint background", "a big yellow house", "a car on a cream background", "a green fish"]
    share = {}
    for weight in (0, 1, 2):
        loras = [LoraRequest("blueprint", weight)] if weight else []
        teacher, student = load_teacher(loras=loras), load_artist(loras=loras)
        images = teacher_images(teacher, prompts, range(4), steps=1, guidance=1)
        share["teacher", weight] = style_colours(torch.cat(list(images)))
        share["student", weight] = style_colours(torch.cat(list(student_images(student.model, prompts, range(4)))))
        assert [lora.request.weight for lora in student.model.loras] == ([weight] if weight else [])
    assert share["teacher", 1] > 0.75 > 0.4 > share["teacher", 0], share
    assert share["student", 2] > share["student", 0] + 0.1, share
