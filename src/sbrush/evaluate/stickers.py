"""The protocol on the built-in world: which captions and seeds, against which real images.

    captions    caption i is random_caption(stream("eval", i)); one in twenty names a held-out combination
    seeds       1,000,000 + i; for diversity's captions 2,000,000 + i
    reference   for each caption and seed a real image, drawn from stream("reference", seed)
    real images others, drawn from stream("floor", seed) and measured as any model is: the best possible at this N
    diversity   so many images of each of diversity.py's captions, compared with as many real ones

Images pass by in batches; features, what the judge sees in them and where it is stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sbrush.console import Progress, SbrushError, progress
from sbrush.evaluate.cache import Result, ResultCache, versions
from sbrush.evaluate.report import Metrics, Report, few_images, finite
from sbrush.metrics import diversity
from sbrush.metrics.accuracy import accuracy
from sbrush.metrics.conventions import NEIGHBOURS
from sbrush.metrics.fid import fid
from sbrush.metrics.precision_recall import precision_recall
from sbrush.sampling.images import to_image
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import Judge
from sbrush.stickers.world import IMAGE_SIZE, Caption, random_caption, random_sticker, stream

PROTOCOL = 1  # raised whenever a model would get other metrics: other images of the same seeds, or other measures
FIRST_SEED, FIRST_DIVERSITY_SEED = 1_000_000, 2_000_000
BATCH = 100
SHOWN = 12  # images of the first captions, and as many of diversity's first caption, that the report shows

Pair = tuple[Caption, int]
MakeImages = Callable[[Sequence[str], Sequence[int]], Iterator[Tensor]]
"""(prompts, seeds) -> their images in order, in batches of any length: uint8 [b, 3, 64, 64]."""


@dataclass(frozen=True)
class Candidate:
    """A model to be measured.

    `cache_key` says all that its images depend on besides steps and guidance, such as the weights' digest and the
    precision: what was measured under the same key is cached. None measures every time.
    """

    name: str
    images: MakeImages
    steps: int | None = None
    guidance: float | None = None
    cache_key: str | None = None


@dataclass(frozen=True)
class Reference:
    """What models are compared with: real images' features, float32 [N, width], and their variety."""

    features: Tensor
    varieties: list[diversity.Variety]


def pairs(n: int) -> list[Pair]:
    """The protocol's first `n` captions and seeds."""
    return [(random_caption(stream("eval", i)), FIRST_SEED + i) for i in range(n)]


def diversity_pairs(per_caption: int = 100) -> list[Pair]:
    """Each of diversity's captions `per_caption` times with its seeds, one caption after the other."""
    captions = [caption for caption in diversity.CAPTIONS for _ in range(per_caption)]
    return [(caption, FIRST_DIVERSITY_SEED + i) for i, caption in enumerate(captions)]


def real_images(name: str, items: Sequence[Pair]) -> Iterator[Tensor]:
    """For each pair an image of which the caption is true, drawn from stream(name, seed)."""
    for first in range(0, len(items), BATCH):
        drawn = [draw(random_sticker(stream(name, seed), caption)) for caption, seed in items[first : first + BATCH]]
        yield torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in drawn])


def evaluate_stickers(
    candidates: Sequence[Candidate],
    judge: Judge,
    *,
    n: int = 1000,
    per_caption: int = 100,
    cache: Path | None = None,
    fresh: bool = False,
) -> Report:
    """Measures each candidate, and real images like a candidate, on `n` pairs and `per_caption` of diversity's each.

    `n`: 4 to 1,000,000; `per_caption`: 2 to 100,000; `cache`: folder of cached metrics, by default the user's own.
    With `fresh` no cached metrics are read, but what is measured is cached.
    Raises SbrushError if a number is out of range or a candidate's images are not 64 x 64.
    """
    if not (NEIGHBOURS < n <= 1_000_000 and 2 <= per_caption <= 100_000):
        raise SbrushError(
            f"cannot measure on {n} captions and {per_caption} images of each of diversity's",
            f"take {NEIGHBOURS + 1} to 1,000,000 captions (1,000 by default) and 2 to 100,000 images",
            code=2,
        )
    measured, varied = pairs(n), diversity_pairs(per_caption)
    reference = real_reference(measured, varied, judge)
    caption_of = {seed: caption for caption, seed in (*measured, *varied)}
    real = Candidate("real images", lambda _, seeds: real_images("floor", [(caption_of[s], s) for s in seeds]))

    results, notes = {}, few_images(n, judge.width)
    for candidate in (*candidates, real):
        place = cache_place(candidate, judge, n, per_caption, cache)
        result = place.load(n, per_caption) if place and not fresh else None
        if result is None:
            result = _generate_and_measure(candidate, measured, varied, judge, reference)
            if place:
                place.save(result)
        elif result.metrics.versions != versions():
            notes.append(f"{candidate.name} was measured with {_list(result.metrics.versions)}")
        results[candidate.name] = result
    metrics = [replace(result.metrics, name=name) for name, result in results.items()]
    shown = {name: result.shown for name, result in results.items()}
    return Report(metrics, _protocol(n, per_caption, judge), notes, shown)


def cache_place(
    candidate: Candidate, judge: Judge, n: int, per_caption: int, cache: Path | None = None
) -> ResultCache | None:
    """Where a candidate's metrics are cached; None if they are not. The package's own version is no part of the key."""
    if candidate.cache_key is None:
        return None
    key = [PROTOCOL, judge.digest, n, per_caption, [c.text for c in diversity.CAPTIONS]]
    return ResultCache.for_key([*key, candidate.cache_key, candidate.steps, candidate.guidance], cache)


