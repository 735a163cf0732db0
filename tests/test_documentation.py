"""README.md and docs/ are true: Python blocks run, command lines are the program's own, links lead somewhere."""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file

from conftest import sbrush as command
from sbrush.cli.app import app
from sbrush.console import SbrushError
from sbrush.training.health import ALARMS
from sbrush.training.recipes import RECIPES, Recipe

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "prompts/README.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
HISTORY = {ROOT / "docs" / "log.md", ROOT / "CHANGELOG.md"}  # tell of commands as they were
TODAY = [page for page in PAGES if page not in HISTORY]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def ids(values):
    return [str(value.relative_to(ROOT)) for value in values]


def blocks(page, language):
    """The code of a page's blocks in one language, in order."""
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def command_lines(page):
    """The arguments of every `sbrush ...` on a page: in shell blocks, and between backticks if it names a command."""
    text = page.read_text(encoding="utf-8")
    for code in blocks(page, "sh"):
        known = dict(re.findall(r"^(\w+)=(\S+)$", code, re.M))
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(
                re.sub(r"\$(\w+)", lambda m, known=known: known[m[1]], line.split(" > ")[0]), comments=True
            )
            if "sbrush" in (Path(word).name for word in words[:1]):
                yield words[1:]
            elif "sbrush" in words and words[words.index("sbrush") - 1] == "-m":
                yield words[words.index("sbrush") + 1 :]
    for code in re.findall(r"`(sbrush [^`]+)`", FENCE.sub("", text)):
        words = shlex.split(" ".join(code.split()))[1:]
        if len(words) > 1 and "COMMAND" not in words and "..." not in words:
            yield words


def test_the_readme_keeps_its_bounds():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


def test_the_readme_names_every_room_in_its_tree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [
        path
        for path in (ROOT / "src" / "sbrush").iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    ]
    for room in rooms:
        assert re.search(rf"^ +{re.escape(room.name)}/? +\S", readme, re.M), f"{room.name} is not in the README's tree"


def test_every_alarm_is_explained_and_every_recipe_and_setting_described():
    table = (ROOT / "docs" / "distilling.md").read_text(encoding="utf-8")
    assert all(f"| **{alarm.name}** |" in table for alarm in ALARMS)
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in recipes for name in RECIPES)
    settings = recipes.partition("\n## Every setting\n")[2]
    assert [f.name for f in dataclasses.fields(Recipe) if f.name != "name" and f"`{f.name}`" not in settings] == []


@pytest.mark.parametrize("page", TODAY, ids=ids(TODAY))
def test_every_command_line_is_one_that_the_program_takes(page):
    program = typer.main.get_command(app)
    for words in command_lines(page):
        name, *arguments = words
        if name.startswith("-"):
            assert name in ("--help", "--version"), words
            continue
        try:
            program.commands[name].make_context(name, arguments)
        except (typer.Exit, SbrushError):
            pass  # --help, or a model that is not on this machine
        except Exception as problem:
            pytest.fail(f"sbrush {shlex.join(words)}: {getattr(problem, 'format_message', lambda p=problem: p)()}")


def test_every_benchmark_line_is_one_that_it_takes():
    pages = "".join(page.read_text(encoding="utf-8") for page in TODAY)
    lines = [" ".join(line.split()) for line in re.findall(r"`python -m (sbrush\.benchmarks[^`]*)`", pages)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines += re.findall(r"python -m (sbrush\.benchmarks.*)", makefile)
    assert len(lines) > 5
    for line in lines:
        line = line.strip().replace("$(ARGS)", "--list")
        line = re.sub(r"\$\(if \$\(\w+\),((?:[^()]|\(\w+\))*)\)", r"\1", line)
        line = re.sub(r"\$\(\w+\)", "20", line.replace("$(SIZE)", "sd21"))
        words = shlex.split(line)
        program = typer.Typer()
        module = importlib.import_module(words[0])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{words[0]}.__main__")
        program.command()(module.main)
        try:
            typer.main.get_command(program).make_context(words[0], words[1:])
        except Exception as problem:
            pytest.fail(f"{line}: {getattr(problem, 'format_message', lambda p=problem: p)()}")


def test_flags_named_in_the_text_exist():
    program = typer.main.get_command(app)
    known = {"--help", "--version", "--install-completion", "--show-completion"}
    for one in program.commands.values():
        for parameter in one.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    others = {
        "--turns", "--minutes", "--size", "--cards", "--no-compile", "--clip", "--quick", "--only",  # benchmarks, tests
        "--list", "--weights", "--only-warm", "--clients", "--seconds", "--scales",
        "--num_processes", "--nproc_per_node", "--index-url",  # accelerate, torchrun, pip
    }  # fmt: skip
    for page in TODAY:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text(encoding="utf-8")))
        assert named <= known | others, (page, named - known - others)


