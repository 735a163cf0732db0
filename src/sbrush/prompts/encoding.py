"""Bytes to text: UTF-8, and UTF-16 and UTF-32 with a byte-order mark. For all else the command that converts it.

Which encoding that is, is a guess: each that the bytes can be is tried, and scored by how much its reading looks like
writing. The error shows the reading, so that you see whether the guess is right before you convert.
"""

from __future__ import annotations

import codecs
import shlex
import unicodedata
from dataclasses import dataclass

from sbrush.console import SbrushError, printable
from sbrush.prompts.source import Source

MARKS = {  # byte-order marks and what they mean; UTF-32's begins as UTF-16's
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
PACKED = {  # how other files begin, what they are, and how their text comes out
    b"\x1f\x8b": ("gzip archive", "zcat {} | sbrush ... -"),
    b"\x28\xb5\x2f\xfd": ("zstd archive", "zstdcat {} | sbrush ... -"),
    b"BZh91AY&SY": ("bzip2 archive", "bzcat {} | sbrush ... -"),
    b"\xfd7zXZ": ("xz archive", "xzcat {} | sbrush ... -"),
    b"PK\x03\x04": ("zip archive or a spreadsheet", "unzip it, or save the sheet as CSV in UTF-8"),
    b"PAR1": ("Parquet file", "write its column as JSON Lines: pandas' read_parquet, then to_json(lines=True)"),
}
LOOKED_AT = 1 << 18  # bytes that a guess looks at
SURE = 0.8  # of 1: less is no guess


@dataclass(frozen=True)
class Encoding:
    """An encoding that text may be in without saying so."""

    iconv: str  # its name in the command that converts it
    often: str = ""  # characters that its texts hold many of
    share: float = 0.0  # which at least these are of its characters outside ASCII
    seldom: str = ""  # characters that another encoding's texts would hold many of
    hanzi: tuple[str, ...] = ()  # the standards of which it writes the common Chinese characters


KANA = "".join(map(chr, range(0x3041, 0x30FD)))
HANZI = "的一是不了在人有我他个这中来上大为和国地到以说时要就出会可也你对生能而子那得于着下之年过发后里只色红猫狗白黑花"
HANZI_BIG5 = (
    "的一是不了在人有我他個這中來上大為和國地到以說時要就出會可也你對生能而子那得於著下之年過發後裡隻色紅貓狗白黑花"
)
HANGUL = "이다는의가에하을고한지로기사그은를도리시어서나자인대해아들정일있주수과스으면안라여와위색개양마"
CYRILLIC, GREEK = "оеаинтсрвлкы", "αοιετσςνηυρκπάέίόή"
HEBREW, ARABIC = "יוהלאמשרבתםנחד", "اليمونرتةبعدحسق"
THAI = "".join(map(chr, range(0x0E01, 0x0E4F)))
ENCODINGS = {  # of two that read alike the first is taken
    "cp1252": Encoding("WINDOWS-1252", seldom="ýþð"),  # Turkish letters, misread
    "cp1254": Encoding("WINDOWS-1254"),
    "cp1250": Encoding("WINDOWS-1250"),
    "mac_roman": Encoding("MACINTOSH"),
    "cp1251": Encoding("WINDOWS-1251", CYRILLIC, 0.6),
    "koi8_r": Encoding("KOI8-R", CYRILLIC, 0.6),
    "cp866": Encoding("CP866", CYRILLIC, 0.6),
    "cp1253": Encoding("WINDOWS-1253", GREEK, 0.6),
    "cp1255": Encoding("WINDOWS-1255", HEBREW, 0.6),
    "cp1256": Encoding("WINDOWS-1256", ARABIC, 0.6),
    "cp874": Encoding("CP874", THAI, 0.8),
    "cp932": Encoding("CP932", KANA, 0.15, hanzi=("euc_jp",)),
    "euc_jp": Encoding("EUC-JP", KANA, 0.15, hanzi=("euc_jp",)),
    "gb18030": Encoding("GB18030", HANZI, 0.12, hanzi=("gb2312",)),
    "big5": Encoding("BIG5", HANZI_BIG5, 0.12, hanzi=("big5",)),
    "cp949": Encoding("CP949", HANGUL, 0.15, hanzi=("euc_kr",)),
    "utf_16_le": Encoding("UTF-16LE", hanzi=("gb2312", "big5", "euc_jp")),
    "utf_16_be": Encoding("UTF-16BE", hanzi=("gb2312", "big5", "euc_jp")),
}
COMMON = {"gb2312": (0xB0, 0xD7), "euc_jp": (0xB0, 0xCF), "big5": (0xA4, 0xC6)}  # lead bytes of common characters


def to_text(source: Source) -> str:
    """A source's text. SbrushError if it is no text, or in an encoding that its first bytes do not tell."""
    data = source.data
    encoding = next((encoding for mark, encoding in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as problem:
        if encoding.startswith("utf-8"):
            raise _refusal(source, problem.start) from None
        raise SbrushError(
            f"{printable(source.name)} begins as {encoding.upper()}, and its byte {problem.start + 1} is none",
            "copy it again: it may have been cut",
            code=2,
        ) from None
    if "\0" in text:
        raise _refusal(source, max(data.find(b"\0"), 0))
    return text


def guess(data: bytes) -> str | None:
    """The encoding, by Python's name, in which bytes look most like writing; None if they do in none."""
    scores = {name: _score(text, about) for name, about in ENCODINGS.items() if (text := _decoded(data, name))}
    best = max(scores, key=lambda name: scores[name], default=None)
    return best if best is not None and scores[best] >= SURE else None


def _refusal(source: Source, where: int) -> SbrushError:
    """What there is to say of bytes that at `where` are not UTF-8, or NUL."""
    data, name, quoted = source.data, printable(source.name), shlex.quote(source.name)
    for begins, (what, how) in PACKED.items():
        if data.startswith(begins):
            return SbrushError(f"{name} is a {what}, not text", how.format(quoted), code=2)
    start = max(data.rfind(b"\n", 0, where) + 1, where - LOOKED_AT // 2)
    start -= start % 2  # where each character has two bytes
    part, line = data[start : start + LOOKED_AT], data.count(b"\n", 0, where) + 1
    encoding = guess(part)
    if encoding is None:
        if b"\0" in data:
            return SbrushError(f"{name} is not text: it holds NUL bytes", source.form, code=2)
        hint = "save it as UTF-8 in the program that wrote it: sbrush cannot tell which encoding it is in"
        return SbrushError(f"{name} is not UTF-8 (line {line})", hint, code=2)
    iconv = ENCODINGS[encoding].iconv
    lines = (text.strip() for text in _decoded(part, encoding).splitlines())
    reading = next((text for text in lines if text), "")[:60]
    command = f"iconv -f {iconv} -t UTF-8"
    hint = f"{command} {quoted} > utf8{source.suffix}" if source.is_file else f"... | {command} | sbrush ... -"
    return SbrushError(
        f'{name} is not UTF-8 (line {line}); as {iconv} it reads "{printable(reading)}"',
        f"if that is right, convert it: {hint}",
        code=2,
    )


def _decoded(data: bytes, encoding: str) -> str:
    """The text of bytes that may be cut within a character at their end; "" if they are none."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data, final=len(data) < LOOKED_AT)
    except UnicodeDecodeError:
        return ""


def _score(text: str, encoding: Encoding) -> float:
    """How much a text looks like writing, 0 to 1, by its characters outside ASCII and those beside them."""
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\t\n\r\f" for c in set(text)):
        return 0.0
    padded = f" {text} "
    places = [i for i, c in enumerate(padded) if not c.isascii()]
    if not places:
        return 1.0
    run = fitting = often = 0
    for i in places:
        before, char, behind = padded[i - 1], padded[i], padded[i + 1]
        run = run + 1 if not before.isascii() and before.isalpha() else 1
        strange = run >= 4 and _script(char) == "LATIN"  # four such letters in a row are another alphabet's
        fitting += not strange and char not in encoding.seldom and _fits(before, char, behind, encoding)
        often += char.lower() in encoding.often
    letters = [c for c in text if c.isalpha() and _script(c) == "LATIN"]
    if 2 * sum(not c.isascii() for c in letters) > len(letters):
        return 0.0  # so is a Latin text of such letters
    enough = min(1.0, often / len(places) / encoding.share) if encoding.share else 1.0
    return fitting / len(places) * enough


def _fits(before: str, char: str, behind: str, encoding: Encoding) -> bool:
    """Whether a character looks right between its neighbours."""
    if not char.isalpha():
        letters = before.isalpha() + behind.isalpha()
        return char == "’" or letters < (2 if unicodedata.category(char)[0] == "P" else 1) or char.isspace()
    script = _script(char)
    if script == "CJK":
        return any(_is_common(char, standard) for standard in encoding.hanzi)
    if script in ("HIRAGANA", "KATAKANA", "HANGUL", "THAI", "ARABIC", "HEBREW"):
        return True
    if char.isupper() and before.islower():
        return False
    return all(_script(c) == script for c in (before, behind) if c.isalpha())


def _is_common(char: str, standard: str) -> bool:
    if standard not in COMMON:
        return False
    lead = char.encode(standard, "ignore")[:1]
    return bool(lead) and COMMON[standard][0] <= lead[0] <= COMMON[standard][1]


def _script(char: str) -> str:
    return unicodedata.name(char, "").split(" ")[0].split("-")[0]