def measure(
    name: str,
    batches: Iterable[Tensor],
    diversity_batches: Iterable[Tensor],
    captions: Sequence[Caption],
    judge: Judge,
    reference: Reference,
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> Metrics:
    """One model's metrics from its images, uint8 [b, 3, 64, 64], taken as they come in the order of the pairs.

    `batches`: one image for each of `captions`; `diversity_batches`: equally many of each of diversity's captions.
    Raises SbrushError if images are not 64 x 64, ValueError if there are too few or too many.
    """
    seen, various = extract(batches, judge, len(captions)), extract(diversity_batches, judge)
    return metrics_of(name, (seen, various), captions, judge, reference, steps=steps, guidance=guidance)


class Extracted(NamedTuple):
    """What stays of images that have passed by."""

    features: Tensor  # float32 [N, width]
    judged: dict[str, Tensor]  # int64 [N] each
    places: Tensor  # float32 [N, 2]


def metrics_of(
    name: str,
    images: tuple[Extracted, Extracted],
    captions: Sequence[Caption],
    judge: Judge,
    reference: Reference,
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> Metrics:
    """The same of what stays of the images: one for each caption, and diversity's."""
    seen, various = images
    trained, held_out = (accuracy(captions, seen.judged, held_out=apart) for apart in (False, True))
    precision, recall = precision_recall(reference.features, seen.features)
    varieties = diversity.varieties(diversity.CAPTIONS, various.judged, various.places)
    return Metrics(
        name=name,
        n=len(captions),
        per_caption=len(various.places) // len(diversity.CAPTIONS),
        steps=steps,
        guidance=guidance,
        fid=finite(fid(reference.features, seen.features)),
        clip_score=finite(judge.clip_score(seen.features, [c.text for c in captions]).mean().item()),
        precision=precision,
        recall=recall,
        accuracy=trained.share,
        accuracy_n=trained.named,
        held_out=held_out.share,
        held_out_n=held_out.named,
        diversity=diversity.shares(varieties, reference.varieties),
        versions=versions(),
    )


def extract(batches: Iterable[Tensor], judge: Judge, count: int | None = None) -> Extracted:
    """What the judge sees in images as they pass; `count` of them, if given, are expected."""
    features, places = [], []
    for batch in batches:
        if batch.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise SbrushError(
                f"images of {batch.shape[-1]} x {batch.shape[-2]} pixels cannot be measured as stickers",
                "the built-in world's protocol is for students of the built-in teacher",
            )
        features.append(judge.features(batch))
        places.append(diversity.centroids(batch))
    if count is not None and sum(map(len, places)) != count:
        raise ValueError(f"{count} images were asked for, {sum(map(len, places))} came")
    together = torch.cat(features)
    return Extracted(together, judge.classify(together), torch.cat(places))


def real_reference(measured: Sequence[Pair], varied: Sequence[Pair], judge: Judge) -> Reference:
    """The real images that every candidate is compared with."""
    with progress("reference", len(measured) + len(varied), unit="images") as bar:
        real = extract(_count(real_images("reference", measured), bar), judge, len(measured))
        open_ = extract(_count(real_images("reference", varied), bar), judge, len(varied))
    return Reference(real.features, diversity.varieties(diversity.CAPTIONS, open_.judged, open_.places))


def _generate_and_measure(
    candidate: Candidate, measured: Sequence[Pair], varied: Sequence[Pair], judge: Judge, reference: Reference
) -> Result:
    """Lets the candidate generate its images and measures them."""
    first, second = list[Tensor](), list[Tensor]()  # images to show
    batches, more = (candidate.images([c.text for c, _ in some], [s for _, s in some]) for some in (measured, varied))
    with progress(candidate.name, len(measured) + len(varied), unit="images") as bar:
        metrics = measure(
            candidate.name,
            _count(batches, bar, first),
            _count(more, bar, second),
            [caption for caption, _ in measured],
            judge,
            reference,
            steps=candidate.steps,
            guidance=candidate.guidance,
        )
    shown = [*zip(measured, first, strict=False), *zip(varied, second[: metrics.per_caption], strict=False)]
    return Result(metrics, [(caption.text, to_image(image)) for (caption, _), image in shown])


def _count(batches: Iterable[Tensor], bar: Progress, kept: list[Tensor] | None = None) -> Iterator[Tensor]:
    """The batches, counted on the way; the first SHOWN images go to `kept`."""
    for batch in batches:
        if kept is not None:
            kept += batch[: max(0, SHOWN - len(kept))]
        yield batch
        bar.advance(len(batch))


def _protocol(n: int, per_caption: int, judge: Judge) -> dict[str, str]:
    """The protocol in words, for the report."""
    return {
        "captions": f"{n}, drawn at random; combinations of kind and colour held out of training are counted apart",
        "seeds": f"from {FIRST_SEED}; for diversity from {FIRST_DIVERSITY_SEED}; one for each image",
        "reference": f"{n} real images of the same captions; FID on the judge's {judge.width} features, "
        f"precision and recall with k = {NEIGHBOURS}",
        "accuracy": "share of the attributes named by a caption that the judge sees in its image",
        "diversity": f"{per_caption} images of each of " + ", ".join(f'"{c.text}"' for c in diversity.CAPTIONS),
        "real images": "drawn from other seeds and measured like a model: the best possible at this number of images",
        "judge": f"sha256 {judge.digest[:16]}",
        "versions": _list(versions()) + f"; protocol {PROTOCOL}",
    }


def _list(found: dict[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in found.items())
