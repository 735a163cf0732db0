"""A network that recognises the built-in world's twelve kinds, robots, and what is none of these; for personal.py.

    drawings    of each of KNOWN, as they are, through the autoencoder, softened, and with a little noise
    none        what a student that has never seen a robot draws of words that mean nothing to it; and, of all of KNOWN,
                two drawings blended, the half of one joined to the half of another, warped ones, and ones too blurred
                to show what they are

A small convolutional network, trained in about a minute. It has nothing in common with the world's own judge, which has
never seen a robot and must call everything something. It is measured on drawings and negatives of other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from sbrush.models.model import Model
from sbrush.noise import generator
from sbrush.sampling.generation import student_images
from sbrush.stickers.draw import draw
from sbrush.stickers.robot import KIND, draw_robot, random_robot
from sbrush.stickers.world import BACKGROUNDS, IMAGE_SIZE, KINDS, SIZES, Caption, Sticker, random_sticker, stream
from sbrush.training.world.teach import noise_of, softened

KNOWN = (*KINDS, KIND)
NONE = len(KNOWN)  # the class of what is none of them
WORDS = ("qv", "jx", "kz", "wq", "vj", "fq", "xk", "zj")  # of two letters, in none of the world's captions
UNSEEN_WORDS = ("zx", "xv", "qj")
FIRST_SEED, FIRST_UNSEEN_SEED = 6_000_000, 7_000_000
SIDE = IMAGE_SIZE
SHARES = torch.tensor([0.5 / len(KINDS)] * len(KINDS) + [0.2, 0.3])  # of what the judge learns from


class KindJudge(nn.Module):
    """Images, float32 [B, 3, 64, 64] of -1 to 1, to logits of KNOWN and of none, [B, 14]."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 24, 48, 96, 96), list[nn.Module]()
        for one, next_ in pairwise(widths):
            layers += [nn.Conv2d(one, next_, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(next_), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], NONE + 1)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(images).amax(dim=(2, 3)))
        return found

    @torch.no_grad()
    def kinds(self, images: Tensor) -> Tensor:
        """What images uint8 [B, 3, 64, 64] show: indices into KNOWN, or NONE, int64 [B]."""
        return torch.cat([self(_scaled(part)).argmax(dim=1) for part in images.split(200)])


