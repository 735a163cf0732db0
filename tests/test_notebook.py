"""The notebooks of the documentation run: each code cell after the other, with trainings of a few steps."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
QUICKLY = {"LORA_STEPS = 300": "LORA_STEPS = 2"}


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for text, quick in QUICKLY.items():
        assert any(text in source for source in sources)
        sources = [source.replace(text, quick) for source in sources]
    names, shown = {}, []
    for source in sources:
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook.name, "exec"), names)
        if last:
            shown.append(eval(compile(ast.Expression(last.value), notebook.name, "eval"), names))
    images = [image for image in shown if isinstance(image, Image.Image)]
    assert len(images) >= 6 and all(len(image.getcolors(1 << 20)) > 20 for image in images)
