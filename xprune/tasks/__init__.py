"""Tasks: each one says how a batch is read, and what the loss and the metric are. `TASKS` lists them all.

To add a task to xprune, write a subclass of `core.task.Task` in a separate file, and add its class to `TASKS`. This
folder may import core, modules and errors. Another package adds tasks with the entry-point group `xprune.tasks`.
"""

from collections.abc import Mapping

from xprune.core.registry import table
from xprune.core.task import Task
from xprune.tasks.classification import Classification
from xprune.tasks.detection import Detection
from xprune.tasks.embeddings import Embeddings
from xprune.tasks.graphs import GraphClassification, NodeClassification
from xprune.tasks.multi_label import MultiLabel
from xprune.tasks.regression import Regression
from xprune.tasks.segmentation import Segmentation
from xprune.tasks.tokens import LanguageModel, TokenClassification

_OURS: tuple[type[Task], ...] = (
    Classification,
    MultiLabel,
    Regression,
    Embeddings,
    TokenClassification,
    LanguageModel,
    Segmentation,
    Detection,
    NodeClassification,
    GraphClassification,
)

TASKS: Mapping[str, type[Task]] = table("tasks", _OURS, Task, classes=True)
"""The class of each task by its name. Tasks of other packages are included."""
