"""Tests that docstrings have the required form and examples, and avoid some words."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import xprune

ROOT = Path(xprune.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
TABLES = {**xprune.CRITERIA, **xprune.SELECTIONS}
PUBLIC = {
    name: found
    for name in xprune.__all__
    if inspect.isclass(found := getattr(xprune, name)) and not issubclass(found, Exception)
} | {kind.__name__: kind for kind in map(TABLES.get, ("xpruner", "taylor", "magnitude", "random", *xprune.SELECTIONS))}
AVOIDED = r"\b(writers?|nests?|landing|carves?|standin|feeds (it|them|onward))\b"
"""Words that had several meanings, or none for a stranger. docs/glossary.md holds those that took their place."""


def docstrings(file):
    """Yields (line, docstring) of the module, classes and functions of a file."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_class_has_an_example_that_runs(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert "\nExample:\n" in text, f"{name} has no example"
    example = text.partition("\nExample:\n")[2]
    assert ">>> " in example and "doctest: +SKIP" not in example, f"the example of {name} does not run"


@pytest.mark.parametrize("file", FILES)
def test_docstrings_begin_with_one_sentence(file):
    for line, text in docstrings(file):
        first, _, rest = text.partition("\n")
        assert first.endswith((".", "?")), f"{file}:{line}: {first!r} is no whole sentence"
        assert not rest or rest.startswith("\n"), f"{file}:{line}: an empty line follows the first"


@pytest.mark.parametrize("file", FILES)
def test_fields_stand_in_sections_of_their_own(file):
    """Tables made by hand are not allowed, since mkdocstrings shows them as one paragraph."""
    for line, text in docstrings(file):
        rows = [row for row in text.splitlines() if re.match(r"\w+(, \w+)*  +\w", row)]
        assert not rows, f"{file}:{line}: {rows[0]!r} belongs under Args: or Attributes:"


@pytest.mark.parametrize("file", FILES)
def test_words_are_those_of_the_glossary(file):
    # These files are about the old names.
    if file in ("moved.py", "adapters/old_keywords.py"):
        return
    for line, text in docstrings(file):
        found = re.search(AVOIDED, text)
        assert not found, f"{file}:{line}: {found[0]!r} is not a word of docs/glossary.md"
