"""curves.png shows what the log holds, alarms in red, and copes with what a log may lack."""

import numpy as np
from PIL import Image

from sbrush.training.curves import PANELS, draw_curves


def drawn(tmp_path, log):
    draw_curves(log, tmp_path / "curves.png")
    assert [f.name for f in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(tmp_path / "curves.png") as image:
        return np.array(image.convert("RGB")).astype(int)


def red(pixels):
    return int(((pixels[..., 0] > 180) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)).sum())


def log(steps=range(10, 200, 10), **more):
    keys = [key for lines in PANELS.values() for key in lines]
    return [{"step": s, **{key: 0.5 + 0.001 * s for key in keys}, **more} for s in steps]


def test_every_value_of_the_log_that_a_panel_names_is_in_the_image(tmp_path):
    whole = drawn(tmp_path, log())
    for key in (key for lines in PANELS.values() for key in lines):
        without = [{k: v for k, v in entry.items() if k != key} for entry in log()]
        assert (drawn(tmp_path, without) != whole).any(), key


def test_an_alarm_is_a_red_line_and_a_name(tmp_path):
    calm, entries = drawn(tmp_path, log()), log()
    entries[5]["alarms"] = ["saturation"]
    assert red(drawn(tmp_path, entries)) > red(calm) + 500


def test_an_empty_log_and_one_without_values_are_drawn_too(tmp_path):
    assert drawn(tmp_path, []).shape == drawn(tmp_path, [{"step": 3, "gap": None}]).shape == (600, 1000, 3)
