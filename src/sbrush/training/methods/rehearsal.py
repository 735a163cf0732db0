"""A VSD training step played through on shapes: what it trains, holds and multiplies. Nothing is computed."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sbrush.models.model import Model
from sbrush.models.unet import STUDENT_TARGETS, add_lora, attend_explicitly, blocks_of, set_role
from sbrush.training.accounting import Held, conditioning_shapes, kernels
from sbrush.training.alignment import Alignment
from sbrush.training.methods.method import Machine, Rehearsal
from sbrush.training.recipes import Recipe
from sbrush.training.request import ExecutionOptions


def rehearse(
    recipe: Recipe, teacher: Model, execution: ExecutionOptions, machine: Machine, alignment: Alignment | None
) -> Rehearsal:
    """The heaviest part of a step: one micro-batch, gradients included."""
    share = max(1, recipe.batch // machine.world // execution.micro_batches)
    student, base, trained, lora = _networks(teacher, recipe, execution, machine)
    owners = machine.world if execution.shard else 1
    _share_gradients(student, owners)
    autocast = machine.bf16 and machine.device.startswith("cuda")
    for control in teacher.controls if machine.bf16 else ():
        nn.Module.to(control.network, torch.bfloat16)
    working, flops, aligned = _play(teacher, (student, base), recipe, share, alignment, autocast=autocast)
    again = 1 + recipe.lora_updates * (recipe.gap != "sds") if execution.checkpointing else 0
    return Rehearsal(
        trained, {"LoRA teacher": lora}, working, flops, forwards(recipe) + again + bool(teacher.controls), aligned,
        frozen=_beside(teacher, base, recipe),
        largest_block=_largest_block(student) if owners > 1 else 0,
    )  # fmt: skip


def forwards(recipe: Recipe) -> float:
    """What an update costs for each image, in UNet forwards; a backward counts as two, through a LoRA as one.

    Student 3, or as a LoRA 2, and of several steps half of those before its last. Teacher's score 2 with guidance, LoRA
    teacher's score likewise if guided, its own update 2; what a step is held to 2, or 1 for the first; the teacher's
    steps for some images; and for each image of recipe.hold the student's and one more.
    """
    teacher = 1 if recipe.guidance == 1 and recipe.guidance_to is None else 2
    paired = (
        recipe.pair_share * recipe.pairs / recipe.batch * recipe.pair_steps * (1 if recipe.pair_guidance == 1 else 2)
    )
    first = 1 / recipe.student_steps if recipe.first_share is None else recipe.first_share
    student = (2 if recipe.student_rank else 3) + (1 - first) * recipe.student_steps / 2
    held = recipe.hold / recipe.batch * (1 + student)
    if recipe.anchor_weight:
        student += first + (1 - first) * teacher
    if recipe.gap == "sds":
        return student + teacher + paired + held
    score = teacher if recipe.guide_lora else 0 if recipe.shared_forward else 1
    return student + teacher + score + 2 * recipe.lora_updates + paired + held


def _beside(teacher: Model, base: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Bytes of other networks that a training holds: ControlNets, and the student as it was before."""

    def size(network: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in network.parameters() if not p.requires_grad)

    held = {"ControlNet, frozen": 0} if teacher.controls else {}
    for control in teacher.controls:
        held["ControlNet, frozen"] += size(control.network.requires_grad_(False))
    if teacher.controls or recipe.anchor_weight or recipe.hold:  # it draws control images, or what is to stay
        held["student as it was, frozen"] = size(base)
    return held


def _networks(
    teacher: Model, recipe: Recipe, execution: ExecutionOptions, machine: Machine
) -> tuple[UNet2DConditionModel, UNet2DConditionModel, int, int]:
    """Student and shared base as networks.Networks has them, and how many parameters of each are trained."""

    def build() -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_config(teacher.unet.config)
        return nn.Module.to(unet, torch.bfloat16) if machine.bf16 else unet  # diffusers' own `to` warns

    base = build()
    rank, alpha, targets = recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets
    lora = sum(
        p.numel() for p in add_lora(base, "lora_teacher", rank=rank, alpha=alpha, targets=targets, seed=0).values()
    )
    if recipe.student_rank:
        student = base
        trained = sum(
            p.numel()
            for p in add_lora(
                base, "student", rank=recipe.student_rank, alpha=1, targets=STUDENT_TARGETS, seed=0
            ).values()
        )
    else:
        student = build()
        trained = sum(p.numel() for p in student.parameters())
    for unet in (student, base):
        attend_explicitly(unet, machine.device)
        if execution.checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
    return student, base, trained, lora


def _share_gradients(student: nn.Module, owners: int) -> None:
    """From now on this process keeps its share alone of each of the student's gradients, once that is complete."""
    if owners == 1:
        return

    def keep_share(parameter: Tensor) -> None:
        kept.append(torch.empty(parameter.numel() // owners, device="meta"))
        parameter.grad = None

    kept = list[Tensor]()
    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(keep_share)


def _largest_block(unet: UNet2DConditionModel) -> int:
    return max(sum(p.numel() for p in block.parameters()) for block in blocks_of(unet))


def _play(
    teacher: Model,
    networks: tuple[nn.Module, nn.Module],
    recipe: Recipe,
    share: int,
    alignment: Alignment | None,
    *,
    autocast: bool,
) -> tuple[int, float, float]:
    """The most bytes held at once by one part of a batch, gradients included; FLOPs of one forward of one image.

    Lastly those of the clamped CLIP loss for one image: its backward goes to the image alone, so takes as many.
    """
    student, base = networks
    dtype = next(base.parameters()).dtype  # under autocast activations are of the dtype of matrix products

    def forward(unet: nn.Module, batch: int) -> Tensor:
        x, t = torch.zeros(batch, *teacher.latent_shape, dtype=dtype), torch.zeros(batch, dtype=torch.int64)
        conditioning = {name: value.to(dtype) for name, value in conditioning_shapes(teacher, batch).items()}
        return teacher.predict(unet, x, t, conditioning).float()

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        set_role(base, "teacher")
        forward(base, 1)
    clip = FlopCounterMode(display=False)
    if alignment:
        with clip, torch.no_grad():
            alignment.cosines(torch.zeros(1, *teacher.latent_shape), [""])
    held = Held([student, base, *(alignment.networks if alignment else ())])
    with held, kernels(autocast=autocast):
        set_role(student, "student")
        x0 = forward(student, share)
        held_x0 = forward(student, share * recipe.hold // recipe.batch) if recipe.hold else None
        with torch.no_grad():
            set_role(base, "teacher")
            forward(base, share if recipe.guidance == 1 else 2 * share)
        set_role(base, "lora_teacher")
        shared = forward(base, share) if recipe.shared_forward else None
        set_role(student, "student")
        loss = alignment.cosines(x0, [""] * share).sum() if alignment else x0.sum()
        if held_x0 is not None:
            loss = loss + held_x0.sum()
        loss.backward()
        del x0, held_x0, loss
        set_role(base, "lora_teacher")
        (forward(base, share) if shared is None else shared).sum().backward()
    return held.most, counter.get_total_flops(), 2 * clip.get_total_flops()
