"""`sbrush sample --interactive`: a prompt line, a student that stays in memory, an image for each line."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sbrush.console import SbrushError, info, is_text, printable
from sbrush.sampling.negative_request import Negative
from sbrush.sampling.targets import Target
from sbrush.storage.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image
    from prompt_toolkit.completion import WordCompleter

    from sbrush.sampling.artist import Artist
    from sbrush.sampling.files import SampleRequest

COMMANDS = {
    "/seed": "/seed 7 draws with seed 7 from now on; /seed alone takes a random one",
    "/steps": "/steps 4 draws in 4 steps from now on; /steps alone in as many as the student was trained for",
    "/negative": "/negative blurry sets the negative prompt; /negative alone removes it",
    "/save": "/save cat.png saves a copy of the last image",
    "/help": "/help shows this list",
    "/quit": "/quit ends the session, as Ctrl-D does",
}
# What --interactive does not do. Each is an option of `sbrush sample`.
OTHERS = (
    "prompts_file", "column", "compare", "teacher", "teacher_config", "teacher_steps", "teacher_guidance", "json_",
    "overwrite", "batch",
)  # fmt: skip
COLUMNS = 40  # of an image in the terminal, at most


def check_interactive(context: typer.Context) -> None:
    """SbrushError if an option is given that a session does not have, or there is no terminal."""
    for name in OTHERS:
        if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            flag = {"json_": "--json", "prompts_file": "--prompts"}.get(name, "--" + name.replace("_", "-"))
            raise SbrushError(f"{flag} does not go with --interactive", "leave out one of them", code=2)
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty()):
        raise SbrushError(
            "an interactive session needs a terminal", 'without one: sbrush sample "a cat", or --prompts -', code=2
        )


def check_single(prompts: list[str], target: Target, seeds: list[int]) -> None:
    """SbrushError if a session is to start with more than one image, or to write anything but one file."""
    if len(prompts) > 1 or len(seeds) > 1:
        what = "prompts" if len(prompts) > 1 else "seeds"
        raise SbrushError(f"several {what} do not go with --interactive", "give one, and type the others", code=2)
    if target.folder or target.path is None:
        raise SbrushError("--interactive writes one file, again and again", "give -o a name such as cat.png", code=2)


@dataclass
class Session:
    """One session: what its lines do. `path`: the file that each image replaces; `show`: puts one on the terminal."""

    artist: Artist
    path: Path
    seed: int = 0
    metadata: bool = True
    show: Callable[[Image.Image], None] | None = None
    negative: Negative | None = None
    _prompt: str | None = None

    def handle(self, line: str) -> bool:
        """Does what a line says; whether the session goes on. SbrushError if the line makes no sense."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._draw(line)
            return True
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        action = {
            "/seed": self._take_seed, "/steps": self._take_steps, "/negative": self._take_negative,
            "/save": self._save, "/help": self._help,
        }.get(name)  # fmt: skip
        if action is None:
            raise SbrushError(f"no command {printable(name)}", f"commands are {', '.join(COMMANDS)}", code=2)
        action(rest.strip())
        return True

    def _draw(self, prompt: str) -> None:
        from sbrush.sampling.images import save_png, to_image
        from sbrush.sampling.notes import note_truncated_prompts, note_unknown_words

        if not is_text(prompt):
            raise SbrushError("the prompt is not UTF-8 text", "set the terminal to UTF-8", code=2)
        note_unknown_words(self.artist.student, [prompt])
        note_truncated_prompts(self.artist.student, [prompt])
        (cells,) = self.artist.draw([prompt], [self.seed], batch=1)
        image = to_image(cells[0])
        save_png(self.path, image, self.artist.record(prompt, self.seed) if self.metadata else None)
        self._prompt = prompt
        self._try_to_show(image)
        info(f"{printable(self.path)} · seed {self.seed} · {self.artist.labels[0]}")

    def _try_to_show(self, image: Image.Image) -> None:
        if self.show is None:
            return
        try:
            self.show(image)
        except Exception as problem:  # whatever a terminal's odd answers lead to: the file is written all the same
            self.show = None
            info(f"note: this terminal shows no images ({type(problem).__name__}); look at {printable(self.path)}")

    def _again(self) -> None:
        if self._prompt is not None:
            self._draw(self._prompt)

    def _take_seed(self, text: str) -> None:
        import secrets

        from sbrush.serving.requests import DRAWN_SEEDS

        if not re.fullmatch(r"\d{0,18}", text):
            raise SbrushError(f"not a seed: {printable(text)}", "a seed is a whole number from 0 on", code=2)
        self.seed = int(text) if text else secrets.randbelow(DRAWN_SEEDS)
        self._again()

    def _take_steps(self, text: str) -> None:
        if not re.fullmatch(r"([1-9]\d{0,3})?", text):
            raise SbrushError(f"not a number of steps: {printable(text)}", "such as /steps 4", code=2)
        self.artist = self.artist.altered(steps=int(text) if text else None, negative=self.negative)
        self._again()

    def _take_negative(self, text: str) -> None:
        negative = Negative(text) if text else None
        self.artist = self.artist.altered(steps=self.artist.steps, negative=negative)
        self.negative = negative
        self._again()

    def _save(self, text: str) -> None:
        if self._prompt is None:
            raise SbrushError("there is no image yet", "type a prompt first", code=2)
        if not text:
            raise SbrushError("/save has no name", "such as /save cat.png", code=2)
        target = Target.parse(text)
        if target.folder or target.path is None:
            raise SbrushError("/save takes the name of a .png file", "such as /save cat.png", code=2)
        target.check(1, compare=False)
        replaced = target.path.exists()
        with atomic_write(target.path) as partial:
            shutil.copyfile(self.path, partial)
        info(f"{'replaced' if replaced else 'saved'} {printable(target.path)}")

    def _help(self, _: str) -> None:
        info("Type a prompt and press Enter to draw its image. The arrow keys recall earlier lines.")
        for text in COMMANDS.values():
            info(f"  {text}")


