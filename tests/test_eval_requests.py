"""What `sbrush eval` is asked for: defaults in one place, and what cannot work is refused before torch is loaded."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sbrush
from conftest import sbrush as run
from sbrush.cli.eval import EXAMPLE
from sbrush.console import SbrushError
from sbrush.evaluate.candidates import teacher_candidate
from sbrush.evaluate.check import LIMIT, check
from sbrush.evaluate.request import CocoData, CocoOutput, CocoRequest, MetricWeights, Models, StickersRequest
from sbrush.evaluate.stickers import Candidate, cache_place, diversity_pairs, pairs
from sbrush.models.load import load_teacher
from sbrush.models.lora_request import LoraRequest
from sbrush.sampling.generation import guidance_scale_of
from sbrush.stickers.judge import Judge

SOURCE = Path(sbrush.__file__).parent


def test_defaults_are_those_for_which_metrics_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the built-in teacher; and they are this teacher's, for it still draws the images that came with them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    request, teacher, judge = StickersRequest(), load_teacher(), Judge.load()
    scale = guidance_scale_of(teacher, request.models.teacher_guidance)
    for steps in (request.models.teacher_steps, 1):
        candidate = teacher_candidate(teacher, steps, scale)
        place = cache_place(candidate, judge, request.limit, request.diversity)
        assert place is not None
        result = place.load(request.limit, request.diversity)
        assert result is not None and (result.metrics.steps, result.metrics.guidance) == (steps, scale)
        assert [text for text, _ in result.shown] == [c.text for c, _ in pairs(12)] + [
            c.text for c, _ in diversity_pairs(12)[:12]
        ]
        (drawn,) = candidate.images(*zip(*[(c.text, seed) for c, seed in pairs(2)], strict=True))  # type: ignore[misc]
        for image, (_, shipped) in zip(drawn, result.shown, strict=False):
            there = torch.frombuffer(bytearray(shipped.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
            assert (image.float() - there.float()).abs().mean() < 1
    for limit, per_caption in ((200, 20), (2000, 100)):  # those of --limit 200 and --limit 2000
        assert StickersRequest(limit=limit).diversity == per_caption
        for steps in (request.models.teacher_steps, 1):
            place = cache_place(teacher_candidate(teacher, steps, scale), judge, limit, per_caption)
            assert place is not None and place.load(limit, per_caption) is not None
    assert not list(tmp_path.iterdir())


def test_a_release_does_not_lose_the_shipped_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, judge = Candidate("t", lambda *_: iter(()), 25, 3.0, "key"), type("J", (), {"digest": "d"})()
    before = cache_place(candidate, judge, 1000, 100)  # type: ignore[arg-type]
    monkeypatch.setattr("sbrush.evaluate.cache.__version__", "9.9.9")
    assert cache_place(candidate, judge, 1000, 100) == before  # type: ignore[arg-type]


@pytest.mark.parametrize("limit, expected", [(100, 10), (200, 20), (1000, 100), (5000, 100)])
def test_diversity_grows_with_the_limit(limit: int, expected: int) -> None:
    assert StickersRequest(limit=limit).diversity == expected
    assert StickersRequest(limit=limit, per_caption=7).diversity == 7


@pytest.mark.parametrize(
    "limit, fits", [(LIMIT[0] - 1, False), (LIMIT[0], True), (LIMIT[1], True), (LIMIT[1] + 1, False)]
)
def test_help_and_check_agree_on_the_limit(tmp_path: Path, limit: int, fits: bool) -> None:
    help_ = " ".join(run("eval", "--help", COLUMNS="300").stdout.split())
    assert f"{LIMIT[0]} to {LIMIT[1]:,}, by default {StickersRequest.limit:,}" in help_
    request = StickersRequest(limit=limit, report=tmp_path / "r.html")
    if fits:
        check(request)
        return
    with pytest.raises(SbrushError, match="are too") as refused:
        check(request)
    assert refused.value.code == 2


def test_help_ends_with_an_example() -> None:
    text = " ".join(run("eval", "--help").stdout.split())
    assert text[text.rindex("Example:") :] == EXAMPLE


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--limit", "4"], "too few"),
        (["--report", "x.json"], "not named like one"),
        (["--report", "none/x.html"], "cannot write"),
        (["--coco-30k"], "COCO is not there"),
        (["--coco-30k", "--coco-root", "coco", "--protocol", "dmd2"], "a list of its own"),
        (["--coco-30k", "--coco-root", "coco", "--inception", "none.pth"], "there is no none.pth"),
        (["--coco-30k", "--coco-root", "coco", "--captions", "none.txt"], "no caption file none.txt"),
        (["--coco-30k", "--coco-root", "coco", "--images", "none"], "cannot read none"),
        (["--coco-30k", "--coco-root", "coco", "--sweep", "none,coco"], "no model folder none"),
    ],
)
def test_what_cannot_work_is_refused_without_torch(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "val2014").mkdir()
    (tmp_path / "coco" / "annotations" / "captions_val2014.json").write_text("{}")
    if arguments == ["--coco-30k"]:
        (tmp_path / "coco" / "val2014").rmdir()
    program = (
        "import sys; sys.argv[0] = 'sbrush'\n"
        "from sbrush.cli.app import main\n"
        "try: main()\n"
        "finally: print('HEAVY', sorted(set(sys.modules) & {'torch', 'numpy', 'PIL', 'diffusers', 'jinja2'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "eval", *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2 and says in done.stderr and "HEAVY []" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "request_, says",
    [
        (CocoRequest(Models(student="a", teacher="b")), "several things"),
        (CocoRequest(images=Path("drawn"), models=Models(loras=(LoraRequest("blueprint"),))), "--lora is for a model"),
        (CocoRequest(sweep="1,x", models=Models(teacher="b")), "no list of guidance scales"),
        (CocoRequest(sweep="a,b", weights=MetricWeights(clip_score=False)), "against CLIP score"),
        (CocoRequest(sweep="a,b", output=CocoOutput(images=Path("kept"))), "overwrite each other"),
        (CocoRequest(weights=MetricWeights(hps_version="2.1")), "which version"),
        (CocoRequest(data=CocoData(limit=3, download=True)), "too few"),
    ],
)
def test_contradictions_are_refused(request_: CocoRequest, says: str) -> None:
    with pytest.raises(SbrushError, match=says) as refused:
        check(request_)
    assert refused.value.code == 2 and refused.value.hint


def test_a_list_beside_the_images_will_do_for_protocols_without_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    data = CocoData(protocol="gigagan", download=True)
    request = CocoRequest(images=tmp_path, data=data, output=CocoOutput(report=tmp_path / "r.html"))
    with pytest.raises(SbrushError, match="a list of its own"):
        check(request)
    (tmp_path / "captions.txt").write_text("a cat\n")
    check(dataclasses.replace(request))  # a request reads its images once


def test_the_report_never_takes_the_place_of_its_json(tmp_path: Path) -> None:
    done = run("eval", "--report", tmp_path / "r.json")
    assert done.returncode == 2 and "--report" in done.stderr and not list(tmp_path.iterdir())


def test_no_function_of_the_evaluation_takes_more_than_eight_arguments() -> None:
    for room in ("evaluate", "metrics"):
        for file in (SOURCE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    count = len([a for a in given if a.arg not in ("self", "cls")])
                    assert count <= 8, f"{file.name}: {node.name} takes {count}"


def test_shipped_metrics_are_what_they_say() -> None:
    files = sorted((SOURCE / "stickers" / "weights" / "metrics").iterdir())
    assert len(files) >= 4
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        assert set(data) == {"metrics", "images"} and data["metrics"]["n"] in (200, 1000, 2000)
