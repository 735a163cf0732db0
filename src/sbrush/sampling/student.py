"""A student as a Python object: `sbrush.load_student("runs/sd21")("a cat", seed=1)`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast, overload

from PIL import Image

from sbrush.console import SbrushError, info, printable
from sbrush.device import pick_device, pick_dtype
from sbrush.models.lora_request import LoraRequest, parse_loras
from sbrush.sampling.control_request import Control
from sbrush.sampling.generation import Drawer, student_images
from sbrush.sampling.images import to_image
from sbrush.sampling.negative_request import Negative
from sbrush.sampling.opening import Runtime, open_student
from sbrush.sampling.seeds import LARGEST_SEED

if TYPE_CHECKING:
    from sbrush.models.model import Model

Steer = Control | Sequence[Control] | None


def load_student(
    source: str | None = None,
    *,
    start_timestep: int | None = None,
    loras: Iterable[str | LoraRequest] = (),
    vae: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    runtime: Runtime = "auto",
) -> Student:
    """Loads a student, ready to draw.

    Args:
        source: A student's folder, a run's folder (its student), one of a run's checkpoints (the student at that time)
            or a Hub id; "stickers" or "stickers-few" are built in. None is "stickers".
        start_timestep: Timestep at which the student starts from unit noise, for students whose scheduler does not say
            it, such as 399 for DMD2's. None reads it from the scheduler.
        loras: LoRAs made for the student's teacher, added to its weights. Each is a file, a folder, a Hub id or
            "blueprint", as for `sbrush sample --lora`; append ":WEIGHT" for another weight than 1.
        vae: VAE that decodes instead of the student's own: "tiny" (TAESD, or a tiny VAE of the built-in student; much
            faster, and a little less exact), a folder of diffusers' AutoencoderTiny or AutoencoderKL, or a Hub id. None
            is the student's own.
        device: "auto" (CUDA if there is a GPU, else the CPU), "cpu", "cuda" or "cuda:1".
        precision: Number format of the networks: "auto" (float16 on CUDA, float32 on the CPU), "float32", "bfloat16"
            or "float16".
        runtime: "onnx" draws with onnxruntime on the CPU in float32, if the student has ONNX graphs. "torch" draws with
            torch. "auto" is "onnx" where possible. `model.unet` and the other networks exist with "torch" only.

    Returns:
        The student, with its weights in memory.

    Raises:
        SbrushError: There is no such student, LoRA, VAE, device or precision, files are damaged, or a LoRA or VAE was
            made for another base model. `hint` says what to do.
    """
    requests = parse_loras(loras)
    where = pick_device(device)
    dtype = pick_dtype(precision, where, "sample")
    model = open_student(
        source, start_timestep=start_timestep, loras=requests, vae=vae, device=where, dtype=dtype, runtime=runtime
    )
    return Student(model, source, vae)


class Student:
    """A student in memory. Call it with prompts and seeds to get Pillow images.

    `load_student` returns one. `model` wraps its networks: `model.image_size` is (height, width) in pixels, and
    `model.device` is its device.
    """

    def __init__(self, model: Drawer, source: str | None = None, vae: str | None = None) -> None:
        self.model = model
        self._source, self._vae = source, vae
        self._torch = model if model.runtime is None else None  # which a negative prompt and ControlNets need
        self._controls: dict[str, Any] = {}  # those that were used, by name

    @overload
    def __call__(
        self,
        prompts: str,
        seed: int = 0,
        *,
        steps: int | None = None,
        negative: str | Negative | None = None,
        control: Steer = None,
        batch: int = 32,
    ) -> Image.Image: ...

    @overload
    def __call__(
        self,
        prompts: list[str] | tuple[str, ...],
        seed: int | Sequence[int] = 0,
        *,
        steps: int | None = None,
        negative: str | Negative | None = None,
        control: Steer = None,
        batch: int = 32,
    ) -> list[Image.Image]: ...

    @overload
    def __call__(
        self,
        prompts: str,
        seed: Sequence[int],
        *,
        steps: int | None = None,
        negative: str | Negative | None = None,
        batch: int = 32,
    ) -> list[Image.Image]: ...

    def __call__(
        self,
        prompts: str | list[str] | tuple[str, ...],
        seed: int | Sequence[int] = 0,
        *,
        steps: int | None = None,
        negative: str | Negative | None = None,
        control: Steer = None,
        batch: int = 32,
    ) -> Image.Image | list[Image.Image]:
        """Draws one image for each pair of prompt and seed.

        The images are those of `sbrush sample` with the same prompt, seed, device and precision. An image depends on
        its prompt and seed; other images in its batch change it by rounding only.

        Args:
            prompts: One prompt or a list of them.
            seed: One seed, a whole number from 0, or a list of them. A single seed is used for every prompt, and a
                single prompt with every seed. Two lists of the same length are combined in pairs.
            steps: Steps in which the student draws. None: as many as it was trained for.
            negative: What the images should not show: a text, or a `Negative` with its method and scale.
            control: An image that steers what is drawn, such as sbrush.Control("outline", "cat.png", prep="outline"),
                or several in a list.
            batch: Number of images that the networks draw at once. Fewer take less memory.

        Returns:
            An RGB image for one prompt and one seed; a list of images, in order, if either is a list.

        Raises:
            SbrushError: A prompt is empty, a seed is not a whole number from 0, the two lists differ in length, the
                student does not take that many steps, the negative prompt is too long for it, or a control image or its
                ControlNet cannot be used.
        """
        single = isinstance(prompts, str) and not isinstance(seed, Sequence)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [*seed] if isinstance(seed, Sequence) else [seed]
        _check(texts, seeds, batch)
        if len(seeds) == 1:
            seeds = seeds * len(texts)
        elif len(texts) == 1:
            texts = texts * len(seeds)
        model = self.model if negative is None else self._away_from(negative)
        hints = None
        if control:
            from sbrush.sampling.control import load_steering

            wanted = [control] if isinstance(control, Control) else control
            model = model if negative is not None else self._in_torch("a ControlNet")
            steering = load_steering(model, [one.read() for one in wanted], loaded=self._controls)
            model, hints = steering.steer(model), steering.images
        images = [
            to_image(image)
            for image in chain.from_iterable(
                student_images(model, texts, seeds, steps=steps, control=hints, batch=batch)
            )
        ]
        return images[0] if single else images

    def _away_from(self, negative: str | Negative) -> Drawer:
        """The student with a negative prompt."""
        negative = Negative(negative) if isinstance(negative, str) else negative
        from sbrush.sampling.guidance import with_negative

        return with_negative(self._in_torch("a negative prompt"), negative)

    def _in_torch(self, what: str) -> Model:
        """The student with torch's networks. One that onnxruntime draws is loaded again the first time."""
        if self._torch is None:
            info(f"note: {what} needs torch: loading the student again")
            self._torch = open_student(self._source, vae=self._vae, runtime="torch")
        return cast("Model", self._torch)

    def __repr__(self) -> str:
        height, width = self.model.image_size
        return f"<sbrush.Student {self.model.name!r}, {width} x {height} pixels, on {self.model.device}>"


def _check(texts: Sequence[str], seeds: Sequence[int], batch: int) -> None:
    """SbrushError if these are not prompts and seeds that go together."""
    example = 'student("a cat", seed=1), student(["a cat", "a dog"], seed=1) or student("a cat", seed=range(8))'
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise SbrushError(f"not a prompt: {printable(repr(text))}", example, code=2)
    for seed in seeds:
        try:
            fits = 0 <= operator.index(seed) <= LARGEST_SEED
        except TypeError:
            fits = False
        if not fits:
            raise SbrushError(f"not a seed: {printable(repr(seed))}", "a seed is a whole number from 0 on", code=2)
    if len(texts) != len(seeds) and 1 not in (len(texts), len(seeds)):
        raise SbrushError(
            f"{len(texts)} prompts do not pair with {len(seeds)} seeds",
            "give two lists of one length, or one prompt, or one seed",
            code=2,
        )
    if batch < 1:
        raise SbrushError(f"a batch of {batch} images", "batch is 1 or more", code=2)