def start_session(request: SampleRequest, first: str | None) -> None:
    """Loads the student and draws what is typed, until the session ends. `first`: the first prompt, if there is one."""
    from sbrush.sampling.files import load_artist
    from sbrush.stickers.world import BACKGROUNDS, COLOURS, KINDS, SIZES

    artist = load_artist(request)
    assert request.target.path is not None
    (seed,) = request.images.seeds
    session = Session(artist, request.target.path, seed, request.metadata, terminal_image, request.negative)
    in_world = artist.student.about.get("world") == "stickers"
    words = [*KINDS, *COLOURS, *BACKGROUNDS, *SIZES, "background"] if in_world else []
    info(f"{printable(artist.student.name)} is ready; each image goes to {printable(session.path)}. /help, /quit")
    run(session, typed_lines(first, words))


def run(session: Session, lines: Iterable[str]) -> None:
    """Handles lines until there are no more. What makes no sense is told, and the session goes on."""
    for line in lines:
        try:
            if not session.handle(line):
                return
        except SbrushError as problem:
            info(f"error: {printable(problem)}")
            info(f"hint: {printable(problem.hint)}")
        except KeyboardInterrupt:
            info("stopped")


def completer(words: Iterable[str]) -> WordCompleter:
    """Completes commands and `words`."""
    from prompt_toolkit.completion import WordCompleter

    return WordCompleter([*COMMANDS, *words], pattern=re.compile(r"[\w/]+"))


def typed_lines(first: str | None, words: Iterable[str]) -> Iterator[str]:
    """`first`, then what is typed at a prompt line with history, suggestions from it, and completion; until Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.history import InMemoryHistory

    history = InMemoryHistory()
    if first:
        history.append_string(first)
        yield first
    line = PromptSession[str](history=history, completer=completer(words), auto_suggest=AutoSuggestFromHistory())
    while True:
        try:
            yield line.prompt("> ")
        except KeyboardInterrupt:  # clears the line
            continue
        except EOFError:
            return


def terminal_image(image: Image.Image) -> None:
    """An image in the terminal: by sixel or kitty's protocol where it answers that it has one, else in half blocks."""
    import logging

    logging.getLogger("textual_image").setLevel(logging.ERROR)
    from rich.console import Console
    from textual_image.renderable import Image as Renderable  # asks the terminal, once

    console = Console()
    console.print(Renderable(image, width=min(COLUMNS, console.width), height="auto"))
