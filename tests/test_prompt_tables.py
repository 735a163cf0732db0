"""Prompts in CSV, TSV and JSON: which column, what is told, what is refused; and plain text, which stays as it is."""

import json

import pytest

from conftest import sbrush
from sbrush.console import SbrushError, count
from sbrush.prompts import make_prompts, read_prompts, read_texts


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


ROWS = ("a cat, asleep", 'a "red" dog')
FORMS = {
    "x.csv": 'id,Prompt,n\n1,"a cat, asleep",3\n2,"a ""red"" dog",4\n',
    "semicolons.csv": 'id;CAPTION;n\n1;a cat, asleep;3\n2;"a ""red"" dog";4\n',
    "excel.csv": '\ufeffsep=;\r\nid;caption;n\r\n1;a cat, asleep;3\r\n2;"a ""red"" dog";4\r\n',
    "bars.csv": 'id|prompt\n1|a cat, asleep\n2|"a ""red"" dog"\n',
    "short.csv": 'text,id,n\n"a cat, asleep",1\n"a ""red"" dog"\n',
    "one.csv": 'text\na cat, asleep\n"a ""red"" dog"\n',
    "x.tsv": 'text\tid\na cat, asleep\t1\na "red" dog\t2\n',
    "quoted.tsv": 'text\tid\n"a cat, asleep"\t1\n"a ""red"" dog"\t2\n',
    "cr.csv": 'id,prompt\r1,"a cat, asleep"\r2,"a ""red"" dog"\r',
    "x.jsonl": "".join(json.dumps({"id": i, "Text": t}) + "\n" for i, t in enumerate(ROWS)) + "\n",
    "strings.jsonl": "".join(json.dumps(t) + "\n" for t in ROWS),
    "x.json": json.dumps([{"caption": t, "tags": [1]} for t in ROWS], indent=2),
    "strings.json": json.dumps(ROWS),
    "jq.json": "\n".join(json.dumps({"caption": t}, indent=2) for t in ROWS),
    "table.txt": 'id,prompt\n1,"a cat, asleep"\n2,"a ""red"" dog"\n',
    "objects.txt": "".join(json.dumps({"prompt": t}) + "\n" for t in ROWS),
    "list.txt": json.dumps(ROWS),
    "no-suffix": "\n".join(json.dumps({"prompt": t}) for t in ROWS),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_tables_and_json_are_read(tmp_path, name, encoding):
    prompts = read_prompts(written(tmp_path, name, FORMS[name].removeprefix("\ufeff").encode(encoding)))
    assert prompts.texts == ROWS and prompts.sha256 == make_prompts(ROWS, "x").sha256
    assert prompts.describe().startswith(f"2 prompts from {tmp_path / name}, ")


def test_what_was_taken_is_told(tmp_path):
    lines = "".join(f"{i},a cat {i},x,{i},\n" for i in range(2000))
    prompts = read_prompts(written(tmp_path, "x.csv", f"id,caption,source,width,more\n{lines}7,,,,\n8,a cat 1,,,\n"))
    assert prompts.describe() == (
        f"2,000 prompts from {tmp_path}/x.csv, column 'caption'; 4 other columns ignored (id, source, width, more) "
        "(1 blank, 1 duplicate rows dropped)"
    )


def test_a_line_break_in_a_prompt_becomes_a_space_and_stays_in_a_caption(tmp_path):
    file = written(tmp_path, "x.csv", 'caption,id\n"a cat \r\n\n on a mat",1\na dog,2\n')
    prompts = read_prompts(file)
    assert prompts.texts == ("a cat on a mat", "a dog") and "line breaks in 1 made spaces" in prompts.describe()
    assert read_texts(file).texts == ["a cat \r\n\n on a mat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "column", "said"),
    [
        (
            "x.csv",
            "Prompts,Category\na red car.,Colors\n",
            None,
            "no column called prompt, caption or text; it has 'Pr",
        ),
        ("x.csv", "a cat\na dog\n", None, "it has 'a cat'"),
        ("x.jsonl", '{"instruction": "a cat"}\n', None, "it has 'instruction'"),
        ("x.csv", "prompt,text\na,b\n", None, "2 columns that may be meant: 'prompt', 'text'"),
        ("x.csv", "prompt,prompt\na,b\n", None, "2 columns"),
        ("x.csv", "prompt,id\na,b\n", "nothing", "no column 'nothing'; it has 'prompt', 'id'"),
        ("x.csv", "prompt,id\na cat, asleep,7\n", None, "line 2 of .*x.csv has 3 cells, the header 2"),
        ("x.csv", 'prompt,id\n"a cat,7\na dog,8\n', None, "is no table: line 2"),
        ("x.csv", '"prompt\na cat', None, "its first line has a quote without a partner"),
        ("x.csv", "prompt,id\n", None, "column 'prompt' of .* is empty"),
        ("x.csv", "", None, "holds no prompt"),
        ("x.json", "", None, "holds no prompt"),
        ("x.json", "[]", None, "holds no prompt"),
        ("x.json", '{"prompt":\n "a cat"}', None, "is one JSON object, of 'prompt'"),
        ("x.json", "[1, 2]", None, "value 1 of .* is a number"),
        ("x.json", '["a cat", {"prompt": "a"}]', None, "value 2 of .* is an object"),
        ("x.json", '[{"prompt": ["a cat"]}]', None, "row 1 of .*: its 'prompt' is a list, not text"),
        ("x.json", '["\\ud800"]', None, "value 1 of .* is no valid text"),
        ("x.json", '[{"prompt": "a\\u0000b"}]', None, "row 1 of .* is no valid text"),
        ("x.json", "[" * 100_000, None, "cannot be read as JSON"),
        ("x.json", '["a cat"]', "prompt", "no column 'prompt': it holds strings"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt":\n', None, "is no JSON: line 3"),
        ("x.txt", "a cat\na dog\n", "prompt", "no column 'prompt': it is plain text"),
        ("x.txt", 'id,prompt\n1,a "cat", asleep\n', "prompt", "line 2 of .*x.txt has 3 cells"),
        ("x.txt", '{"prompt": "a"}\n{"pro', "prompt", "is no JSON: line 2"),
    ],
)
def test_what_is_ambiguous_or_damaged_is_refused(tmp_path, name, content, column, said):
    with pytest.raises(SbrushError, match=said) as refusal:
        read_prompts(written(tmp_path, name, content), column)
    assert refusal.value.code == 2 and refusal.value.hint


def test_a_column_is_taken_by_name(tmp_path):
    file = written(tmp_path, "x.csv", "prompt,text,Long Name\na,b,c\n")
    assert read_prompts(file, "text").texts == ("b",) and read_prompts(file, "long name").texts == ("c",)
    assert "'Long Name'" in read_prompts(file, "Long Name").describe()
    assert read_prompts(written(tmp_path, "x.txt", "title\na cat, asleep\n"), "title").texts == ("a cat, asleep",)
    plain = written(tmp_path, "plain.txt", "a cat\n")
    assert read_prompts(plain, "text", required=False).texts == ("a cat",)
    assert read_prompts(written(tmp_path, "y.csv", "caption\na\n"), "text", required=False).texts == ("a",)


PLAIN = (
    "a cat, asleep\na dog\n\n",
    "prompt, highly detailed, 8k\na dog\n",
    "text, caption\na cat\na dog, asleep\n",
    "prompt\na cat\n",
    "[a cat]\n{x|y} on a mat\n",
    '{"prompt": "a"}\nand more\n',
    '["a"\nb\n',
    '"a cat"\n"a dog"\n',
    "a\tb\n",
    "caption, text\n",
    "a\u2028b\x0bc\x0cd\x85e\n",
)


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_stays_as_it_is(tmp_path, text):
    """To the bit: what a line-by-line reading gives, whatever the lines look like."""
    prompts = read_prompts(written(tmp_path, "x.txt", text))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    assert list(prompts.texts) == lines and prompts.sha256 == make_prompts(lines, "x").sha256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAIN[2], "as plain text: its first line is like a table's, but line 2 of"),
        (PLAIN[3], "as plain text, its first line 'prompt' a prompt too"),
        (PLAIN[5], "as plain text: it begins like JSON, but"),
    ],
)
def test_plain_text_that_looks_like_a_table_is_told(tmp_path, text, said):
    assert said in read_prompts(written(tmp_path, "x.txt", text)).describe()


