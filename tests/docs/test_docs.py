"""The contract names its tests, and they exist."""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONTRACT = (ROOT / "docs" / "semantics.md").read_text()
REFERENCE = re.compile(r"\b(test_\w+)::(test_\w+)")


@functools.cache
def names_in(module: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(f"{module}.py")
    return set(re.findall(r"^\s*def (\w+)", path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("module, name", sorted(set(REFERENCE.findall(CONTRACT))))
def test_a_test_that_the_contract_names_exists(module, name):
    assert name in names_in(module)


def test_every_rule_of_the_bar_names_its_tests():
    rules = re.split(r"^\d+\. \*\*", CONTRACT.partition("## The bar")[2].partition("## Account")[0], flags=re.MULTILINE)
    assert len(rules) == 12  # what comes before the first, and eleven
    for rule in rules:
        assert REFERENCE.search(rule), rule[:60]


def test_every_section_names_a_test():
    sections = {s.partition("\n")[0]: s for s in CONTRACT.split("\n## ")[1:]}
    assert len(sections) == 7
    assert [name for name, text in sections.items() if not REFERENCE.search(text)] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text()):
        assert (page.parent / target).is_file(), target
