"""Tests the documentation: its code runs, its commands, links and pictures exist, and the reference is complete.

Code: every ```python block of README.md and docs/*.md runs. The blocks of one page run one after another in one
namespace, in an empty folder, without network. A block whose first line is `# name.py` is also written to that file,
so that later blocks can import it. A comment before a block changes what the test runs, and says why:

    <!-- test: skip, REASON -->
    <!-- test: OLD becomes NEW, REASON -->
"""

import ast
import contextlib
import importlib
import io
import re
import shlex
import socket
import sys
import types
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from runpy import run_path

import matplotlib
import pytest
import torch
import typer
import yaml

import xprune
from xprune.artefact.onnx import export_onnx
from xprune.cli.commands import app
from xprune.core.task import Task
from xprune.criteria.captum.methods import REFUSED, served

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
REFERENCE = sorted(DOCS.glob("api/*.md"))
RECORDS = sorted(DOCS.glob("results/**/*.md"))
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [*GUIDES, *REFERENCE, *RECORDS, *OTHERS]
PICTURES = sorted(DOCS.glob("pictures/*.svg"))

BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"<!-- test: (?:(skip)|(.+?) becomes (.+?)), (.+?) -->")
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
MEMBER = re.compile(r"^::: (\S+)$", re.MULTILINE)
COMMANDS = typer.main.get_command(app).commands
CAPTUM = re.compile(r"^\| `captum:(\w+)` \|", re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> list[tuple[int, str, str]]:
    """Yields line number, code and the text before it, for the code blocks in these languages."""
    text, found, end = path.read_text(encoding="utf-8"), [], 0
    for match in BLOCK.finditer(text):
        if match[1] in languages:
            found.append((text.count("\n", 0, match.start()) + 2, match[2], text[end : match.start()]))
        end = match.end()
    return found


def directives(before: str) -> list[tuple[str, str, str, str]]:
    """Yields (skip, old, new, reason) for the comments directly before a block."""
    found: list[tuple[str, str, str, str]] = []
    for line in reversed(before.strip().splitlines()):
        match = DIRECTIVE.fullmatch(line.strip())
        if not match and line.strip():
            break
        if match:
            found.append(match.groups(default=""))
    return found


@pytest.fixture
def as_it_was(tmp_path, monkeypatch):
    """Gives an empty folder and no network. Afterwards tables, modules, random numbers and threads are as before."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the documentation's code asks for the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tables = [(table, dict(table)) for table in (xprune.ADAPTERS, xprune.UNIT_KINDS, xprune.RESOURCES)]
    modules, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield tmp_path
    torch.set_num_threads(threads)
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "python")], ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(page, as_it_was, monkeypatch):
    main = types.ModuleType("page")
    # dataclasses look up the module of a class, so the module of the page has to be there.
    monkeypatch.setitem(sys.modules, "page", main)
    for line, code, before in blocks(page, "python"):
        asked = directives(before)
        if any(skip for skip, *_ in asked):
            continue
        for _, old, new, _ in asked:
            assert old in code, f"{name_of(page)}:{line}: there is no {old!r} in the block to put {new!r} in its place"
            code = code.replace(old, new)
        file = re.match(r"# (\w+)\.py\n", code)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                if file:
                    (as_it_was / f"{file[1]}.py").write_text(code, encoding="utf-8")
                    importlib.invalidate_caches()
                    # Another test may have imported a file of the same name from its own folder.
                    monkeypatch.delitem(sys.modules, file[1], raising=False)
                    made = importlib.import_module(file[1])
                    vars(main).update({name: value for name, value in vars(made).items() if name[:2] != "__"})
                else:
                    exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(main))
        except Exception as error:
            raise AssertionError(f"{name_of(page)}:{line}: {type(error).__name__}: {error}") from error


def test_a_comment_for_the_test_says_why_and_is_rare():
    comments = [line for page in PAGES for line in page.read_text().splitlines() if line.startswith("<!-- test:")]
    wrong = [line for line in comments if not DIRECTIVE.fullmatch(line)]
    assert not wrong and len(comments) <= 20
    skipped = [line for line in comments if line.startswith("<!-- test: skip")]
    assert len(skipped) <= 4, "an example that is not run goes stale"


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_lines_of_code_fit_on_the_screen(page):
    code = [line for _, text, _ in blocks(page, "python", "bash", "toml") for line in text.splitlines()]
    assert not [line for line in code if len(line) > 100]


def commands(page: Path) -> list[list[str]]:
    """Yields the lines of the console blocks as words. A backslash continues a line, a # starts a comment."""
    text = "\n".join(code for _, code, _ in blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [page for page in [*GUIDES, *OTHERS] if commands(page)], ids=name_of)
def test_command_lines_are_ones_that_the_programs_take(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        at = words.index("xprune") if "xprune" in words else -1
        if at == 0 or (at > 0 and words[at - 1] == "-m"):
            name, *given = words[at + 1 :]
            assert name in {*COMMANDS, "--help"}, f"xprune has no command {name}"
            if "--help" not in (name, *given):
                # Raises an error for an unknown or a missing argument.
                COMMANDS[name].make_context(name, given)
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists() or words[2] in ("venv", "pip"), words


def sections(page: Path) -> dict[str, str]:
    """Returns the text of each section `## xprune NAME`, by the name."""
    parts = re.split(r"^## `xprune ([\w-]+)`.*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_command_line_page_has_every_command():
    assert list(sections(DOCS / "command-line.md")) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_page_has_every_option_and_its_default(name):
    rows = re.findall(r"^\| (`.+?`) \|.*\| (.*?) \|$", sections(DOCS / "command-line.md")[name], re.MULTILINE)
    said = {tuple(re.findall(r"`([^`\s]+)[^`]*`", names)): default.strip("`") for names, default in rows}
    said = {names: default for names, default in said.items() if names[0].startswith("--")}
    wanted = {}
    for each in COMMANDS[name].params:
        if each.param_type_name == "option" and each.name != "help":
            default = each.default
            if isinstance(default, bool):
                default = "on" if default else "off"
            wanted[(*each.opts, *each.secondary_opts)] = "required" if each.required else default
    assert said.keys() == wanted.keys()
    for names, default in wanted.items():
        if default is not None:
            assert said[names] == str(default), names


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page: its headings, as in the table of contents, and names of the API."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    made = set(re.findall(r"\{ ?#([\w-]+)", text)) | set(MEMBER.findall(text))
    for heading in re.findall(r"^#+ (.+?)(?: \{.*\})?$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        count = found[slug] = found.get(slug, -1) + 1
        made.add(f"{slug}_{count}" if count else slug)
    return made


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_are_there(page):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            # Links to other sites are not opened.
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        if page.is_relative_to(DOCS):
            assert file.is_relative_to(DOCS), f"{name_of(page)}: {target} is no part of the site"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("picture", PICTURES, ids=name_of)
def test_a_drawing_can_be_read_by_everyone(picture):
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(picture).getroot()
    assert root.get("role") == "img" and {"width", "height"}.isdisjoint(root.attrib)
    assert root.get("aria-labelledby", "").split() == [root.find(space + each).get("id") for each in ("title", "desc")]
    assert all((root.find(space + each).text or "").strip() for each in ("title", "desc"))
    tags = {element.tag.removeprefix(space) for element in root.iter()}
    assert tags.isdisjoint({"script", "image", "foreignObject", "a"})
    width = float(root.get("viewBox").split()[2])
    sizes = [float(size) for size in re.findall(r"font-size=\"([\d.]+)", picture.read_text())]
    assert sizes and min(sizes) * 340 / width >= 10, "on a phone its text is too small"
    assert any(picture.name in page.read_text() for page in GUIDES), "no page shows it"


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def leaves(entries):
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from leaves(value) if isinstance(value, list) else [value]

    listed = list(leaves(config["nav"]))
    there = {path.relative_to(DOCS).as_posix() for path in [*GUIDES[1:], *REFERENCE, DOCS / "results" / "README.md"]}
    assert len(listed) == len(set(listed)) and set(listed) == there


def members() -> dict[str, str]:
    """Returns the page of each name in the reference. A name on two pages is an error."""
    found: dict[str, str] = {}
    for page in REFERENCE:
        for name in MEMBER.findall(page.read_text()):
            assert name not in found, f"{name} is in {found[name]} and in {name_of(page)}"
            found[name] = name_of(page)
    return found


def test_the_reference_has_every_public_name():
    missing = {f"xprune.{name}" for name in xprune.__all__} - members().keys()
    assert not missing


def found_at(name: str) -> object:
    """Returns the object with a dotted name. Raises AttributeError if there is none."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:cut]))
            break
    for part in parts[cut:]:
        found = getattr(found, part)
    return found


def test_the_reference_has_each_criterion_selection_and_task():
    there = {id(thing) for thing in map(found_at, members())}
    tasks = {each for each in vars(xprune).values() if isinstance(each, type) and issubclass(each, Task)}
    wanted = {*xprune.CRITERIA.values(), *xprune.SELECTIONS.values(), *tasks, export_onnx}
    assert not [each for each in wanted if id(each) not in there]


def test_docstrings_are_shown_as_they_are_meant():
    pytest.importorskip("griffe", reason="needs the extra dev")
    readable = run_path(str(ROOT / ".ci" / "docstrings.py"))["readable"]
    assert readable("Adds.\n\nExample:\n    >>> 1 + 1") == "Adds.\n\nExamples:\n    >>> 1 + 1"
    assert readable("rows[fraction][class], [a plan][xprune.Plan]") == "rows[fraction]\\[class], [a plan][xprune.Plan]"


def test_troubleshooting_has_a_section_for_each_error():
    headings = re.findall(r"^## (\w+Error)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    errors = {name for name in xprune.__all__ if name.endswith("Error")} - {"XPruneError"}
    assert sorted(headings) == sorted(errors)


def literal(node: ast.AST) -> str:
    """The text of a string literal, with "..." for each value that an f-string fills in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in parts)


def literals() -> list[str]:
    """Every string literal of the package. Docstrings are left out: no user meets them as a message."""
    found = []
    for path in sorted((ROOT / "xprune").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements
            if text or isinstance(node, ast.JoinedStr):
                found.append(literal(node))
    return found


def test_the_messages_on_the_troubleshooting_page_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| .+ \|$", page, re.MULTILINE)
    phrases = [row.replace("`", "") for row in rows if not re.match(r"-+|(message|reason) says", row)]
    assert len(phrases) > 50
    messages = "\0".join(literals())
    for phrase in phrases:
        # Names and numbers that a message fills in. A phrase may not go on from one message into the next.
        parts = re.split(r"\.\.\.|\b(?:N|M|SITE)\b", phrase)
        pattern = r"[^\0]*?".join(map(re.escape, parts))
        assert re.search(pattern, messages), f"no message says {phrase!r}"


def test_the_tables_of_captum_hold_what_scores_and_what_is_refused():
    page = (DOCS / "api" / "criteria.md").read_text()
    assert {*CAPTUM.findall(page)} == {*served(), *REFUSED}


def test_the_site_is_built_as_the_ci_builds_it():
    assert "mkdocs build --strict\n" in (ROOT / "Makefile").read_text()
    assert "make docs" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", [*GUIDES, *REFERENCE], ids=name_of)
def test_words_are_those_of_the_glossary(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"\b(?:writers?|readers?|feeds|fed|stand-?ins?|nests?|landing|simply|seamless\w*)\b", text)
    assert not found


def test_glossary_is_in_alphabetical_order():
    words = re.findall(r"^### (.+)$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(words) > 30 and all(a.lower() < b.lower() for a, b in pairwise(words))
