"""CITATION.cff agrees with pyproject.toml."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_fields(text: str) -> dict[str, str]:
    """The top-level `name: value` lines of a YAML file, without quotes."""
    return {name: value.strip("\"'") for name, value in re.findall(r"^([\w-]+): *(.*?) *$", text, flags=re.MULTILINE)}


def test_the_citation_has_the_version_and_licence_of_the_package():
    text = (ROOT / "CITATION.cff").read_text()
    fields = read_fields(text)
    assert fields["cff-version"] == "1.2.0" and fields["message"] and "\nauthors:\n  - name: " in text
    assert {name: fields[name] for name in ("title", "version", "license")} == {
        "title": PROJECT["name"],
        "version": PROJECT["version"],
        "license": PROJECT["license"],
    }


def test_the_changelog_has_the_version_of_the_package():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == "Unreleased" and PROJECT["version"] in versions
