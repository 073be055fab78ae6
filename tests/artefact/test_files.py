"""Tests that saving replaces no files of others, and that a killed save leaves a whole artefact."""

import itertools
import os
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import xprune
from xprune.artefact import files
from xprune.artefact.files import check_file, check_folder, foreign, is_page, is_stamped, stamped
from xprune.artefact.save_load import read_tensors

FULL = {"model.safetensors", "tensors.safetensors", "xprune.json"}


def small(value):
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, value)
    return model


def save(value, folder, beside=True, shards=False):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the architecture is not saved")
        beside = {"t": torch.tensor([value])} if beside else None
        # Of 10 bytes: each tensor has a file of its own.
        return xprune.save(small(value), folder, tensors_beside=beside, max_shard_size=10 if shards else None)


def read(folder):
    """Returns a weight and the further tensors of an artefact. Raises ArtefactError if a file is not whole."""
    model = xprune.load(folder, model_fn=lambda: nn.Linear(2, 3))
    return model.weight[0, 0].item(), {name: float(tensor) for name, tensor in read_tensors(folder).items()}


def everything(folder):
    """Returns every file below the folder with its contents, and every folder and link."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def _artefact_and(name, text="mine"):
    def make(path):
        save(1.0, path)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)

    return make


def _own_weights(path):
    path.mkdir()
    save_file({"w": torch.zeros(2)}, path / "model.safetensors")


def _changed_weights(path):
    save(1.0, path)
    save_file({"w": torch.zeros(2)}, path / "model.safetensors")


def _linked_weights(path):
    save(1.0, path)
    (path / "model.safetensors").rename(path.parent / "elsewhere")
    (path / "model.safetensors").symlink_to(path.parent / "elsewhere")


def _folder_of(name):
    def make(path):
        path.mkdir()
        (path / name).mkdir()
        (path / name / "thesis.txt").write_text("years")

    return make


def _foreign_header(path):
    path.mkdir()
    (path / "xprune.json").write_text('{"mine": 1}')


REFUSED = {
    "notes in a folder": (lambda p: (p.mkdir(), (p / "thesis.txt").write_text("years")), r"did not write: thesis\.txt"),
    "notes beside an artefact": (_artefact_and("notes.md"), r"did not write: notes\.md"),
    "a picture in a folder beside": (_artefact_and("plots/a.png"), "did not write: plots"),
    "a hidden file": (_artefact_and(".env"), r"did not write: \.env"),
    "a report that is not ours": (_artefact_and("report.html", "<html>"), r"report\.html"),
    "a report that was edited": (
        _artefact_and("report.html", stamped("a").replace("a", "b", 1)),
        r"report\.html",
    ),
    "weights without a header": (_own_weights, r"model\.safetensors"),
    "weights in place of ours": (_changed_weights, r"model\.safetensors"),
    "weights that are a link": (_linked_weights, r"model\.safetensors"),
    "a folder of our file's name": (_folder_of("xprune.json"), r"xprune\.json"),
    "a header of somebody else": (_foreign_header, r"xprune\.json"),
    "weights named as pending ones": (
        _artefact_and("model-0123456789abcdef.safetensors"),
        r"model-0123456789abcdef\.safetensors",
    ),
    "many things": (lambda p: (p.mkdir(), [(p / f"{i}.txt").touch() for i in range(9)]), r"4\.txt and 4 more"),
    "a file": (lambda p: p.write_text("mine"), "is a file"),
    "a link to nowhere": (lambda p: p.symlink_to(p.parent / "nowhere"), "does not exist"),
    "a link to a folder with notes": (
        lambda p: (_folder_of("n")(p.parent / "there"), p.symlink_to(p.parent / "there")),
        "did not write: n",
    ),
    "a folder below a file": (lambda p: p.parent.joinpath("f").touch(), None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_holds_something_else_is_refused_and_stays(what, tmp_path):
    make, message = REFUSED[what]
    path = tmp_path / "out"
    make(path)
    if message is None:
        path, message = tmp_path / "f" / "out", "cannot be written to"
    before = everything(tmp_path)
    for act in (check_folder, lambda folder: save(2.0, folder)):
        with pytest.raises(xprune.ArtefactError, match=message):
            act(path)
        assert everything(tmp_path) == before


def test_the_root_and_the_current_folder_are_folders_like_others(tmp_path, monkeypatch):
    with pytest.raises(xprune.ArtefactError, match="did not write"):
        check_folder("/")
    monkeypatch.chdir(tmp_path)
    save(1.0, ".")
    save(2.0, Path())
    assert read(tmp_path)[0] == 2.0
    (tmp_path / "notes.md").touch()
    with pytest.raises(xprune.ArtefactError, match=r"notes\.md"):
        save(3.0, ".")
    assert read(tmp_path)[0] == 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc refuses new files to root too, on Linux alone")
@pytest.mark.parametrize("path", ["/proc/xprune-test", "/proc/xprune-test/below"])
def test_a_place_that_cannot_be_written_is_named(path, tmp_path):
    for act in (check_folder, lambda folder: save(1.0, folder)):
        with pytest.raises(xprune.ArtefactError, match="cannot be written to"):
            act(path)
    with pytest.raises(xprune.ArtefactError, match="cannot be written"):
        check_file(path, is_page)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_without_permission_is_named():
    # The folders of pytest are closed to other users, and this test becomes one.
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder) / "locked"
        locked.mkdir()
        locked.chmod(0o555)
        Path(folder).chmod(0o755)
        root = os.geteuid() == 0
        # The root user may write anywhere, so the test goes on as another user.
        if root:
            os.seteuid(65534)
        try:
            for path in (locked, locked / "new"):
                with pytest.raises(xprune.ArtefactError, match=r"cannot be written to \(Permission denied\)"):
                    check_folder(path)
        finally:
            if root:
                os.seteuid(0)


ALLOWED = {
    "nothing there": lambda p: None,
    "folders missing above": None,
    "an empty folder": lambda p: p.mkdir(),
    "an artefact": lambda p: save(1.0, p),
    "an artefact without tensors": lambda p: save(1.0, p, beside=False),
    "a link to an artefact": lambda p: (save(1.0, p.parent / "there"), p.symlink_to(p.parent / "there")),
    "what a desktop leaves": _artefact_and(".DS_Store"),
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("what", ALLOWED)
def test_an_artefact_is_replaced_whole(what, beside, tmp_path):
    path = tmp_path / "out"
    if ALLOWED[what]:
        ALLOWED[what](path)
    else:
        path = tmp_path / "a" / "b" / "out"
    check_folder(path)
    save(2.0, path, beside)
    assert read(path) == (2.0, {"t": 2.0} if beside else {})
    held = {entry.name for entry in path.iterdir()} - {".DS_Store"}
    assert held == (FULL if beside else FULL - {"tensors.safetensors"})
    # All files have the same permissions.
    assert len({(path / name).stat().st_mode for name in held}) == 1
    assert foreign(path) == []


def test_a_report_stays_with_a_warning_that_it_is_stale(tmp_path):
    path = save(1.0, tmp_path / "out")
    (path / "report.html").write_text(stamped("<html></html>"))
    with pytest.warns(UserWarning, match="describes the model that was there before"):
        save(2.0, path)
    assert read(path)[0] == 2.0 and is_stamped(path / "report.html")


class Killed(BaseException):
    """Takes the place of the end of a process."""


def killed_at(step, monkeypatch, act):
    """Runs `act` and ends it before a step on files, without clean-up.

    Returns:
        True if `act` was ended, False if it has fewer steps.
    """
    left = itertools.count(step, -1)
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "write_text", "chmod"):
            real = getattr(Path, name)

            def step_or_end(self, *args, real=real, **kwargs):
                if next(left) == 0:
                    raise Killed
                return real(self, *args, **kwargs)

            patch.setattr(Path, name, step_or_end)
        # A killed process cleans nothing up.
        patch.setattr(files, "remove_working", lambda working: None)
        try:
            act()
        except Killed:
            return True
    return False


@pytest.mark.parametrize(("old", "new"), [*itertools.product([True, False], repeat=2)])
def test_a_kill_at_any_step_leaves_one_of_the_two(old, new, tmp_path, monkeypatch):
    """The old and the new artefact have further tensors, or have none."""
    whole = {1.0: (1.0, {"t": 1.0} if old else {}), 2.0: (2.0, {"t": 2.0} if new else {})}
    found = []
    for step in itertools.count():
        path = save(1.0, tmp_path / str(step), beside=old)
        killed = killed_at(step, monkeypatch, lambda path=path: save(2.0, path, beside=new))
        found.append(read(path)[0])
        assert read(path) == whole[found[-1]]
        # The next save removes what the killed one left.
        save(3.0, path, beside=new)
        assert read(path)[0] == 3.0 and {entry.name for entry in path.iterdir()} <= FULL
        if not killed:
            break
    assert step > 5 and found == sorted(found) and set(found) == {1.0, 2.0}


def test_a_kill_of_a_first_save_leaves_nothing_that_is_in_the_way(tmp_path, monkeypatch):
    for step in itertools.count():
        path = tmp_path / str(step)
        killed = killed_at(step, monkeypatch, lambda path=path: save(2.0, path))
        try:
            assert read(path)[0] == 2.0
        except xprune.ArtefactError as error:
            assert killed and "is no saved model" in str(error)
        save(3.0, path)
        assert read(path)[0] == 3.0 and {entry.name for entry in path.iterdir()} == FULL
        if not killed:
            break
    assert step > 5


@pytest.mark.parametrize("extra", [{"a": {1, 2}}, {"a": float("nan")}, {"a": torch.zeros(2)}])
def test_a_save_that_fails_leaves_everything_as_it_was(extra, tmp_path):
    save(1.0, tmp_path / "out")
    before = everything(tmp_path)
    for path in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.warns(UserWarning), pytest.raises(xprune.ArtefactError, match="not plain data"):
            xprune.save(small(2.0), path, extra=extra)
        assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (stamped("<html></html>\n"), True),
        (stamped(""), True),
        (stamped("a <!-- written by xprune, sha256 of the text above: "), True),
        (stamped("a") + "more", False),
        (stamped("a").replace("a", "b", 1), False),
        ("", False),
        ("a", False),
    ],
)
def test_a_stamp_tells_whether_text_is_as_it_was_written(text, ours, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(text)
    assert is_stamped(path) is ours
    if ours:
        check_file(path, is_stamped)
    else:
        with pytest.raises(xprune.ArtefactError, match="xprune did not write it"):
            check_file(path, is_stamped)
    path.write_bytes(b"\xff\xfe\x00")
    assert not is_stamped(path) and not is_page(path)
    with pytest.raises(xprune.ArtefactError, match="is a folder"):
        check_file(tmp_path, is_stamped)


CHANGES = [(old, new) for old, new in itertools.product([None, False, True], [False, True]) if old or new]
"""(old, new): whether the old and the new artefact have their weights in several files. None for no old artefact."""


@pytest.mark.parametrize(("old", "new"), CHANGES)
@pytest.mark.parametrize("beside", [True, False])
def test_a_kill_leaves_one_of_the_two_if_the_weights_are_in_several_files(old, new, beside, tmp_path, monkeypatch):
    whole = {value: (value, {"t": value} if beside else {}) for value in (1.0, 2.0)}
    for step in itertools.count():
        path = tmp_path / str(step)
        if old is not None:
            save(1.0, path, beside, shards=old)
        killed = killed_at(step, monkeypatch, lambda path=path: save(2.0, path, beside, shards=new))
        if old is not None or (path / "xprune.json").is_file():
            found = read(path)
            assert found == whole[found[0]]
        # What the killed save has left is recognised and removed.
        check_folder(path)
        save(3.0, path, beside, shards=new)
        assert read(path)[0] == 3.0
        held = {entry.name for entry in path.iterdir()}
        weights = {name for name in held if name.startswith("model")}
        assert len(weights) == (2 if new else 1) and ("model.safetensors" in weights) is not new
        assert held - weights == FULL - {"model.safetensors"} - (set() if beside else {"tensors.safetensors"})
        if not killed:
            break


def test_shards_that_were_changed_are_not_replaced(tmp_path):
    path = save(1.0, tmp_path / "out", shards=True)
    shard = next(path.glob("model-0*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b" ")
    with pytest.raises(xprune.ArtefactError, match=f"did not write: {shard.name}"):
        save(2.0, path)
