"""The page of `sbrush serve` in a true browser: type, see, change the seed, download."""

import io
import json
import os
import shutil

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from sbrush.sampling.generation import student_images
from sbrush.sampling.images import to_image
from serving import listening, load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = os.environ.get("SBRUSH_SCREENSHOTS")  # a folder for those who want to look


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: the page is not tested (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture(scope="module")
def server(browser, tiny_teacher):
    with listening(load(None if SHOTS else tiny_teacher)) as (address, service):
        yield address, service


@pytest.fixture
def page(browser, server):
    """The page, opened; what it asks of other machines, or complains of, fails the test."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1100, "height": 900})
    one = context.new_page()
    wrong = []
    one.on(
        "request", lambda request: request.url.startswith((server[0], "blob:", "data:")) or wrong.append(request.url)
    )
    one.on("console", lambda line: line.type in ("error", "warning") and wrong.append(line.text))
    one.on("pageerror", lambda problem: wrong.append(str(problem)))
    one.goto(server[0])
    yield one
    context.close()
    assert not wrong


def shown(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def stage(page, text):
    """An image on the page, but not in its history."""
    return page.locator("#stage").get_by_alt_text(text, exact=True)


def drawn(service, prompt, seed):
    return to_image(next(student_images(service.student, [prompt], [seed]))[0])


def downloaded(page):
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    return download.value.suggested_filename, Image.open(io.BytesIO(download.value.path().read_bytes()))


def close(one, other):
    """Whether two images are the same but for what another batch's rounding changes."""
    pairs = zip(one.convert("RGB").tobytes(), other.convert("RGB").tobytes(), strict=True)
    return max(abs(a - b) for a, b in pairs) <= 2


def test_type_see_change_the_seed_download(page, server):
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.type("a small red cat", delay=20)
    expect(stage(page, "a small red cat, seed 0")).to_be_visible()
    shown(page, "light")
    name, image = downloaded(page)
    assert name == "a-small-red-cat-seed0.png"
    assert json.loads(image.text["sbrush"])["prompt"] == "a small red cat"
    assert close(image, drawn(server[1], "a small red cat", 0))

    page.get_by_label("Seed", exact=True).fill("7")
    expect(stage(page, "a small red cat, seed 7")).to_be_visible()
    name, image = downloaded(page)
    assert name == "a-small-red-cat-seed7.png" and json.loads(image.text["sbrush"])["seed"] == 7
    assert close(image, drawn(server[1], "a small red cat", 7))


def test_a_grid_of_variations_of_which_one_is_chosen(page):
    page.get_by_label("Prompt").fill("a big purple fish")
    page.get_by_label("9").check(force=True)
    for seed in range(9):
        expect(stage(page, f"a big purple fish, seed {seed}")).to_be_visible()
    shown(page, "grid")
    stage(page, "a big purple fish, seed 4").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("4")
    expect(page.locator(".cell")).to_have_count(1)


def test_by_keys_alone(page):
    page.keyboard.type("a cat")
    expect(stage(page, "a cat, seed 0")).to_be_visible()
    page.keyboard.press("Enter")
    seed = page.get_by_label("Seed", exact=True)
    expect(seed).not_to_have_value("0")
    lock = page.get_by_role("button", name="Keep the seed")
    page.keyboard.press("Escape")
    for key, pressed in (("l", "false"), ("l", "true")):
        page.keyboard.press(key)
        expect(lock).to_have_attribute("aria-pressed", pressed)
    page.keyboard.press("v")
    expect(page.locator(".cell img[src]")).to_have_count(4)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(page.get_by_label("Prompt")).to_be_focused()


def test_the_history_brings_an_image_back(page):
    for text in ("a red dog", "a blue car"):
        page.get_by_label("Prompt").fill(text)
        expect(page.get_by_role("list").get_by_role("button", name=f"{text}, seed 0")).to_be_visible()
    expect(page.get_by_role("heading", name="History")).to_be_visible()
    page.get_by_role("list").get_by_role("button", name="a red dog, seed 0").click()
    expect(page.get_by_label("Prompt")).to_have_value("a red dog")
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("heading", name="History")).to_be_hidden()


def test_a_negative_prompt_where_the_student_takes_one(page, server):
    assert server[1].takes_negative == page.get_by_label("Without").is_visible()
    if server[1].takes_negative:
        page.get_by_label("Prompt").fill("a cat")
        page.get_by_label("Without").fill("a dog")
        expect(stage(page, "a cat, without a dog, seed 0")).to_be_visible()
        assert json.loads(downloaded(page)[1].text["sbrush"])["negative"] == "a dog"


def test_an_open_seed_changes_as_one_types(page):
    page.get_by_role("button", name="Keep the seed").click()
    page.get_by_label("Prompt").fill("a cat")
    expect(page.get_by_label("Seed", exact=True)).not_to_have_value("0")


def test_what_the_reader_should_know_is_shown(page, server):
    page.get_by_label("Prompt").fill(" " + "word " * 2000)
    expect(page.locator("#status")).to_contain_text("its end is cut off")


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("dark", 1100, "dark"), ("phone", 390, "light"), ("phone-dark", 390, "dark")]
)
def test_in_the_dark_and_on_a_phone(browser, server, name, width, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844}, device_scale_factor=2)
    page = context.new_page()
    page.goto(server[0])
    page.get_by_label("Prompt").fill("a teal bird on a mint background")
    expect(stage(page, "a teal bird on a mint background, seed 0")).to_be_visible()
    page.wait_for_timeout(1500 if SHOTS else 0)
    shown(page, name)
    light = page.evaluate(
        "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).every(n => n > 128)"
    )
    assert light == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing to scroll sideways
    context.close()


def test_a_server_that_has_gone_is_told(browser, tiny_teacher):
    with listening(load(tiny_teacher)) as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("Prompt").fill("a cat")
        expect(stage(page, "a cat, seed 0")).to_be_visible()
    page.get_by_label("Prompt").fill("a dog")
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    page.close()
