"""What a run will take, told beforehand, against what it takes."""

import dataclasses
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import sbrush
from sbrush.models.load import load_teacher
from sbrush.noise import image_noise
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.cost import Held, Monitoring, Prepared, estimate
from sbrush.training.methods import Machine
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES
from sbrush.training.request import AlignmentRequest, ExecutionOptions

SMALL = dataclasses.replace(RECIPES["swiftbrush"], batch=4, lora_rank=4, lora_alpha=4, null_chance=0.0)
FIT = ExecutionOptions()
LORA = dataclasses.replace(SMALL, student_rank=3, ema=0.0)
SHARED = dataclasses.replace(SMALL, guide_lora=False, shared_forward=True)


def size(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("recipe", [SMALL, LORA, SHARED])
def test_what_is_kept_is_what_a_distiller_keeps(tiny_teacher, recipe):
    made = VSD(load_teacher(str(tiny_teacher)), recipe, seed=0, accelerator=Accelerator(cpu=True))
    for step in (1, 2):
        made.step(step, ShuffledPrompts(make_prompts(["a cat", "a dog"], "two"), 0))
    told = estimate(str(tiny_teacher), recipe, ExecutionOptions())
    state = made.state()
    own = {n: p for n, p in made.teacher.unet.named_parameters() if ".lora_" not in n}
    assert told.memory["teacher's UNet, frozen"] == size(own.values()) == 4 * told.parameters["UNet"]
    assert told.memory["student's weights, float32"] == size(state["student"].values())
    assert told.memory["student's average"] == size(state["ema"].values())
    moments = {k: v for k, v in state["student_optimizer"].items() if not k.endswith("step")}
    assert told.memory["student's Adam"] == size(moments.values())
    parts = sum(size(part.values()) for part in state.values())
    assert told.checkpoint == pytest.approx(parts, rel=0.01)  # but for the optimisers' step counts
    rest = made.teacher.text_encoder, made.teacher.vae
    expected = sum(size(network.parameters()) for network in rest)
    assert told.memory["text encoder and autoencoder, frozen"] == expected


def test_flops_are_those_of_a_real_forward(tiny_teacher):
    model = load_teacher(str(tiny_teacher))
    counter = FlopCounterMode(display=False)
    # Attention in plain products: not every torch's counter knows the fused one on a CPU.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.denoise(image_noise([1], (4, 16, 16)), torch.tensor([5]), model.encode(["a cat"]))
    assert estimate(str(tiny_teacher), SMALL, ExecutionOptions()).flops == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_what_is_held_is_counted_for_as_long_as_it_is_held():
    weight = torch.nn.Parameter(torch.zeros(8, 8, device="meta"))
    holder = torch.nn.ParameterList([weight])
    held = Held([holder])
    with held:
        x = torch.zeros(4, 8, device="meta")  # 128 bytes
        y = (x @ weight).tanh()  # 128 for the product, 128 for what tanh's backward needs
        assert held.now == 256 and held.most == 384  # the product itself is not kept
        y.sum().backward()
        assert weight.grad.nbytes == 256
        del x, y
    assert held.now == 256 and held.most >= 512  # the gradient stays


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ExecutionOptions(), ExecutionOptions(checkpointing=True)),
        (ExecutionOptions(), ExecutionOptions(micro_batches=4)),
    ],
)
def test_what_is_meant_to_save_memory_does(tiny_teacher, before, after):
    one, two = (estimate(str(tiny_teacher), dataclasses.replace(SMALL, batch=64), f) for f in (before, after))
    assert two.peak < 0.8 * one.peak and two.memory["student's Adam"] == one.memory["student's Adam"]


def test_processes_share_a_batch_and_with_fsdp_the_student_and_its_gradients(tiny_teacher):
    def told(world, *, shard=False):
        execution, recipe = ExecutionOptions(checkpointing=True, shard=shard), dataclasses.replace(SMALL, batch=world)
        return estimate(None, recipe, execution, Machine(world=world), monitoring=Monitoring(grids=False))

    alone, four, sharded = told(1), told(4), told(4, shard=True)
    assert alone.memory == four.memory  # an image each
    trained = 4 * alone.parameters["student, trained"]
    for name in ("student's weights, float32", "student's Adam", "student's average"):
        assert sharded.memory[name] == pytest.approx(four.memory[name] / 4, abs=8)
    assert trained / 8 < sharded.memory["student's weights, a gathered block"] < trained
    # With checkpointing most is held when all gradients are there.
    at_work = "gradients and activations, 1 image at once"
    assert four.memory[at_work] - sharded.memory[at_work] == pytest.approx(0.75 * trained, rel=0.05)
    assert sharded.parameters == four.parameters and sharded.checkpoint == four.checkpoint


