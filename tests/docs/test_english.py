"""Two countable rules of plain English, over pages, docstrings and error messages.

A sentence has at most 35 words, and a page or module at most 3 free relatives ("what", "who", ...) in 1 000 words.
Code, table rules and references to tests are not prose. A table cell, a list item, a heading and an entry of an
"Args:" section each end a sentence.
"""

import ast
import json
import pathlib
import re
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LONGEST = 35
RELATIVES_IN_1000 = 3

CLOSED = ("CHANGELOG.md", "docs/notebook/")
"""Records of the past: they are not edited any more."""
IGNORED = {"build", "dist", "runs", "datasets", "shared", "node_modules", "__pycache__"}
PACKAGES = ("perpjax", "train", "benchmarks")

RELATIVE = re.compile(r"\b(?:what|whatever|whatsoever|who|whoever|whom|whose|that which)\b", re.IGNORECASE)
ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "cf.", "vs.", "al.", "approx.", "s.e.", "resp.")
END = re.compile(r"(?<![\s.])[.!?][\"')\]\u201d\u2019]*(?=\s|$)")
ENTRIES = ("Args:", "Arguments:", "Attributes:", "Raises:")
SECTIONS = (*ENTRIES, "Returns:", "Yields:", "Note:", "Notes:", "Example:", "Examples:")


class Block(NamedTuple):
    """Lines that belong together: no sentence crosses from one block to another."""

    line: int
    text: str
    """Lines joined by newlines, so that a place in the text tells its line."""


class Sentence(NamedTuple):
    line: int
    text: str

    @property
    def words(self) -> int:
        return sum(any(c.isalnum() for c in token) for token in self.text.split())


def keep_lines(word: str):
    """A replacement by one word, with as many line ends as the match had."""
    return lambda match: word + "\n" * match.group().count("\n")


def strip_markup(text: str) -> str:
    """Replace inline code by one word, links by their texts, and drop emphasis and tags."""
    text = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", keep_lines("CODE"), text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<https?:[^>]*>|https?:\S+", "URL", text)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    return re.sub(r"\*\*|__(?=\w)|(?<=\w)__|(?<!\w)[*_](?=\w)|(?<=[\w.])[*_](?!\w)", "", text)


def split_sentences(block: Block) -> list[Sentence]:
    text, sentences, start = strip_markup(block.text), [], 0
    ends = [m.end() for m in END.finditer(text)]
    for end in [*ends, len(text)]:
        piece = text[start:end]
        if end != len(text) and piece.split() and piece.split()[-1].lower().lstrip("(\"'") in ABBREVIATIONS:
            continue
        if piece.strip():
            line = block.line + text[: start + len(piece) - len(piece.lstrip())].count("\n")
            sentences.append(Sentence(line, " ".join(piece.split())))
        start = end
    return sentences


def split_cells(row: str) -> list[str]:
    """The cells of a table row; a bar in inline code does not divide."""
    hidden = re.sub(r"`[^`]*`", lambda m: m.group().replace("|", "\0"), row.strip().strip("|"))
    return [cell.replace("\0", "|") for cell in re.split(r"(?<!\\)\|", hidden)]


def read_markdown(text: str, first_line: int = 1) -> list[Block]:
    """The blocks of prose of a Markdown text."""
    text = re.sub(r"<!--.*?-->", keep_lines(""), text, flags=re.DOTALL)
    blocks: list[Block] = []
    lines: list[str] = []
    begun = 0
    fence = ""

    def close() -> None:
        if lines:
            blocks.append(Block(begun, "\n".join(lines)))
        lines.clear()

    for number, raw in enumerate(text.split("\n"), first_line):
        line = raw.strip()
        if fence:
            fence = "" if line.startswith(fence) else fence
            continue
        if opening := re.match(r"`{3,}|~{3,}", line):
            close()
            fence = opening.group()
            continue
        if quoted := re.match(r">\s?", line):
            line = re.sub(r"\btest_\w+::test_\w+,?", "", line[quoted.end() :]).strip()
        if not line or re.match(r"\[[^\]]+\]:\s", line) or re.fullmatch(r"[-*_=\s]{3,}", line):
            close()
        elif line.startswith("#"):
            close()
            blocks.append(Block(number, line.lstrip("# ")))
        elif line.startswith("|"):
            close()
            blocks += [Block(number, c) for c in split_cells(line) if re.search(r"\w", c)]
        else:
            item = re.match(r"(?:[-*+]|\d+[.)])\s+", line)
            if item:
                close()
                line = line[item.end() :]
            if not lines:
                begun = number
            lines.append(line)
    close()
    return blocks


def read_notebook(text: str) -> list[Block]:
    """The blocks of the Markdown cells; lines are counted from the top of the cells, all put one after another."""
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return read_markdown("\n\n".join("".join(cell["source"]) for cell in cells))