def anchors(page):
    """The anchors of a page's headings, as both GitHub and mkdocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slug = [re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip() for heading in headings]
    return {re.sub(r"[ \-]+", "-", one) for one in slug}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_link_leads_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"[a-z]+://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), (link, "leads nowhere")
        if anchor:
            assert anchor in anchors(target), (link, sorted(anchors(target)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where the documentation's first command was given, in short: the next ones find their files."""
    folder = tmp_path_factory.mktemp("documentation")
    (folder / "prompts").symlink_to(ROOT / "prompts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        short = ["--steps", "1", "--batch", "2", "--grid-every", "0", "--device", "cpu"]
        done = command("distill", "prompts/stickers.txt", *short)
        assert done.returncode == 0 and done.stdout.split() == ["runs/stickers/student"], done.stderr
        yield folder


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=ids(WITH_PYTHON))
def test_python_blocks_run(page, place):
    names = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)  # one after the other, as a reader would
    if page.name == "api.md":  # what the example says that it prints
        assert names["x0"].mean(dim=0).flatten().tolist() == pytest.approx([1, -2], abs=0.2)
        assert names["x0"].std(dim=0).flatten().tolist() == pytest.approx([0.5, 1.5], abs=0.2)
        assert len(names["images"]) == 2 and len(names["row"]) == 8


def test_the_diffusers_snippet_draws_what_the_command_beside_it_draws(place):
    from PIL import Image, ImageChops

    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (words,) = [shlex.split(code)[1:] for code in re.findall(r"`(sbrush sample [^`]*--student runs/stickers)`", text)]
    assert command(*words, "--device", "cpu", "-o", "ours.png").returncode == 0
    exec(next(code for code in blocks(ROOT / "docs" / "quickstart.md", "python") if "DiffusionPipeline" in code), {})
    with Image.open("ours.png") as ours, Image.open("cat.png") as theirs:
        difference = ImageChops.difference(ours.convert("RGB"), theirs.convert("RGB")).getextrema()
    assert max(high for _, high in difference) <= 1


def test_the_readmes_sample_command_writes_what_it_says(place):
    words = next(words for words in command_lines(ROOT / "README.md") if "cats.png" in words)
    done = command(*words)
    assert done.returncode == 0 and done.stdout.split() == ["cats.png"] and Path("cats.png").is_file()


def test_how_a_run_starts_and_that_its_first_steps_are_not_lost(tiny_teacher, prompt_file, tmp_path):
    """docs/distilling.md: the score gap's start; `--extend` after a short run; both by the paper's recipe."""
    short = ["--teacher", tiny_teacher, "--batch", 2, "--grid-every", 0, "--device", "cpu", "--student-lr", "1e-3"]
    short += ["--log-every", 1]
    runs = {"whole": ["--steps", 4], "first": ["--steps", 2], "dmd": ["--steps", 1, "--recipe", "dmd"]}
    for out, arguments in [*runs.items(), ("first", ["--steps", 2, "--extend", 2])]:
        done = command("distill", prompt_file, *short, *arguments, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    one, other = (
        load_file(tmp_path / out / "student" / "unet" / "diffusion_pytorch_model.safetensors")
        for out in ("whole", "first")
    )
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert RECIPES["swiftbrush"].cooldown == RECIPES["swiftbrush"].warmup == 0
    whole, dmd = (json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[0]) for out in ("whole", "dmd"))
    assert (whole["score_gap_ratio"], whole["lora_divergence"]) == (0, 1) and dmd["score_gap_ratio"] > 0
