"""The sample grid of `sbrush personalize`: the photos, and what teacher and students draw of the subject."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from sbrush.models.load import load_student, load_teacher
from sbrush.sampling.generation import guidance_scale_of, student_images, teacher_images
from sbrush.sampling.images import image_grid, save_png
from sbrush.training.photo_files import open_photo
from sbrush.training.subject import Practice

if TYPE_CHECKING:
    from sbrush.training.personal import PersonalRequest

COLUMNS = 6
TEACHER_STEPS = 25


def draw_grid(request: PersonalRequest, practice: Practice) -> Path:
    """Writes OUT/samples.png: a column a prompt, a row a model, the same seeds in each row."""
    out = request.out
    texts = [practice.subject[i * len(practice.subject) // COLUMNS] for i in range(COLUMNS)]
    seeds, dtype = list(range(1, COLUMNS + 1)), torch.float32
    teacher = load_teacher(str(out / "teacher"), device=request.device, dtype=dtype)
    height, width = teacher.image_size
    photos = [open_photo(request.photos[i % len(request.photos)]) for i in range(COLUMNS)]
    rows = {
        "photos": [pil_to_tensor(ImageOps.fit(photo, (width, height), Image.Resampling.LANCZOS)) for photo in photos],
        f"teacher, {TEACHER_STEPS} steps": [
            image
            for part in teacher_images(
                teacher, texts, seeds, steps=TEACHER_STEPS, guidance=guidance_scale_of(teacher, None), batch=COLUMNS
            )
            for image in part
        ],
    }
    del teacher
    models = {"student with the LoRA": "lora-student"} | ({"student": "student"} if request.distill else {})
    for label, folder in models.items():
        student = load_student(str(out / folder), device=request.device, dtype=dtype)
        rows[label] = [image for part in student_images(student, texts, seeds, batch=COLUMNS) for image in part]
    save_png(out / "samples.png", image_grid(list(rows.values()), row_labels=list(rows), column_labels=texts))
    return out / "samples.png"
