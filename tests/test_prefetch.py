"""Work on other threads: in order, before its turn, bounded, and over when its taker is."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from sbrush.evaluate.coco.features import FeatureExtractor, UnreadableImages
from sbrush.evaluate.coco.protocols import PROTOCOLS
from sbrush.sampling.images import save_png, to_image
from sbrush.sampling.prefetch import BATCHES, prefetch


def workers() -> int:
    return sum("ThreadPoolExecutor" in thread.name for thread in threading.enumerate())


def test_results_are_those_of_a_loop() -> None:
    batches = [[1, 2, 3], [4], [], [5, 6], [7]]
    assert list(prefetch(lambda x: x * x, batches)) == [[x * x for x in batch] for batch in batches]
    assert list(prefetch(lambda x: x, [])) == []


def test_work_goes_on_while_batches_are_made_and_while_results_are_used() -> None:
    """Without timing: each side waits for what only the other can do meanwhile."""
    worked = [threading.Event() for _ in range(6)]

    def batches() -> Iterator[list[int]]:
        for number in range(6):
            assert number == 0 or worked[number - 1].wait(30)
            yield [number]

    for number, _ in enumerate(prefetch(lambda i: worked[i].set(), batches())):
        assert worked[min(number + BATCHES, 5)].wait(30)


@pytest.mark.parametrize("where", ["work", "batches", "taker"])
def test_errors_and_interrupts_end_it(where: str) -> None:
    def batches() -> Iterator[list[int]]:
        for number in range(100):
            if where == "batches" and number == 5:
                raise KeyboardInterrupt
            made.append(number)
            yield [number]

    def work(number: int) -> int:
        if where == "work" and number == 3:
            raise ValueError("three")
        return number

    made: list[int] = []
    before = workers()
    with pytest.raises(ValueError if where == "work" else KeyboardInterrupt):
        for results in prefetch(work, batches()):
            if where == "taker" and results == [2]:
                raise KeyboardInterrupt
    assert len(made) <= 3 + BATCHES + 1
    assert workers() == before


class Means:
    """In the place of both networks: an image's features are its mean colour."""

    def features(self, images: Tensor, resize: str) -> Tensor:
        assert resize == "clean"
        return images.float().mean(dim=(2, 3))

    def prepare(self, image: Tensor) -> Tensor:
        return image[:, :8, :8].float()

    def scores(self, images: Tensor, captions: list[str], prefix: str = "") -> Tensor:
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(c)) for c in captions])


def test_images_are_extracted_as_one_by_one_and_few_are_held(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """However many images there are, no more than the batches on their way exist at a time."""
    alive: set[int] = set()
    most = [0]

    def batches() -> Iterator[Tensor]:
        for number in range(12):
            batch = images[4 * number : 4 * number + 4].clone()
            alive.add(number)
            weakref.finalize(batch.untyped_storage(), alive.discard, number)
            # A thread lets go of its image a moment after its result can be had.
            until = time.monotonic() + 10
            while len(alive) > BATCHES + 2 and time.monotonic() < until:
                time.sleep(0.001)
            most[0] = max(most[0], len(alive))
            yield batch
            del batch

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (48, 3, 40, 30), dtype=np.uint8))
    captions = ["x" * i for i in range(48)]
    extractor = FeatureExtractor(PROTOCOLS["swiftbrush"], Means(), Means())  # type: ignore[arg-type]
    seen = list(extractor.extract_generated(batches(), captions))
    ready = [extractor.prepare(to_image(p), scored=True) for p in images]
    assert [len(rows["clip"]) for rows in seen] == [4] * 12
    for name in ("features", "clip"):
        alone = torch.cat([extractor.extract([r], [c])[name] for r, c in zip(ready, captions, strict=True)])
        assert torch.allclose(torch.cat([rows[name] for rows in seen]), alone)
    assert most[0] <= BATCHES + 2  # those begun, the one looked at, and the one that comes

    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, image in zip(files, images, strict=False):
        save_png(file, to_image(image))
    files[2].write_bytes(b"none")
    (read,) = extractor.extract_files(files, UnreadableImages(1), captions[:5])
    assert read["features"].isnan().any(dim=1).tolist() == [False, False, True, False, False]
    kept = torch.tensor([0, 1, 3, 4])
    assert torch.allclose(read["features"][kept], torch.cat([rows["features"] for rows in seen])[kept])
    (reference,) = extractor.extract_files(files, UnreadableImages(1))
    assert set(reference) == {"features"}
