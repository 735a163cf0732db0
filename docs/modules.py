"""A hook of mkdocs: puts every package's modules, each with the start of its docstring, where a page asks for them."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "sbrush"


def first_sentence(file):
    """The first line of a module's docstring, with those that go on with it."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


def every_module():
    """A table for each folder, the top folder's own files last."""
    lines = []
    rooms = sorted(folder for folder in SOURCE.rglob("*") if (folder / "__init__.py").is_file())
    for room in [*rooms, SOURCE]:
        name = room.relative_to(SOURCE.parent).as_posix()
        lines += [
            "",
            f"### `{name}/`",
            "",
            first_sentence(room / "__init__.py"),
            "",
            "| module | what it is |",
            "|---|---|",
        ]
        files = [file for file in sorted(room.glob("*.py")) if file.name != "__init__.py"]
        lines += [f"| `{file.name}` | {first_sentence(file)} |" for file in files]
    return "\n".join(lines)


def on_page_markdown(markdown, **_):
    return markdown.replace("<!-- every module -->", every_module())
