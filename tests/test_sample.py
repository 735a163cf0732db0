"""Images: one step, the teacher's many steps against plain diffusers, files and their metadata."""

import json

import pytest
import torch
from PIL import Image

from sbrush.console import SbrushError
from sbrush.models.load import load_student, load_teacher
from sbrush.sampling.files import SampleRequest, sample_to_files
from sbrush.sampling.generation import student_images, teacher_images
from sbrush.sampling.images import image_grid, parameters, save_png
from sbrush.sampling.targets import Images, Target


def draw(prompts, seeds, out, **options):
    """The paths that sample_to_files writes."""
    request = SampleRequest(Images(prompts, seeds), Target.parse(str(out)), **options)
    return list(dict.fromkeys(saved.path for saved in sample_to_files(request)))


def size(path):
    with Image.open(path) as image:
        return image.size


def test_a_seeds_image_does_not_depend_on_its_batch(tiny_teacher):
    model = load_student(str(tiny_teacher))
    prompts, seeds = ["a cat", "a dog", "a big red fish on a mint background", "a cat", "a star"], [1, 2, 3, 4, 1]
    together = torch.cat(list(student_images(model, prompts, seeds, batch=5)))
    for batch in (1, 2):
        apart = torch.cat(list(student_images(model, prompts, seeds, batch=batch)))
        assert (together.int() - apart.int()).abs().max() <= 1
    assert not torch.equal(together[0], together[3]) and not torch.equal(together[0], together[4])


def test_the_teachers_steps_are_plain_diffusers_ddim(tiny_teacher):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_teacher)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    theirs = pipe(
        "a cat", num_inference_steps=6, guidance_scale=3, generator=torch.Generator().manual_seed(9), output_type="np"
    ).images[0]
    (ours,) = teacher_images(load_teacher(str(tiny_teacher)), ["a cat"], [9], steps=6, guidance=3)
    difference = (torch.from_numpy(theirs * 255).round().permute(2, 0, 1) - ours[0].float()).abs()
    assert difference.max() <= 1 and ours.float().std() > 5


def test_one_image_is_one_png_with_its_seed_in_it(tmp_path, tiny_teacher):
    out = tmp_path / "deep" / "cat.png"
    assert draw(["a cat, sitting"], [7], out, student=str(tiny_teacher)) == [out]
    assert size(out) == (32, 32)
    with Image.open(out) as image:
        text = dict(image.text)
    about = json.loads(text["sbrush"])
    assert (about["prompt"], about["seed"], about["steps"]) == ("a cat, sitting", 7, 1)
    prompt, pairs = text["parameters"].split("\n")
    assert prompt == "a cat, sitting" and "Steps: 1" in pairs and "Seed: 7" in pairs and "Size: 32x32" in pairs


def test_no_metadata_means_none(tmp_path, tiny_teacher):
    out = tmp_path / "cat.png"
    draw(["a cat"], [7], out, student=str(tiny_teacher), metadata=False)
    with Image.open(out) as image:
        assert image.text == {}


def test_several_images_are_a_grid_or_a_folder(tmp_path, tiny_teacher):
    options = {"student": str(tiny_teacher), "teacher_steps": 3, "teacher_guidance": 2.0}
    (grid,) = draw(["a cat", "a dog"], [1, 2, 3], tmp_path / "grid.png", **options)
    wide, high = size(grid)
    assert wide > 3 * 128 and high > 2 * 128
    files = draw(["a cat", "a dog", "a cat!"], [1, 2], tmp_path / "many", **options)
    assert len(set(files)) == 6 and all(size(f) == (32, 32) for f in files)
    (both,) = draw(["a cat"], [1], tmp_path / "both.png", **options, teacher=str(tiny_teacher), compare=True)
    assert size(both)[0] > 2 * 128


@pytest.mark.parametrize("name", ["x.jpg", "folder.png", "file"])
def test_an_impossible_target_is_refused_before_any_work(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SbrushError):
        draw(["a cat"], [1], tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_words_that_the_world_has_never_seen():
    from sbrush.stickers.world import unknown_words

    assert unknown_words("A small RED cat, on a mint background!") == []
    assert unknown_words("an astronaut riding a red horse") == ["astronaut", "riding", "horse"]


def test_a_png_is_written_whole_or_not_at_all(tmp_path):
    class Broken:
        def save(self, file, **_):
            file.write_bytes(b"half")
            raise OSError("disk full")

    (tmp_path / "x.png").write_bytes(b"before")
    with pytest.raises(OSError):
        save_png(tmp_path / "x.png", Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"] and (tmp_path / "x.png").read_bytes() == b"before"


def test_a_sheet_has_a_cell_for_every_image():
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 255
    image = image_grid([[red, red], [red]], row_labels=["a", "b"], column_labels=["first", "second"])
    assert sum(count for count, colour in image.getcolors(1 << 20) if colour == (255, 0, 0)) == 3 * 128 * 128


def test_a_prompt_cannot_forge_the_parameters_chunk():
    about = {
        "prompt": "a cat\nSteps: 50", "steps": 1, "sampler": "x", "guidance": 1, "seed": 3, "size": "8x8",
        "model": "a, Seed: 9", "version": "0",
    }  # fmt: skip
    assert parameters(about).count("\n") == 1 and parameters(about).split("\n")[1].count("Seed: ") == 2
    assert ", Seed: 9" not in parameters(about)