@pytest.mark.parametrize(("rank", "fsdp"), [(0, False), (0, True), (1, True)])
def test_a_dry_run_of_several_processes_is_told_once(tiny_teacher, prompt_file, rank, fsdp):
    started = {"RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": str(fsdp)}
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--dry-run", "--batch", "4", **started)
    assert done.returncode == 0, done.stderr
    assert ("processes: 2" in done.stdout) == (rank == 0)
    assert ("2 images at once" in done.stdout) == (rank == 0)
    assert ("a gathered block" in done.stdout) == (rank == 0 and fsdp)


def test_the_average_can_be_kept_elsewhere_or_not_at_all(tiny_teacher):
    def average(recipe, execution):
        told = estimate(str(tiny_teacher), recipe, execution)
        return told.memory["student's average"], told.host_memory["student's average"]

    own = 4 * estimate(str(tiny_teacher), SMALL, ExecutionOptions()).parameters["UNet"]
    assert average(SMALL, ExecutionOptions()) == (own, 0) and average(SMALL, ExecutionOptions(ema_on_cpu=True)) == (
        0,
        2 * own,
    )
    assert average(dataclasses.replace(SMALL, ema=0.0), ExecutionOptions()) == (0, 0)


def test_an_xl_teacher_has_its_price_too(tiny_xl):
    told = estimate(str(tiny_xl), SMALL, ExecutionOptions(), Machine("cuda", bf16=True))
    model = load_teacher(str(tiny_xl))
    count = sum(p.numel() for _, encoder in model.text_parts for p in encoder.parameters())
    assert told.parameters["text encoder"] == count
    assert told.memory["text encoder and autoencoder, frozen"] == 2 * (count + told.parameters["VAE"])


def test_a_dry_run_reads_no_weights(tmp_path, tiny_teacher, prompt_file):
    import shutil

    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    done = sbrush("distill", prompt_file, "--teacher", folder, "--dry-run", "--out", tmp_path / "run")
    assert done.returncode == 0 and "expected peak" in done.stdout and "UNet forwards" in done.stdout
    assert not (tmp_path / "run").exists()


def test_what_is_chosen_to_save_memory_is_told_to(tiny_teacher):
    def told(recipe=SMALL, execution=FIT, **options):
        return estimate(str(tiny_teacher), recipe, execution, Machine("cuda", bf16=True), **options)

    plain, eight = told(), told(dataclasses.replace(SMALL, optimizer="adam8bit"))
    assert plain.memory["student's Adam"] == 4 * eight.memory["student's Adam"] == 8 * plain.parameters["UNet"]
    assert plain.memory["teacher's UNet, frozen"] == 2 * plain.parameters["UNet"]
    parked, encoder = told(prepared=Prepared(prompts=10)), 2 * plain.parameters["text encoder"]
    others = "text encoder and autoencoder, frozen"
    assert plain.memory[others] - parked.memory[others] == encoder == parked.host_memory["text encoder"]
    assert told(execution=ExecutionOptions(checkpointing=True)).forwards == plain.forwards + 2
    judged = told(monitoring=Monitoring(validation=1000))
    assert judged.peak - plain.peak == 4000


def test_contact_sheets_are_counted_where_they_hold_more_than_a_step(tiny_teacher, monkeypatch):
    recipe, execution = dataclasses.replace(LORA, batch=1), ExecutionOptions(checkpointing=True)
    with_sheets, without = (
        estimate(str(tiny_teacher), recipe, execution, monitoring=Monitoring(grids=grids)) for grids in (True, False)
    )
    assert with_sheets.peak > without.peak  # 8 images are decoded at once, where one is trained on
    monkeypatch.setattr("sbrush.models.model.DECODED", 32 * 32)
    assert estimate(str(tiny_teacher), recipe, execution).peak < with_sheets.peak


def test_the_clamped_clip_loss_is_counted(tiny_teacher, clip_folder):
    without = estimate(str(tiny_teacher), SMALL, ExecutionOptions())
    with_loss = estimate(
        str(tiny_teacher),
        dataclasses.replace(SMALL, clip_weight=0.1),
        ExecutionOptions(),
        alignment=AlignmentRequest(clip_folder),
    )
    name = "CLIP model and tiny VAE, frozen"
    assert without.memory[name] == 0
    assert with_loss.memory[name] == size(load_file(clip_folder / "open_clip_model.safetensors").values())
    assert with_loss.alignment_flops > 0 == without.alignment_flops
    assert any("for the CLIP loss" in line for line in with_loss.lines(SMALL, "cpu"))
    activations = [[v for k, v in told.memory.items() if "activations" in k] for told in (without, with_loss)]
    # Of four images of 32 x 32 the decoder keeps at least eight channels in float32, a few times.
    assert activations[1][0] - activations[0][0] > 3 * 4 * 8 * 32 * 32 * 4


def test_a_unet_without_a_mid_block_is_split_and_counted_too(tmp_path, tiny_teacher):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    own = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**own, "mid_block_type": None}).save_pretrained(folder / "unet")
    shared = estimate(str(folder), SMALL, ExecutionOptions(shard=True), Machine(world=2))
    assert shared.memory["student's weights, a gathered block"] > 0
