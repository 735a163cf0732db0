"""A new subject in words: what prompts call it, what kind of thing it is, and the prompts that it is learned with.

Imports nothing heavy: the command line asks before it loads torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sbrush.console import SbrushError, printable
from sbrush.prompts import Prompts, make_prompts
from sbrush.stickers.world import KINDS, Caption, all_captions, unknown_words

EXAMPLE = '--token "sks dog" --class dog'
LONGEST = 60  # characters of a token or a class: the rest of a prompt needs room too
TEMPLATES = (
    "a photo of a {}", "a {} on the beach", "a {} in the snow", "a {} in a forest", "a {} on a wooden table",
    "a close-up of a {}", "a {} in front of a city skyline", "a {} on a mountain", "an oil painting of a {}",
    "a pencil drawing of a {}", "a {} at night", "a {} in a garden", "a {} indoors, by a window", "a {} on grass",
    "a {} seen from above", "a {} in the rain",
)  # fmt: skip
WORLD = "sticker"  # what the built-in world calls a thing of any kind
SHOWN = 240  # captions of the built-in world's other kinds that stay in practice


@dataclass(frozen=True)
class Subject:
    """`token`: what prompts call the subject, such as "sks dog"; `kind`: what it is one of, such as "dog"."""

    token: str
    kind: str

    def __post_init__(self) -> None:
        for flag, text in (("--token", self.token), ("--class", self.kind)):
            if not re.search(r"\w", text):
                raise SbrushError(f"{flag} has no word in it", EXAMPLE, code=2)
            if len(text) > LONGEST or text != " ".join(text.split()):
                raise SbrushError(
                    f"{flag} is to be a few words with one space between them, of {LONGEST} characters at most",
                    EXAMPLE,
                    code=2,
                )
        if not self.own_words:
            raise SbrushError(
                f"the token {printable(self.token)} names nothing but its class",
                f"put a made-up word before it, such as sks: {EXAMPLE}",
                code=2,
            )

    @property
    def own_words(self) -> list[str]:
        """The words of the token that are not those of its class."""
        return [word for word in _words(self.token) if word not in _words(self.kind)]

    def instead(self, prompt: str, kind: str | None = None) -> str | None:
        """A prompt of its class (or another `kind`) with the subject in place of it; None if it does not name that."""
        found = re.compile(rf"(?:\b(an?)\s+)?(?<![\w-]){re.escape(kind or self.kind)}(?![\w-])", re.IGNORECASE)
        if not found.search(prompt):
            return None
        article = "an " if self.token[0].lower() in "aeiou" else "a "
        return found.sub(lambda match: (article if match[1] else "") + self.token, prompt)


@dataclass(frozen=True)
class Practice:
    """The prompts of both trainings. `subject`: those that name it; `others`: all others, which stay as they are."""

    subject: tuple[str, ...]
    others: tuple[str, ...]
    source: str

    @property
    def caption(self) -> str:
        """That of the photos: the first prompt of the subject."""
        return self.subject[0]


def practice_of(subject: Subject, prompts: Prompts | None, *, world: bool) -> Practice:
    """The prompts with which a subject is learned.

    `prompts`: those of --prompts; None: TEMPLATES of its class, or captions of the built-in world if `world`. The
    subject's are made of those that name its class. SbrushError if there are none, or none without it.
    """
    if prompts is None:
        if world:
            return _of_world(subject)
        texts = [template.format(subject.kind) for template in TEMPLATES]
        return Practice(_distinct(subject.instead(text) for text in texts), _distinct(texts), "templates")
    named = _distinct(subject.instead(text) for text in prompts.texts)
    if not named:
        raise SbrushError(
            f"no prompt of {printable(prompts.source)} names the class {printable(subject.kind)}",
            "the subject takes its place in the prompts that do: add some, or leave out --prompts",
            code=2,
        )
    return Practice(named, prompts.texts, prompts.source)


def _of_world(subject: Subject) -> Practice:
    """Captions of the built-in world: the subject in each size on each background, and other kinds as they are."""
    kind = subject.kind if subject.kind in KINDS else None
    named = [c for c in all_captions() if c.kind == kind and c.colour is None]
    every = [c.text for c in all_captions() if c.kind is not None]
    others = [every[i * len(every) // SHOWN] for i in range(SHOWN)]
    captions = [Caption(kind=kind), *named]
    texts = _distinct(subject.instead(c.text, kind or WORLD) for c in captions)
    return Practice(texts, _distinct([*others, *(c.text for c in captions)]), "captions of the built-in world")


def unseen_by_world(subject: Subject) -> bool:
    """Whether the built-in world knows no kind of thing of that class."""
    return subject.kind != WORLD and bool(unknown_words(subject.kind))


def prompts_of(practice: Practice) -> Prompts:
    """All distinct prompts of both trainings, as a list that can be shown and hashed."""
    return make_prompts([*practice.subject, *practice.others], practice.source)


def _distinct(texts: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


def _words(text: str) -> Sequence[str]:
    return re.findall(r"\w+", text.lower())
