"""`make results`: what a budget buys, what is made once and not again, and what the table says of it."""

import dataclasses
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from PIL import Image

from conftest import sbrush
from sbrush.benchmarks.results import __main__ as results
from sbrush.benchmarks.results import making, runs
from sbrush.benchmarks.results.making import Making, Request
from sbrush.benchmarks.results.plots import _series
from sbrush.benchmarks.results.rates import Rates
from sbrush.benchmarks.results.rows import BASE, ROWS, SWIFTBRUSH, TEACHER, Row
from sbrush.benchmarks.results.summary import COLUMNS, END, START, Result, cell, put_into, table
from sbrush.console import SbrushError

TINY = ("batch=2", "lora_rank=2")
FEW = [
    Row("teacher", TEACHER, draws=(1,)),
    Row(BASE, "stickers", (*SWIFTBRUSH, *TINY)),
    Row("few-step", "stickers", (*SWIFTBRUSH, *TINY, "student_steps=2"), draws=(1, 2)),
]


class AtOnce:
    """An executor of no threads: signal handlers, which a training sets, belong to the main one."""

    def __init__(self, workers):
        pass

    def submit(self, work):
        future = Future()
        try:
            future.set_result(work())
        except SbrushError as problem:
            future.set_exception(problem)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def make(tmp_path, monkeypatch, prompt_file):
    """`python -m sbrush.benchmarks.results` with three tiny rows, in process; `make.trained` lists what it trained."""
    trained = []

    def distil(arguments, log, *, threads=1):
        trained.append(arguments[arguments.index("--out") + 1])
        done = sbrush("distill", *arguments)
        if done.returncode:
            raise SbrushError(done.stderr, "")

    def run(**options):
        given = {"prompts": prompt_file, "work": tmp_path / "work", "to": tmp_path / "to", "pairs": 20, "seeds": 2}
        # Steps of 9/16 and 9.5/16 forwards of a batch of 32.
        results.main(**given | {"budget": 1.2, "minutes": 0, "jobs": 1, "device": "cpu", "only": None} | options)

    monkeypatch.setattr(results, "ROWS", FEW)
    monkeypatch.setattr(results.os, "cpu_count", lambda: 1)  # or torch would keep that many threads for other tests
    monkeypatch.setattr(runs, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(runs, "distil", distil)
    monkeypatch.setattr(Rates, "measure", classmethod(lambda cls, **_: Rates(0.1, 0.01, 0.01)))
    run.trained, run.to = trained, tmp_path / "to"
    return run


def test_the_table_is_made_of_nothing_and_not_made_again(make, monkeypatch):
    make.to.mkdir()
    page = make.to / "results.md"
    page.write_text(f"# Results\n\nbefore\n\n{START}\nold\n{END}\n\nafter\n")
    only = ["teacher", "few-step"]
    with monkeypatch.context() as patch:  # killed while the second of two students is trained
        real = runs.distil
        calls = []

        def dying(*args, **kwargs):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(*args, **kwargs)

        patch.setattr(runs, "distil", dying)
        with pytest.raises(KeyboardInterrupt):
            make(only=only)
    assert len(make.trained) == 1 and "old" in page.read_text()
    make(only=only)
    assert len(make.trained) == len(set(make.trained)) == 2
    said = page.read_text()
    assert said.startswith("# Results\n\nbefore\n") and said.endswith("\nafter\n") and "old" not in said
    lines = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    drawn = [(line[0][2:], line[1]) for line in lines[2:]]
    assert drawn == [
        ("teacher", "1"), ("real images", "-"), ("few-step", "1"), ("few-step", "2"),
    ]  # fmt: skip
    assert [line[2] for line in lines[2:]] == ["-", "-", "2", "2"]
    assert all("-" not in line[3:14] for line in lines[2:]) and "±" in lines[-1][3] and "±" not in lines[2][3]
    data = json.loads((make.to / "results.json").read_text())
    few = data["equal_forwards"][-1]
    assert [run["seed"] for run in few["runs"]] == [0, 1] and set(few["runs"][0]["draws"]) == {"1", "2"}
    figures = few["runs"][0]["draws"]["2"]
    assert figures["n"] == 20 and figures["steps"] == 2 and figures["fid"] != few["runs"][1]["draws"]["2"]["fid"]
    assert 0 <= figures["by_pixels"]["colour"] <= 1 and figures["seconds_an_image"] > 0 < figures["fid_interval"]
    assert all(run["seconds"] > 0 for run in few["runs"]) and data["about"]["machine"] and data["about"]["command"]
    with Image.open(make.to / "results-images.png") as grid, Image.open(make.to / "results-steps.png") as plot:
        assert 3 * 134 < grid.width < 4 * 134 + 300 and plot.format == "PNG"

    for run in few["runs"]:  # made before there were such settings
        file = Path(run["run"]) / "student" / "sbrush.json"
        about = json.loads(file.read_text())
        del about["recipe"]["anchor_weight"], about["recipe"]["lora_lead"]
        file.write_text(json.dumps(about))
    monkeypatch.setattr(runs, "distil", None)  # nothing is left to be trained, or measured
    monkeypatch.setattr(making.Bench, "_measure", None)
    make(only=only)
    assert page.read_text().count(START) == 1
    wanted = "without few-step, forwards-1.3, seed 0, few-step, forwards-1.3, seed 1$"
    with pytest.raises(SbrushError, match=wanted):  # another budget, another run
        monkeypatch.setattr(runs, "distil", lambda arguments, *_, **__: (_ for _ in ()).throw(SbrushError("no", "why")))
        make(only=only, budget=1.3)


def test_a_row_that_fails_leaves_the_others(make, monkeypatch):
    real = runs.distil

    def failing(arguments, log, *, threads=1):
        if "few-step" in str(log):
            raise SbrushError("training failed", f"see {log}")
        real(arguments, log, threads=threads)

    monkeypatch.setattr(runs, "distil", failing)
    with pytest.raises(SbrushError, match="without few-step") as refused:
        make(seeds=1, only=[BASE, "few-step"])
    assert "again" in refused.value.hint
    said = (make.to / "results.md").read_text()
    assert f"| {BASE} | 1 |" in said and "| few-step" not in said and "## Methods side by side" in said


def test_what_a_budget_buys(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "forwards", lambda recipe: 10.0 if recipe.student_rank else 9.0)
    v2 = next(row for row in ROWS if row.recipe == "stickers-v2")
    paper = next(row for row in ROWS if row.label == BASE)
    assert runs.forwards_a_step(paper) == 9 and runs.forwards_a_step(v2) == 19
    half = dataclasses.replace(paper, settings=(*paper.settings, "batch=16"))
    assert runs.forwards_a_step(half) == 4.5
    work = Making(Request([paper, v2, half], seeds=2, budget=1800, work=tmp_path), Rates(1, 1, 1))
    steps = {job.row: job.steps for job in work.by_forwards()}
    assert steps == {paper: 200, v2: 95, half: 400}


def test_the_images_that_a_method_learns_from_are_part_of_its_budget():
    lcm = next(row for row in ROWS if row.label == "LCM")
    before = runs.forwards_before(lcm)
    assert before == 500 * 12 * 2 / 32 and runs.forwards_before(ROWS[1]) == 0
    assert runs.steps_within(lcm, before + 100 * runs.forwards_a_step(lcm)) == 100


def test_the_same_minutes_are_had_from_the_rates_of_the_fastest_seed(monkeypatch, tmp_path):
    rows = [Row(BASE, "stickers"), Row("twice as slow", "stickers"), Row("as fast", "stickers")]
    monkeypatch.setattr(runs, "forwards", lambda recipe: 9.0)
    monkeypatch.setattr(runs.Job, "trained", property(lambda job: True))
    for row, seconds in zip(rows, (100.0, 200.0, 103.0), strict=True):
        for seed in range(2):
            run = tmp_path / "forwards-1800" / row.name / f"seed-{seed}"
            run.mkdir(parents=True)
            rate = 32 * 200 / seconds / (2 - seed)  # the first seed's, which something has disturbed, does not count
            entries = [{"step": step, "images_per_second": rate} for step in (10, 100, 200)]
            (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def by_minutes(minutes):
        work = Making(Request(rows, seeds=2, minutes=minutes, work=tmp_path), Rates(1, 1, 1))
        first = work.by_forwards()
        return first, work.by_minutes(first)

    first, second = by_minutes(None)
    assert [first[i].seconds for i in (0, 1, 3)] == pytest.approx([200, 100, 200])
    assert {job.row.label: job.steps for job in second} == {BASE: 200, "twice as slow": 100, "as fast": 200}
    assert [job for job in second if job.row != rows[1]] == [*first[:2], *first[4:]]  # near enough: not made again
    assert len({job.run for job in (*first, *second)}) == 8
    _, second = by_minutes(5)
    assert {job.row.label: job.steps for job in second} == {BASE: 600, "twice as slow": 300, "as fast": 583}
    assert by_minutes(0)[1] == []


def test_a_lora_teacher_takes_longer():
    rates, with_it = Rates(1.0, 0.1, 0.1), {row.label: runs.trains_lora_teacher(row) for row in ROWS if row.recipe}
    assert {label for label, has in with_it.items() if not has} == {
        "no LoRA teacher", "LCM", *(f"guided, halved to {n}" for n in (1, 2, 4))
    }  # fmt: skip
    lcm, base = (next(row for row in ROWS if row.label == label) for label in ("LCM", BASE))
    assert rates.training(base, 100) > 1.2 * rates.training(lcm, 100) > 100


def test_rows_are_what_they_are_called():
    parts = {row.label: row.parts() for row in ROWS if row.recipe != TEACHER}
    assert len(parts) == len({row.name for row in ROWS}) - 1 and all(len(row.label) <= 20 for row in ROWS)

    def changed(label):
        base = dataclasses.asdict(parts[BASE][""])
        return {k for k, v in dataclasses.asdict(next(iter(parts[label].values()))).items() if v != base[k]}

    assert parts[BASE][""].gap == "vsd" and parts[BASE][""].guide_lora
    assert changed("not reparameterised") == {"reparameterised"}
    assert changed("random guidance") == {"guidance", "guidance_to"}
    assert changed("clamped CLIP loss") == changed("v2: CLIP, merged") == {"clip_weight", "clip_tau"}
    assert changed("few-step") == {"student_steps"}
    assert parts["no LoRA teacher"][""].gap == "sds" and parts["DMD gap"][""].gap == "dmd"
    assert [part.student_rank for part in parts["v2: CLIP, merged"].values()] == [0, 64]
    for row in ROWS:
        if row.label == "few-step":
            assert max(row.draws) == parts[row.label][""].student_steps


def test_cells_are_means_and_spreads():
    assert cell([0.5], 2) == ".50" and cell([1.0, 1.0], 2) == "1.00 ± .00" and cell([-0.1], 1) == "-.1"
    assert cell([100.0, 110.0, 120.0], 0) == "110 ± 10" and cell([1.0, None], 0) == cell([], 0) == "-"
    figures = {
        "fid": 90.0, "fid_interval": 4.0, "precision": 0.9, "recall": 0.8, "clip_score": 0.25, "seconds_an_image": 0.03,
        "accuracy": dict.fromkeys(("kind", "colour", "background", "size"), 0.5), "diversity": {"mean": None},
    }  # fmt: skip
    other = figures | {"fid": 110.0, "fid_interval": 6.0, "seconds_an_image": 0.02}
    made = [{"seed": s, "seconds": 60.0 + s, "draws": {1: f}} for s, f in enumerate((figures, other))]
    line = table([Result("x", "stickers", (), 1200, 9.0, made)]).splitlines()[2]
    heads = ["", "steps", "seeds", *COLUMNS, "ms", "trained", "its steps"]
    cells = dict(zip(heads, line[2:-2].split(" | "), strict=True))
    assert cells["FID"] == "100 ± 14" and cells["interval"] == "± 5" and cells["diversity"] == "-"
    assert cells["seeds"] == "2" and cells["its steps"] == "1,200"
    assert cells["ms"] == "20" and cells["trained"] == "60"  # of the fastest


def test_rows_of_one_series_are_one_line_of_the_plot():
    made = {n: [{"seed": 0, "seconds": 1.0, "draws": {n: {"fid": 100.0 / n}}}] for n in (4, 1)}
    results = [Result(f"halved to {n}", "stickers-guided", (), 9, 9.0, runs, "guided") for n, runs in made.items()]
    results.append(Result("other", "stickers", (), 9, 9.0, [{"seed": 0, "draws": {1: {"fid": None}}}]))
    assert _series(results) == {"guided": [(1, [100.0]), (4, [25.0])], "other": []}
    assert [row.draws for row in ROWS if row.series == "guided"] == [(1,), (2,), (4,)]


def test_a_page_without_markers_gets_them_once(tmp_path):
    page = tmp_path / "results.md"
    for text in ("one", "two"):
        put_into(page, text)
    assert page.read_text() == f"# Results\n\n## Methods side by side\n\n{START}\n\ntwo\n{END}\n"


def test_the_list_tells_steps_and_hours_and_makes_nothing(make, capsys, tmp_path):
    make(list_=True, budget=9.0)
    said = capsys.readouterr().out
    assert f"{BASE:22}" in said and "student_steps=2" in said and "about" in said and "hours" in said
    steps = {line[:22].strip(): line[55:63].strip() for line in said.splitlines() if "stickers" in line}
    assert steps == {BASE: "16", "few-step": "15"} and not make.trained
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SbrushError, match="no row nonsense"):
        make(only=["nonsense"])
