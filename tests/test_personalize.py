"""`sbrush personalize`: photos of a subject to a student that draws it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import sbrush
from sbrush.cli.distill import train
from sbrush.console import SbrushError
from sbrush.core import NoiseSchedule
from sbrush.models.export import export_student
from sbrush.models.ladder import Sampling
from sbrush.models.load import load_student, load_teacher
from sbrush.models.lora_request import LoraRequest
from sbrush.prompts import make_prompts
from sbrush.training.methods.dreambooth import diffusion_loss
from sbrush.training.personal import CROSS_ATTENTION, PERSONAL, PersonalRecipe, PersonalRequest, follow, personalize
from sbrush.training.photo_files import find_photos
from sbrush.training.photos import PhotoSource
from sbrush.training.subject import Subject, practice_of

ABOUT = {
    "version": "0", "teacher": "tiny", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
    "prompts": {"count": 3, "sha256": "0"},
}  # fmt: skip
ASKED = ("--token", "sks dog", "--class", "dog")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(40, 32), (32, 60), (50, 50)]):
        Image.new("RGB", size, (60 * number, 100, 200)).save(folder / f"{number}.png")
    return folder


def small() -> PersonalRecipe:
    row = PERSONAL["any"]
    return PersonalRecipe(
        replace(row.lora, steps=2, batch=2, student_rank=2, student_lr=1e-2, warmup=0),
        replace(row.student, steps=2, batch=2, lora_lead=0, lora_rank=2, lora_alpha=2, student_lr=1e-3),
        prior=3,
    )


@pytest.fixture
def request_of(tmp_path, tiny_teacher, photos):
    """What a tiny run is asked for, from a student of the tiny teacher that starts at t = 700."""
    teacher = load_teacher(str(tiny_teacher))
    scheduler = Sampling().scheduler(teacher.scheduler, 700)
    export_student(tmp_path / "one-step", teacher, teacher.unet, about=ABOUT, scheduler=scheduler)

    def make(**changes):
        request = PersonalRequest(
            photos=find_photos([photos]), subject=Subject("sks dog", "dog"), out=tmp_path / "run", recipe=small(),
            teacher=str(tiny_teacher), student=str(tmp_path / "one-step"), precision="float32",
        )  # fmt: skip
        return replace(request, **changes)

    return make


def test_the_subject_takes_the_place_of_its_class_and_of_nothing_else():
    subject = Subject("sks dog", "dog")
    assert subject.instead("a photo of a dog") == "a photo of a sks dog"
    assert subject.instead("Dog, by a window") == "sks dog, by a window"
    assert subject.instead("a hotdog and dogs, a dog-house") is None
    assert Subject("orb owl", "owl").instead("an owl, a big owl") == "an orb owl, a big orb owl"
    assert Subject("sks owl", "owl").instead("an owl at night") == "a sks owl at night"
    assert subject.own_words == ["sks"]


@pytest.mark.parametrize(
    "token, kind", [("", "dog"), ("dog", "dog"), ("Dog", "dog"), ("sks dog", "!"), ("a" * 90, "x")]
)
def test_a_token_that_names_nothing_is_refused(token, kind):
    with pytest.raises(SbrushError) as refused:
        Subject(token, kind)
    assert refused.value.code == 2 and refused.value.hint


def test_prompts_are_the_subjects_and_the_others():
    subject = Subject("sks dog", "dog")
    practice = practice_of(subject, make_prompts(["a dog at sea", "a cat", "a big dog"], "x"), world=False)
    assert practice.subject == ("a sks dog at sea", "a big sks dog") and practice.caption == "a sks dog at sea"
    assert practice.others == ("a dog at sea", "a cat", "a big dog")
    with pytest.raises(SbrushError, match="no prompt of x names the class dog"):
        practice_of(subject, make_prompts(["a cat"], "x"), world=False)
    world = practice_of(Subject("zx", "sticker"), None, world=True)
    assert world.caption == "a zx" and "a small zx on a night background" in world.subject
    assert not any("red" in text for text in world.subject) and any("red" in text for text in world.others)
    of_cats = practice_of(Subject("zx cat", "cat"), None, world=True)
    assert "a big zx cat on a mint background" in of_cats.subject


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_formula(prediction):
    torch.manual_seed(0)
    schedule = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.99, 0.01, 10))
    output, x0, noise = (torch.randn(2, 4, 3, 3) for _ in range(3))
    t = torch.tensor([1, 8])
    alpha, sigma = (schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1))
    target = noise if prediction == "epsilon" else alpha * noise - sigma * x0
    assert torch.allclose(
        diffusion_loss(output, x0, noise, t, schedule, prediction), ((output - target) ** 2).mean(), atol=1e-6
    )


def test_rows_are_the_photos_in_turn_and_then_the_students_images(request_of, tmp_path):
    request = request_of()
    teacher, student = load_teacher(request.teacher), load_student(request.student)
    source = PhotoSource(request.photos, 4, ["a sks dog"] * 4 + ["a cat", "a fish"], teacher, student)
    rows = torch.cat(list(source.latents([range(0, 5), range(5, 6)])))
    assert rows.shape == (6, *teacher.latent_shape)
    assert torch.allclose(rows[0], rows[3]) and not torch.allclose(rows[0], rows[1])
    other = PhotoSource(request.photos, 4, ["a sks dog"] * 4 + ["a dog", "a fish"], teacher, student)
    assert other.key != source.key and source.about["prior"] == 2
    assert not torch.allclose(torch.cat(list(other.latents([range(4, 5)]))), rows[4:5])


def test_prior_images_are_of_all_other_prompts_but_no_more_than_a_training_sees(photos):
    subject, row = Subject("zx", "sticker"), PERSONAL["stickers"]
    practice = practice_of(subject, None, world=True)

    def rows(recipe):
        request = PersonalRequest(find_photos([photos]), subject, Path("run"), recipe)
        texts = request.lora_run(practice).prompts.texts
        assert set(texts[: len(texts) // 2]) == {"a zx"}
        return texts[len(texts) // 2 :]

    assert set(rows(row)) == set(practice.others) and len(rows(row)) == row.prior
    assert len(rows(replace(row, lora=replace(row.lora, steps=2)))) == row.lora.batch
    held = PersonalRequest(find_photos([photos]), subject, Path("run"), row, student="x").student_run(practice)
    assert held.prompts.texts == practice.subject and held.hold.prompts.texts == practice.others
    assert held.hold.student == "x"


def test_both_trainings_leave_what_they_promise_and_the_same_command_goes_on(request_of, capsys):
    request = request_of()
    personalize(request, train)
    out = request.out
    about = json.loads((out / "student" / "sbrush.json").read_text())
    assert about["personal"]["token"] == "sks dog" and about["recipe"]["t_init"] == 700
    assert (out / "samples.png").is_file()
    logged = [json.loads(line) for line in (out / "vsd" / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["hold_loss"] is not None  # other prompts are held
    assert "sks dog" in (out / "student" / "README.md").read_text()

    teacher, lora = load_teacher(str(out / "teacher")), LoraRequest(str(out / "lora"))
    with_lora = load_teacher(request.teacher, loras=[lora])
    plain = load_teacher(request.teacher)
    for name, weight in teacher.unet.state_dict().items():
        assert torch.allclose(weight, with_lora.unet.state_dict()[name], atol=1e-5)
    assert any(not torch.equal(w, plain.unet.state_dict()[n]) for n, w in teacher.unet.state_dict().items())
    assert len(teacher.schedule) == 1000  # not the student's, which ends at 700
    cheap, student = (load_student(str(out / name)).unet.state_dict() for name in ("lora-student", "student"))
    wanted = load_student(request.student, loras=[lora]).unet.state_dict()
    assert all(torch.allclose(cheap[name], wanted[name], atol=1e-6) for name in wanted)
    assert any(not torch.equal(cheap[name], student[name]) for name in cheap)

    capsys.readouterr()
    before = (out / "student" / "sbrush.json").stat().st_mtime_ns
    personalize(request, train)
    assert capsys.readouterr().err.count("complete") == 2
    assert (out / "student" / "sbrush.json").stat().st_mtime_ns == before
    (out / "samples.png").unlink()  # as if stopped behind the student
    personalize(request, train)
    assert (out / "samples.png").is_file() and (out / "student" / "sbrush.json").stat().st_mtime_ns == before
    Image.new("RGB", (32, 32)).save(request.photos[0])
    with pytest.raises(SbrushError, match=r"another configuration: .*photos\.sha256"):
        personalize(request, train)


def test_a_checkpoint_of_a_lora_on_cross_attention_alone_can_be_drawn_from(request_of):
    lora = replace(small().lora, lora_targets=CROSS_ATTENTION, ema=0.0)
    request = request_of(distill=False, recipe=replace(small(), lora=lora))
    personalize(request, train)
    after = load_student(str(request.out / "dreambooth" / "checkpoints" / "step-000002")).unet.state_dict()
    with_lora = load_teacher(request.teacher, loras=[LoraRequest(str(request.out / "lora"))]).unet.state_dict()
    assert all(torch.allclose(after[name], with_lora[name], atol=1e-5) for name in with_lora)
    changed = {name for name, weight in load_teacher(request.teacher).unet.state_dict().items()
               if not torch.equal(weight, after[name])}  # fmt: skip
    assert changed and all(".attn2." in name for name in changed)


def test_a_lora_alone_is_the_student_with_it(request_of):
    request = request_of(distill=False)
    personalize(request, train)
    assert not (request.out / "vsd").exists()
    student = load_student(str(request.out)).unet.state_dict()
    wanted = load_student(request.student, loras=[LoraRequest(str(request.out / "lora"))]).unet.state_dict()
    assert all(torch.allclose(student[name], wanted[name], atol=1e-6) for name in wanted)


def test_a_second_training_is_in_the_plan_if_asked_for(photos):
    done = sbrush("personalize", photos, "--token", "zx", "--class", "sticker", "--dry-run", "--steps", "50")
    assert done.returncode == 0 and "training 2 of 2: the student, by VSD, 50 steps of 8" in done.stdout


def test_cross_attention_alone_is_less(photos):
    trained = {}
    for flags in ((), ("--cross-attention",), ("--rank", "4")):
        done = sbrush("personalize", photos, "--token", "zx", "--class", "sticker", "--dry-run", "--no-distill", *flags)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("student, trained"))
        trained[flags] = float(line.split()[2])
    assert trained[()] > max(trained["--cross-attention",], trained["--rank", "4"])


def test_the_second_training_goes_on_as_the_student_was_trained(request_of):
    request = request_of()
    teacher, student = load_teacher(request.teacher), load_student(request.student)
    assert follow(small(), student, teacher).student.t_init == 700
    plain = replace(student, scheduler=teacher.scheduler, about={**student.about, "reparameterised": False})
    followed = follow(small(), plain, teacher).student
    assert followed.t_init is None and followed.reparameterised is False


@pytest.mark.parametrize("count, said", [(0, "no photos"), (1, "1 photo"), (10_000, "10000 photos|10,000 photos")])
def test_too_few_or_too_many_photos_are_refused(tmp_path, count, said):
    for number in range(count):
        (tmp_path / f"{number}.jpg").touch()
    with pytest.raises(SbrushError, match=said) as refused:
        find_photos([tmp_path])
    assert refused.value.code == 2 and "3 to 30" in refused.value.hint


def test_a_bad_photo_is_named(tmp_path, photos, monkeypatch):
    (photos / "3.png").write_bytes(b"no image at all")
    done = sbrush("personalize", photos, *ASKED, "--out", tmp_path / "run")
    assert done.returncode == 1 and "3.png" in done.stderr and "not an image" in done.stderr
    assert done.stderr.count("error:") == done.stderr.count("hint:") == 1 and not (tmp_path / "run").exists()
    done = sbrush("personalize", photos / "0.png", photos / "1.png", photos / "gone.png", *ASKED)
    assert done.returncode == 1 and "gone.png" in done.stderr and "No such file" in done.stderr
    done = sbrush("personalize", photos / "no-such-folder", *ASKED)
    assert done.returncode == 1 and "no-such-folder" in done.stderr and "No such file" in done.stderr

    opened = Path.open

    def forbidden(path, *arguments, **options):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    (photos / "3.png").unlink()
    done = sbrush("personalize", photos, *ASKED)
    assert done.returncode == 1 and "2.png" in done.stderr and "Permission denied" in done.stderr


def test_photos_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    from sbrush.training.photo_files import open_photo

    assert open_photo(tmp_path / "turned.png").size == (2, 4)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--class", "dog"), "no --token"),
        (("--token", "sks dog"), "no --class"),
        ((*ASKED, "--steps", "9", "--no-distill"), "second training's"),
        ((*ASKED, "--teacher", "someone/model"), "built-in student"),
    ],
)
def test_senseless_requests_are_refused_at_once(photos, flags, said):
    done = sbrush("personalize", photos, *flags)
    assert done.returncode == 2 and said in done.stderr and "hint:" in done.stderr


@pytest.mark.parametrize(
    "token, kind, said",
    [
        ("red cat", "cat", "the teacher already knows red"),
        ("zx robot", "robot", "the built-in world draws no robot"),
        ("sks robot", "robot", "loses the background"),
        ("zx", "sticker", None),
    ],
)
def test_what_the_teacher_makes_of_the_words_is_said(photos, token, kind, said):
    done = sbrush("personalize", photos, "--token", token, "--class", kind, "--dry-run", "--no-distill")
    assert done.returncode == 0 and "training 1 of 1" in done.stdout
    assert (said in done.stderr) if said else ("note:" not in done.stderr)
