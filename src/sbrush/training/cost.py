"""What a run will take, told beforehand: parameters, memory, UNet forwards, FLOPs, disk. `sbrush distill --dry-run`

The networks are built with shapes and no numbers, and one training step's heaviest part is played through with them:
every tensor that it would hold is counted, and so is every multiplication. Nothing is loaded, nothing computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from sbrush.core import Conditioning
from sbrush.models.load import load_shapes
from sbrush.models.model import Model
from sbrush.models.unet import add_lora, attend_explicitly, set_role
from sbrush.training.alignment import Alignment
from sbrush.training.networks import ExecutionOptions
from sbrush.training.recipes import Recipe
from sbrush.training.text_cache import row_bytes

GIB = 2**30
DRAWN = 8  # images at once, in a grid and in validation
PRODUCTS, NORMS = ("linear", "conv2d"), ("group_norm", "layer_norm")


@dataclass(frozen=True)
class Cost:
    """What a run takes. Memory is that of one process, in bytes, without what torch and the driver keep themselves."""

    parameters: dict[str, int]
    memory: dict[str, int]  # on the device, by what it is for
    host_memory: dict[str, int]  # off it, if it is no CPU
    flops: float  # of one UNet forward for one image
    forwards: float  # UNet forwards a image takes, a backward counted as two
    checkpoint: int  # bytes on disk
    text_cache: int = 0  # bytes on disk
    alignment_flops: float = 0  # a image, of the clamped CLIP loss

    @property
    def peak(self) -> int:
        """Bytes on the device when most is held."""
        return sum(self.memory.values())

    def lines(self, recipe: Recipe, *, keep: int = 2) -> list[str]:
        """The cost as people read it; `keep`: of checkpoints."""
        images, each = recipe.steps * recipe.batch, self.forwards * self.flops + self.alignment_flops
        clip = f" and {self.alignment_flops / 1e12:.3g} for the CLIP loss" if self.alignment_flops else ""
        return [
            "",
            *(f"{name:56} {count / 1e6:10.2f} M parameters" for name, count in self.parameters.items()),
            "",
            *(f"{name:56} {size / GIB:10.3f} GiB" for name, size in self.memory.items() if size),
            f"{'expected peak, besides what torch and the driver keep':56} {self.peak / GIB:10.3f} GiB",
            *(
                f"{name + ', in host memory':56} {size / GIB:10.3f} GiB"
                for name, size in self.host_memory.items()
                if size
            ),
            f"{f'disk for checkpoints, {keep + 1} while one is written':56} "
            f"{(keep + 1) * self.checkpoint / GIB:10.3f} GiB",
            *([f"{'disk for text embeddings':56} {self.text_cache / GIB:10.3f} GiB"] if self.text_cache else ()),
            "",
            f"{self.forwards:g} UNet forwards of {self.flops / 1e12:.3g} TFLOP a image{clip}: {each / 1e12:.3g} TFLOP",
            f"{recipe.steps} steps of {recipe.batch}: {images} images, {images * each / 1e15:.3g} PFLOP; "
            f"{images * each / 3600e14:.3g} hours at 100 TFLOP/s",
        ]


def estimate(
    source: str | None,
    recipe: Recipe,
    execution: ExecutionOptions,
    *,
    config: str | None = None,
    bf16: bool,
    world: int = 1,
    device: str = "cpu",
    clip_weights: Path | None = None,
    clip_model: str = "ViT-B-32",
    tiny_vae: Path | None = None,
    cached_prompts: int = 0,
    grids: bool = True,
    validation: int = 0,
) -> Cost:
    """The cost of a run with this teacher; SbrushError if the teacher cannot be had.

    `world`: processes, which share a batch, and with `execution.shard` the student, its gradients, moments and average.
    `clip_weights`, `clip_model`, `tiny_vae`: see Alignment.load; no weights are read. `cached_prompts`: whose text
    embeddings are kept on disk, which takes the text encoder off the device. `grids`: whether sample grids are
    drawn. `validation`: parameters of the CLIP model that validates, 0 without.
    """
    teacher = load_shapes(source, config=config)
    alignment = None
    if recipe.clip_weight:
        alignment = Alignment.shapes(teacher, clip_weights, clip_model=clip_model, tiny_vae=tiny_vae)
    share = max(1, recipe.batch // world // execution.micro_batches)
    with torch.device("meta"):
        student, base, trained, lora = _networks(teacher, recipe, execution, bf16, device)
        owners = world if execution.shard else 1
        _share_gradients(student, owners)
        autocast = bf16 and device.startswith("cuda")
        working, flops, aligned = _play(teacher, student, base, recipe, share, alignment, autocast=autocast)
        if grids or validation:
            others = torch.bfloat16 if autocast else torch.float32
            working = max(working, _draw(teacher, nn.Module.to(teacher.vae, others)))
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in _named(teacher).items()}
    count["LoRA teacher"], count["student, trained"] = lora, trained
    frozen = 2 if bf16 else 4
    parked = bool(cached_prompts) and device.startswith("cuda")
    half = 2 if device.startswith("cuda") and bf16 else 4
    copies = 2 * trained if bf16 and not recipe.student_rank else 0  # autocast's, for as long as a step's forward lasts
    working += copies  # its gradients are float32, and were counted as its activations are: in bfloat16
    moments = 2 if recipe.optimizer == "adam8bit" else 8
    average = 4 * trained if recipe.ema else 0
    memory = {
        "teacher's UNet, frozen": frozen * count["UNet"],
        "text encoder and autoencoder, frozen": half * (count["VAE"] + (0 if parked else count["text encoder"])),
        "CLIP model and tiny VAE, frozen": 4 * sum(p.numel() for p in alignment.own_parameters()) if alignment else 0,
        "CLIP model that validates, float32": 4 * validation,
        "student's weights, float32": 4 * trained // owners,
        "student's weights, a block of them together": 4 * _largest_block(student) if owners > 1 else 0,
        "student's weights, bfloat16 copy": copies,
        "student's Adam": moments * trained // owners,
        "student's average": 0 if execution.ema_on_cpu else average // owners,
        "LoRA teacher: weights, Adam": (4 + moments) * lora,
        f"gradients and activations, {share} image{'s' if share > 1 else ''} at once": working,
    }
    forwards = recipe.forwards + (1 + recipe.lora_updates * (recipe.gap != "sds") if execution.checkpointing else 0)
    state = (4 + moments) * (trained + lora) + average
    # What is on its way to the average takes as much again.
    host = {"student's average": 2 * average // owners if execution.ema_on_cpu else 0}
    host["text encoder"] = half * count["text encoder"] if parked else 0
    cache = cached_prompts * row_bytes(_conditioning(teacher, 1))
    return Cost(count, memory, host, flops, forwards, state, cache, aligned)


def _named(model: Model) -> dict[str, nn.Module]:
    encoders = nn.ModuleList([encoder for _, encoder in model.text_parts])
    return {"UNet": model.unet, "text encoder": encoders, "VAE": model.vae}


def _networks(
    teacher: Model, recipe: Recipe, execution: ExecutionOptions, bf16: bool, device: str
) -> tuple[UNet2DConditionModel, UNet2DConditionModel, int, int]:
    """Student and shared base as networks.Networks has them, and how many parameters of each are trained."""

    def build() -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_config(teacher.unet.config)
        return nn.Module.to(unet, torch.bfloat16) if bf16 else unet  # diffusers' own `to` warns, of nothing here

    base = build()
    rank, alpha, targets = recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets
    lora = sum(
        p.numel() for p in add_lora(base, "lora_teacher", rank=rank, alpha=alpha, targets=targets, seed=0).values()
    )
    if recipe.student_rank:
        student = base
        trained = sum(
            p.numel()
            for p in add_lora(base, "student", rank=recipe.student_rank, alpha=1, targets="all", seed=0).values()
        )
    else:
        student = build()
        trained = sum(p.numel() for p in student.parameters())
    for unet in (student, base):
        attend_explicitly(unet, device)
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
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    return max(sum(p.numel() for p in block.parameters()) for block in blocks)


def _play(
    teacher: Model,
    student: nn.Module,
    base: nn.Module,
    recipe: Recipe,
    share: int,
    alignment: Alignment | None,
    *,
    autocast: bool,
) -> tuple[int, float, float]:
    """The most bytes held at once by one part of a batch, gradients included; FLOPs of one forward of one image.

    Lastly those of the clamped CLIP loss for one image: its backward goes to the image alone, so takes as many.
    """
    dtype = next(base.parameters()).dtype  # under autocast activations are of the dtype of matrix products

    def forward(unet: nn.Module, batch: int) -> Tensor:
        x, t = torch.zeros(batch, *teacher.latent_shape, dtype=dtype), torch.zeros(batch, dtype=torch.int64)
        conditioning = {name: value.to(dtype) for name, value in _conditioning(teacher, batch).items()}
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
        with torch.no_grad():
            set_role(base, "teacher")
            forward(base, share if recipe.guidance == 1 else 2 * share)
        set_role(base, "lora_teacher")
        shared = forward(base, share) if recipe.shared_forward else None
        set_role(student, "student")
        loss = alignment.cosines(x0, [""] * share).sum() if alignment else x0.sum()
        loss.backward()
        del x0, loss
        set_role(base, "lora_teacher")
        (forward(base, share) if shared is None else shared).sum().backward()
    return held.most, counter.get_total_flops(), 2 * clip.get_total_flops()


def _draw(teacher: Model, vae: Any) -> int:
    """The most bytes held at once while images for a sample grid are decoded."""
    held = Held([vae])
    with held, torch.no_grad(), kernels(autocast=False):
        vae.decode(
            torch.zeros(min(DRAWN, teacher.decoded_at_once), *teacher.latent_shape, dtype=vae.dtype)
        ).sample.float()
    return held.most


def _conditioning(teacher: Model, batch: int) -> Conditioning:
    """What a UNet is told of so many prompts, with shapes and no numbers."""
    width = sum(encoder.config.hidden_size for _, encoder in teacher.text_parts)
    told = {"tokens": torch.zeros(batch, teacher.text_parts[0][0].model_max_length, width, device="meta")}
    if len(teacher.text_parts) > 1:
        told["pooled"] = torch.zeros(batch, teacher.text_parts[-1][1].config.projection_dim, device="meta")
    return told


class _Flash(torch.autograd.Function):
    """What fused attention holds: its inputs, its output and a number for each query, but no attention map."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def kernels(*, autocast: bool) -> Iterator[None]:
    """While this lasts, networks without numbers hold what a device's own kernels hold.

    torch would write attention maps out for them. And CUDA's `autocast`, which it knows on the device alone, takes
    norms in float32, and what goes into products in the products' own format.
    """
    own = {name: getattr(F, name) for name in ("scaled_dot_product_attention", *NORMS, *PRODUCTS)}

    def taking(dtype: torch.dtype, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) else x

        return lambda *args, **kwargs: function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Flash.apply(query, key, value)

    F.scaled_dot_product_attention = taking(torch.bfloat16, attend) if autocast else attend
    if autocast:
        for name in NORMS:
            setattr(F, name, taking(torch.float32, own[name]))
        for name in PRODUCTS:
            setattr(F, name, taking(torch.bfloat16, own[name]))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that come into being, for as long as they are held."""

    def __init__(self, known: list[nn.Module]) -> None:
        super().__init__()
        tensors = [t for module in known for t in (*module.parameters(), *module.buffers())]
        self._known = {t.untyped_storage()._cdata for t in tensors}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._meet(value.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)