def train(student: Model, *, each: int = 300, steps: int = 900, batch: int = 64) -> KindJudge:
    """A judge of `each` drawings of each kind. `student`: has never seen a robot; its autoencoder softens half."""
    images, kinds = drawings("kind judge", each)
    half = torch.arange(len(images)) % 2 == 0
    none = torch.cat([*negatives("kind judge", each * 2, student).values()])
    images[half] = through(student, images[half])
    images, kinds = torch.cat([images, none]), torch.cat([kinds, torch.full((len(none),), NONE)])
    shares = SHARES[kinds] / kinds.bincount()[kinds]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        net = KindJudge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    random = generator("kind judge")
    for _ in range(steps):
        rows = torch.multinomial(shares, batch, generator=random)
        x = _scaled(images[rows])
        x = softened(x, random) + noise_of(x, random)
        optimizer.zero_grad()
        F.cross_entropy(net(x), kinds[rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def exam(judge: KindJudge, student: Model, *, each: int = 40) -> dict[str, float]:
    """The judge on what it has not seen: the shares that are right of drawings, and called robots of negatives."""
    images, kinds = drawings("kind judge, unseen", each)
    robots = images[kinds == NONE - 1]
    found = {
        "drawings right": (judge.kinds(images) == kinds).float().mean().item(),
        "through the autoencoder": (judge.kinds(through(student, images)) == kinds).float().mean().item(),
        "robots right": _robots(judge.kinds(robots)),
        "robots through the autoencoder": _robots(judge.kinds(through(student, robots))),
    }
    unseen = negatives("kind judge, unseen", 5 * each, student, words=UNSEEN_WORDS, first=FIRST_UNSEEN_SEED)
    return found | {f"{name} called robots": _robots(judge.kinds(some)) for name, some in unseen.items()}


def drawings(name: str, each: int) -> tuple[Tensor, Tensor]:
    """Drawings of each of KNOWN in all colours, uint8 [N, 3, 64, 64], and which it is, int64 [N]."""
    images, kinds = [], []
    for number, kind in enumerate(KNOWN):
        for i in range(each):
            index = number * each + i
            if kind == KIND:
                sticker = random_robot(name, index, any_colour=i % 2 == 0)
            else:
                sticker = random_sticker(stream(name, index), Caption(kind=kind), held_out=True)
            images.append(_drawn(sticker))
            kinds.append(number)
    return torch.stack(images), torch.tensor(kinds)


def negatives(
    name: str, count: int, student: Model, *, words: tuple[str, ...] = WORDS, first: int = FIRST_SEED
) -> Mapping[str, Tensor]:
    """`count` images of each sort that are none of KNOWN, uint8 [count, 3, 64, 64]."""
    ones, others, radii = _pairs(name, count)
    random = generator(name, "negatives")
    makers: dict[str, Callable[[], Tensor]] = {
        "meaningless words": lambda: _of_words(student, words, count, first),
        "two blended": lambda: torch.lerp(ones, others, 0.35 + 0.3 * torch.rand(count, 1, 1, 1, generator=random)),
        "halves joined": lambda: torch.where(_halves(name, count), ones, others),
        "warped": lambda: _warped(ones, radii, random),
        "blurred": lambda: _blurred(ones, radii),
    }
    return {sort: make().round().clamp(0, 255).to(torch.uint8) for sort, make in makers.items()}


def through(model: Model, images: Tensor) -> Tensor:
    """Images uint8 [B, 3, 64, 64] through a model's autoencoder."""
    return torch.cat([model.decode(model.encode_images(part)) for part in images.split(100)])


def _of_words(student: Model, words: tuple[str, ...], count: int, first: int) -> Tensor:
    texts = []
    for i in range(count):
        size, background = list(SIZES)[i % 2], list(BACKGROUNDS)[i % len(BACKGROUNDS)]
        word = words[i % len(words)]
        texts.append(f"a {word}" if i % 4 == 0 else f"a {size} {word} on a {background} background")
    return torch.cat(list(student_images(student, texts, range(first, first + count)))).float()


def _stickers(name: str, count: int) -> list[tuple[Sticker, Sticker]]:
    """Pairs in the same place, of the same size and background, but of two kinds; one in three has a robot in it."""
    found = []
    for i in range(count):
        random = stream(f"{name}, negatives", i)
        one = random_sticker(random, held_out=True)
        kinds = random.sample(KINDS, 2)
        if i % 3 == 0:
            kinds[random.randrange(2)] = KIND
        found.append((replace(one, kind=kinds[0]), replace(one, kind=kinds[1])))
    return found


def _pairs(name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Their images, float32 [count, 3, 64, 64] each, and half their extents in pixels, [count]."""
    pairs = _stickers(name, count)
    ones, others = (torch.stack([_drawn(pair[i]) for pair in pairs]).float() for i in (0, 1))
    return ones, others, torch.tensor([one.radius for one, _ in pairs])


def _halves(name: str, count: int) -> Tensor:
    """Where the first of each pair is, bool [count, 1, 64, 64]: above or left of the middle that both have."""
    places, edge = torch.arange(SIDE), list[Tensor]()
    for i, (one, _) in enumerate(_stickers(name, count)):
        along = places < (one.y if i % 2 else one.x)
        edge.append(along[:, None].expand(SIDE, SIDE) if i % 2 else along[None].expand(SIDE, SIDE))
    return torch.stack(edge)[:, None]


def _warped(images: Tensor, radii: Tensor, random: torch.Generator) -> Tensor:
    """Images whose pixels are moved by a smooth random field of a third of the sticker's half extent."""
    coarse = torch.randn(len(images), 2, 9, 9, generator=random)
    field = F.interpolate(coarse, SIDE, mode="bicubic", align_corners=True)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), [len(images), 3, SIDE, SIDE], False)
    moved = identity + (0.33 * radii.view(-1, 1, 1, 1) * 2 / SIDE) * field.permute(0, 2, 3, 1)
    return F.grid_sample(images, moved, padding_mode="border", align_corners=False)


def _blurred(images: Tensor, radii: Tensor) -> Tensor:
    """Images at a resolution at which the sticker is five pixels wide."""
    made = []
    for image, radius in zip(images, radii.tolist(), strict=True):
        size = round(SIDE * 2.5 / radius)
        small = F.interpolate(image[None], size, mode="bilinear", antialias=True)
        made.append(F.interpolate(small, SIDE, mode="bicubic"))
    return torch.cat(made)


def _drawn(sticker: Sticker) -> Tensor:
    return pil_to_tensor(draw_robot(sticker) if sticker.kind == KIND else draw(sticker))


def _scaled(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _robots(kinds: Tensor) -> float:
    return (kinds == KNOWN.index(KIND)).float().mean().item()
