"""Structured pruning of transformers: whole attention heads, MLP neurons and residual channels are removed.

The pruned model is an ordinary, smaller module. It is proved equal to the dense model with the gates of the removed
units at 0. If the proof fails, nothing is handed out.

    result = xprune.Pruner(model, criterion="taylor", budget=xprune.Budget(macs=0.5)).run(train_loader, val_loader)
    result.save("pruned/")
    model = xprune.load("pruned/")

Everything in `__all__` is public: the stages of a run as functions, the values that they hand to each other, and the
base classes of plug-ins.
"""

from xprune import explain
from xprune.adapters import ADAPTERS
from xprune.adapters.declarative import Units
from xprune.artefact.portable import classes_of_xprune
from xprune.artefact.save_load import load, save
from xprune.blockwise.prune import PrunedFolder, prune_folder
from xprune.comparison.grid import Case, Grid, compare
from xprune.comparison.table import Comparison
from xprune.core.budget import Budget
from xprune.core.checkpoint import Checkpoint
from xprune.core.costs import Cost, Costs, LinearCost
from xprune.core.coverage import Coverage
from xprune.core.interfaces import Adapter, Context, Criterion, Selected, Selection
from xprune.core.latency_table import LatencyTable
from xprune.core.plan import Plan
from xprune.core.record import Metrics
from xprune.core.resource import Resource
from xprune.core.scores import Scores
from xprune.core.site import Cut, Site, Sites
from xprune.core.table_cost import Curve, TableCost
from xprune.core.target import Target
from xprune.core.task import Task
from xprune.core.times import Ratio
from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.costs.count import count_macs, count_params, count_resources
from xprune.costs.latency import latency
from xprune.costs.measure import measure_costs
from xprune.costs.resources import RESOURCES
from xprune.criteria import CRITERIA
from xprune.discovery.find import find_sites
from xprune.discovery.kinds import UNIT_KINDS
from xprune.environment import __version__
from xprune.errors import (
    ArtefactError,
    BudgetError,
    DataError,
    GateError,
    ModelError,
    PlanError,
    PluginError,
    SurgeryError,
    TargetError,
    TrainingError,
    XPruneError,
)
from xprune.moved import install as _forward_old_paths
from xprune.pipeline import profile, score, select
from xprune.pruner import Pruner
from xprune.result import PruneResult
from xprune.selections import SELECTIONS
from xprune.selections.learned.selection import LearnedThresholds
from xprune.surgery.apply import apply
from xprune.surgery.gates import Gated, Gates
from xprune.tasks import TASKS
from xprune.tasks.classification import Classification
from xprune.tasks.detection import Detection
from xprune.tasks.embeddings import Embeddings
from xprune.tasks.graphs import GraphClassification, NodeClassification
from xprune.tasks.multi_label import MultiLabel
from xprune.tasks.regression import Regression
from xprune.tasks.segmentation import Segmentation
from xprune.tasks.tokens import LanguageModel, TokenClassification
from xprune.tradeoff.frontier import Frontier
from xprune.tradeoff.measure import frontier
from xprune.tradeoff.points import Point
from xprune.training.evaluate import evaluate
from xprune.training.finetune import Finetune, finetune

__all__ = [
    "ADAPTERS",
    "CRITERIA",
    "RESOURCES",
    "SELECTIONS",
    "TASKS",
    "UNIT_KINDS",
    "Adapter",
    "ArtefactError",
    "Budget",
    "BudgetError",
    "Case",
    "Checkpoint",
    "Classification",
    "Comparison",
    "Context",
    "Cost",
    "Costs",
    "Coverage",
    "Criterion",
    "Curve",
    "Cut",
    "DataError",
    "Detection",
    "Embeddings",
    "Finetune",
    "Found",
    "Frontier",
    "GateError",
    "Gated",
    "Gates",
    "GraphClassification",
    "Grid",
    "LanguageModel",
    "LatencyTable",
    "LearnedThresholds",
    "LinearCost",
    "Metrics",
    "ModelError",
    "MultiLabel",
    "NodeClassification",
    "Plan",
    "PlanError",
    "PluginError",
    "Point",
    "PruneResult",
    "PrunedFolder",
    "Pruner",
    "Ratio",
    "Regression",
    "Resource",
    "Scores",
    "Search",
    "Segmentation",
    "Selected",
    "Selection",
    "Site",
    "Sites",
    "SurgeryError",
    "TableCost",
    "Target",
    "TargetError",
    "Task",
    "TokenClassification",
    "TrainingError",
    "UnitKind",
    "Units",
    "XPruneError",
    "__version__",
    "apply",
    "classes_of_xprune",
    "compare",
    "count_macs",
    "count_params",
    "count_resources",
    "evaluate",
    "explain",
    "find_sites",
    "finetune",
    "frontier",
    "latency",
    "load",
    "measure_costs",
    "profile",
    "prune_folder",
    "save",
    "score",
    "select",
]

_forward_old_paths()
