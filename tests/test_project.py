"""Tests the files of the project: one version everywhere, valid YAML, and guides that name existing files."""

import os
import re
import subprocess
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import xprune
from benchmarks import record as recording
from tests.support.models import CLASSES, VIT

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
YAML = [
    *sorted(ROOT.glob(".github/**/*.yml")),
    *(ROOT / name for name in (".pre-commit-config.yaml", "CITATION.cff", "mkdocs.yml")),
]
GUIDES = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", ".github/pull_request_template.md"]


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_has_one_place():
    module, _, name = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert getattr(import_module(module), name) == xprune.__version__
    assert "version" not in read_yaml(ROOT / "CITATION.cff")
    files = [path for folder in ("xprune", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    setting = [path for path in files if re.search(r"^__version__\b[^\n]*=", path.read_text(), re.MULTILINE)]
    assert setting == [ROOT / "xprune" / "environment.py"]


def test_site_and_saved_results_say_the_version(result, tmp_path, monkeypatch):
    (hook,) = read_yaml(ROOT / "mkdocs.yml")["hooks"]
    config = run_path(str(ROOT / hook))["on_config"](SimpleNamespace(copyright=None))
    assert config.copyright == f"xprune {xprune.__version__}"
    arch = ("vit_tiny_patch16_224", {**VIT, "num_classes": CLASSES})
    saved = xprune.PruneResult.load(result.save(tmp_path / "saved", arch=arch))
    assert saved.settings["versions"]["xprune"] == xprune.__version__
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    path = recording.record("one", [{"figure": 1}], "one figure")
    # The file is JSON, which is YAML too.
    assert read_yaml(path)["versions"]["xprune"] == xprune.__version__


def test_the_version_is_in_the_changelog():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert ".dev" in xprune.__version__ or headings[1] == xprune.__version__
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_parses(path):
    assert isinstance(read_yaml(path), dict)


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda path: path.name)
def test_workflows_call_what_is_there(path):
    workflow = read_yaml(path)
    # A job that needs more permissions asks for them.
    assert workflow["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        for command in (step["run"] for step in job["steps"] if "run" in step):
            called = re.findall(r"^make (\S+)|^bash (\S+)", command, re.MULTILINE)
            assert all(target in targets if target else (ROOT / script).is_file() for target, script in called)


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/[!c]*.yml")), ids=lambda path: path.name)
def test_issue_forms_are_whole(path):
    form = read_yaml(path)
    assert form["name"] and form["description"] and form["body"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    rules = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    listed = re.findall(r"^make (\S+)", subprocess.check_output(["make", "help"], cwd=ROOT, text=True), re.MULTILINE)
    assert set(listed) == set(targets) == rules
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_name_files_that_are_there(guide):
    named = re.findall(r"`([\w.-]+/[\w./-]*|[A-Za-z][\w-]*\.(?:md|toml|py|yml))`", (ROOT / guide).read_text())
    made = {"build/site", "docs/results/NAME.json"}
    missing = [name for name in named if not (ROOT / name).exists()]
    assert set(missing) <= made, f"{guide} names what is not there"


def test_what_the_guide_calls_public_is():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    testing = import_module("xprune.testing")
    assert all(hasattr(testing, name) for name in re.findall(r"`(check_\w+)`", text))
    assert all(hasattr(xprune, name) for name in re.findall(r"subclass of `(\w+)`", text))


def dependencies():
    """Returns the lowest version of each requirement of the package and its tests."""
    extras = PROJECT["project"]["optional-dependencies"]
    groups = [PROJECT["project"]["dependencies"], *(group for name, group in extras.items() if name != "dev")]
    found = [Requirement(line) for group in groups for line in group if not line.startswith("xprune[")]
    return {each: [bound.version for bound in each.specifier if bound.operator == ">="] for each in found}


@pytest.mark.smoke
@pytest.mark.skipif(
    "XPRUNE_LOWEST_VERSIONS" not in os.environ, reason="only `make test-minimum` installs lowest versions"
)
def test_the_lowest_versions_are_what_is_tested():
    higher = []
    for requirement, (floor,) in dependencies().items():
        installed = Version(Version(version(requirement.name)).public)
        if installed != Version(floor):
            higher.append(f"{requirement.name} {installed}, not {floor}")
    assert not higher


def test_floors_and_bounds_of_dependencies_hold():
    for requirement, floors in dependencies().items():
        assert len(floors) == 1, f"{requirement} has no floor"
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            # It belongs to an extra that is not installed.
            continue
        assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}, but {installed} is here"
