"""The class Checkpoint: the folder in which a run saves its state, and how often it does so."""

from dataclasses import dataclass, replace
from pathlib import Path

from xprune.errors import TrainingError


@dataclass(frozen=True)
class Checkpoint:
    """Where a run saves its state, and how often. Each argument `checkpoint_dir` accepts it in place of a folder.

    A state is written between two updates, as soon as the number of updates or the time is reached, whichever comes
    first. A run that is killed loses at most this much work.

    Args:
        folder: The folder. It is created if it is missing.
        steps: A state is written after every so many updates, at least 1. None means that updates are not counted.
        minutes: A state is written if the last one is at least so many minutes old, more than 0. None means that no
            time is measured.

    Raises:
        TrainingError: A number is out of range, or both numbers are None.

    Example:
        >>> Checkpoint("state", steps=500).minutes
        10.0
        >>> Checkpoint("state", steps=500, minutes=None).inside("finetune").folder.as_posix()
        'state/finetune'
    """

    folder: str | Path
    steps: int | None = None
    minutes: float | None = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        checks = {
            "steps": (self.steps is None or self.steps >= 1, "None and whole numbers of at least 1"),
            "minutes": (self.minutes is None or self.minutes > 0, "None and numbers above 0"),
        }
        for name, (in_range, allowed) in checks.items():
            if not in_range:
                raise TrainingError(
                    f"Checkpoint({name}={getattr(self, name)!r}) is out of range, allowed are {allowed}."
                )
        if self.steps is None and self.minutes is None:
            raise TrainingError(
                "Checkpoint(steps=None, minutes=None) would never write a state. Give a number of steps or of minutes."
            )

    @staticmethod
    def of(given: "str | Path | Checkpoint | None") -> "Checkpoint | None":
        """Returns what an argument `checkpoint_dir` says, as a `Checkpoint`. Returns None if nothing shall be saved."""
        return given if given is None or isinstance(given, Checkpoint) else Checkpoint(given)

    @property
    def path(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)

    def inside(self, name: str) -> "Checkpoint":
        """Returns the same for a folder in this folder. Each stage of a run has one of its own."""
        return replace(self, folder=self.path / name)