def read_docstring(text: str, first_line: int) -> list[Block]:
    """The blocks of a docstring: paragraphs, list items, and entries of its sections."""
    raw = text.expandtabs().split("\n")
    margin = min((len(x) - len(x.lstrip()) for x in raw[1:] if x.strip()), default=0)
    blocks: list[Block] = []
    lines: list[str] = []
    begun, section, entry, depth, blank, fenced = first_line, "", -1, 0, True, False

    def close() -> None:
        if lines:
            blocks.append(Block(begun, "\n".join(lines)))
        lines.clear()

    for i, whole in enumerate(raw):
        indent = 0 if i == 0 else max(len(whole) - len(whole.lstrip()) - margin, 0)
        line = whole.strip()
        if line.startswith("```"):
            close()
            fenced = not fenced
            continue
        if fenced or line.startswith(">>>"):
            continue
        if not line:
            close()
            blank = True
            continue
        if indent == 0 and line in SECTIONS:
            close()
            section, entry, blank = line, -1, False
            continue
        if indent == 0:
            section = ""
        if section and entry < 0:
            entry = indent
        if not section and blank and indent >= 4:
            continue  # set off by a blank line and indented: a table or an example
        item = re.match(r"(?:[-*+]|\d+[.)])\s+", line)
        if item:
            line = line[item.end() :]
        starts_entry = section in ENTRIES and indent == entry
        if item or starts_entry or (not section and lines and indent > depth and raw[i - 1].rstrip().endswith(":")):
            close()
        if not lines:
            begun, depth = first_line + i, indent
        lines.append(line)
        blank = False
    close()
    return blocks


def read_message(node: ast.expr) -> str | None:
    """The text of a string expression, each placeholder as one word; None if it is not a string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(read_message(part) or "VALUE" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [read_message(node.left), read_message(node.right)]
        return None if parts == [None, None] else "".join(part or "VALUE" for part in parts)
    return None


def read_module(text: str) -> list[Block]:
    """The blocks of every docstring, those of attributes included, and of every message that is raised."""
    blocks = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            blocks += read_docstring(node.value.value, node.lineno)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = read_message(node.exc.args[0])
            if message is not None:
                blocks.append(Block(node.lineno, message.replace("\n", " ")))
    return sorted(blocks)


READERS = {".md": read_markdown, ".ipynb": read_notebook, ".py": read_module}


def list_files() -> list[str]:
    pages = [*ROOT.rglob("*.md"), *ROOT.rglob("*.ipynb")]
    modules = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    names = [path.relative_to(ROOT) for path in (*pages, *modules)]
    seen = [n for n in names if not any(part in IGNORED or part.startswith(".") for part in n.parts)]
    return sorted(n.as_posix() for n in seen if not n.as_posix().startswith(CLOSED))


FILES = list_files()


def read_sentences(name: str) -> list[Sentence]:
    path = ROOT / name
    return [s for block in READERS[path.suffix](path.read_text(encoding="utf-8")) for s in split_sentences(block)]


@pytest.mark.parametrize("name", FILES)
def test_no_sentence_is_long(name):
    long = [s for s in read_sentences(name) if s.words > LONGEST]
    assert not long, "\n" + "\n".join(f"{name}:{s.line}: {s.words} words: {s.text}" for s in long)


@pytest.mark.parametrize("name", FILES)
def test_free_relatives_are_few(name):
    sentences = read_sentences(name)
    words = sum(s.words for s in sentences)
    found = [s for s in sentences for _ in RELATIVE.findall(s.text)]
    lines = "\n".join(f"{name}:{s.line}: {s.text}" for s in found)
    assert len(found) <= RELATIVES_IN_1000 * words / 1000, f"{len(found)} in {words} words\n{lines}"


# The reader itself.


def texts(blocks: list[Block]) -> list[tuple[int, str]]:
    return [tuple(sentence) for block in blocks for sentence in split_sentences(block)]


def test_markdown_is_read_by_its_parts():
    page = """# A heading
A sentence of 0.5 ticks,
e.g. this `one. two` with a [link. here](x.md). **Another** one
ends here:

| a | b `x | y` |
|---|---|
| one. two | three |
- an item
  goes on. Twice
- the next

```bash
this is code
```
1. a rule
   > test_rules::test_one, test_rules::test_two,
   > test_rules::test_three
> a quotation
"""
    assert texts(read_markdown(page)) == [
        (1, "A heading"),
        (2, "A sentence of 0.5 ticks, e.g. this CODE with a link."),
        (3, "here."),
        (3, "Another one ends here:"),
        (6, "a"),
        (6, "b CODE"),
        (8, "one."),
        (8, "two"),
        (8, "three"),
        (9, "an item goes on."),
        (10, "Twice"),
        (11, "the next"),
        (16, "a rule"),
        (19, "a quotation"),
    ]


def test_docstrings_and_messages_are_read_by_their_parts():
    module = '''"""The module: bars 0 .. K - 1. Twice."""

LIMIT = 3
"""Of an attribute."""

def f(x):
    """Do it
    over lines.

    Events, in order:
      ("one", name), ("two", name)

        a table  that  is  skipped

    - an item,
      continued
    - another

    Args:
      x: a number. It
        goes on.
      y: another.

    Returns:
      Two lines
      of it.
    """
    raise ValueError(f"x = {x}: is not {LIMIT!r}" " at all; give " + str(x))
'''
    assert texts(read_module(module)) == [
        (1, "The module: bars 0 .. K - 1."),
        (1, "Twice."),
        (4, "Of an attribute."),
        (7, "Do it over lines."),
        (10, "Events, in order:"),
        (11, '("one", name), ("two", name)'),
        (15, "an item, continued"),
        (17, "another"),
        (20, "x: a number."),
        (20, "It goes on."),
        (22, "y: another."),
        (25, "Two lines of it."),
        (28, "x = VALUE: is not VALUE at all; give VALUE"),
    ]


def test_words_and_free_relatives_are_counted():
    (sentence,) = split_sentences(Block(1, "Whatever `a b c` says - 2 + 2, what matters is that which stays."))
    assert sentence.words == 11
    assert len(RELATIVE.findall(sentence.text)) == 3
    assert not RELATIVE.findall("somewhat; whole; whosoever")