@pytest.mark.parametrize("text", ["a\rb\rc\r", "a\r\nb\r\nc\r\n", "a\r\r\nb\r\r\nc", "a\rb\nc\n", "a\nb\nc\n\n"])
def test_any_line_ends(tmp_path, text):
    assert read_prompts(written(tmp_path, "x.txt", text)).texts == ("a", "b", "c")


def test_sample_and_distill_read_the_same_tables(tmp_path, tiny_teacher, clip_folder, monkeypatch):
    """Through the command line: distill's dry run and training, its validation, and sample."""
    monkeypatch.chdir(tmp_path)
    table = written(tmp_path, "x.csv", "caption,id\na cat,1\na red dog,2\n")
    plain = written(tmp_path, "plain.txt", "a fish\n")
    told = "2 prompts from " + str(table) + ", column 'caption'; 1 other column ignored (id)"
    shape = "--teacher", tiny_teacher, "--steps", 1, "--batch", 2, "--grid-every", 0, "--student-lora", 2
    checked = "--validate-every", 1, "--validation-prompts", plain, "--validation-clip", clip_folder
    dry = sbrush("distill", table, "--column", "caption", *shape, *checked, "--dry-run")
    assert dry.returncode == 0 and told in dry.stdout, dry.stderr
    assert f"validation prompts: 1 prompt from {plain}\n" in dry.stdout
    run = sbrush("distill", table, "--column", "caption", *shape, *checked)
    assert run.returncode == 0 and told in run.stderr, run.stderr
    assert f"validation: 1 prompt from {plain}\n" in run.stderr
    config = json.loads((tmp_path / "runs" / "x" / "config.json").read_text())
    assert config["prompts"] == {
        "source": "x.csv",
        "sha256": make_prompts(["a cat", "a red dog"], "").sha256,
        "count": 2,
    }
    drawn = sbrush("sample", "--prompts", table, "-o", tmp_path / "o", "--student", tiny_teacher)
    assert drawn.returncode == 0 and told in drawn.stderr and len(list((tmp_path / "o").iterdir())) == 2


def test_a_column_without_a_table_is_refused(tmp_path):
    file = written(tmp_path, "x.txt", "a cat\n")
    for command in (("distill", file), ("sample", "--prompts", file), ("sample", "a cat")):
        done = sbrush(*command, "--column", "text")
        assert done.returncode == 2 and "--column" in done.stderr, done.stderr


def test_one_prompt_is_no_prompts():
    assert count(1, "prompt") == "1 prompt" and count(0, "prompt") == "0 prompts"
    assert count(2751, "image") == "2,751 images"
    assert make_prompts(["a"], "x").describe() == "1 prompt from x"


def test_empty_rows_are_counted_and_shift_nothing(tmp_path):
    """An empty line, an empty cell, and a last row that is one, though a text's last line break is no blank line."""
    file = tmp_path / "p.csv"
    file.write_text('prompt,number\na cat,1\n\n"",2\na dog,3\n"",\n')
    prompts = read_prompts(file)
    assert prompts.texts == ("a cat", "a dog") and prompts.blank == 3
    assert [text.strip() for text in read_texts(file)] == ["a cat", "", "", "a dog", ""]
