"""xprune: structured pruning of transformers, exact or refused, with criteria that can be exchanged.

result = xprune.Pruner(model, criterion="taylor", budget=xprune.Budget(macs=0.5)).run(train_loader, val_loader)
result.save("pruned/")
model = xprune.load("pruned/")
"""

from xprune import explain
from xprune.adapters import ADAPTERS
from xprune.artefact import load, save
from xprune.budget import Budget, Costs
from xprune.compare import Case, Grid, compare
from xprune.comparison import Comparison
from xprune.cost import count_macs, count_params, latency, measure_costs
from xprune.criteria import CRITERIA
from xprune.errors import (
    ArtefactError,
    BudgetError,
    DataError,
    GateError,
    ModelError,
    PlanError,
    PluginError,
    SurgeryError,
    TrainingError,
    XPruneError,
)
from xprune.evaluate import Metrics, evaluate
from xprune.finetune import Finetune, finetune
from xprune.gates import Gated, Gates
from xprune.interfaces import Adapter, Context, Criterion, Selection
from xprune.plan import Plan
from xprune.pruner import Pruner
from xprune.result import PruneResult
from xprune.scores import Scores
from xprune.segmentation import Segmentation
from xprune.selections import SELECTIONS
from xprune.selections.learned import LearnedThresholds
from xprune.site import Cut, Site
from xprune.sites import Sites, find_sites
from xprune.stages import score, select
from xprune.surgery import apply
from xprune.task import Classification, Task
from xprune.tasks_graph import GraphClassification, NodeClassification
from xprune.token_tasks import LanguageModel, TokenClassification
from xprune.units import Units

__version__ = "0.1.0"

__all__ = [
    "ADAPTERS",
    "CRITERIA",
    "SELECTIONS",
    "Adapter",
    "ArtefactError",
    "Budget",
    "BudgetError",
    "Case",
    "Classification",
    "Comparison",
    "Context",
    "Costs",
    "Criterion",
    "Cut",
    "DataError",
    "Finetune",
    "GateError",
    "Gated",
    "Gates",
    "GraphClassification",
    "Grid",
    "LanguageModel",
    "LearnedThresholds",
    "Metrics",
    "ModelError",
    "NodeClassification",
    "Plan",
    "PlanError",
    "PluginError",
    "PruneResult",
    "Pruner",
    "Scores",
    "Segmentation",
    "Selection",
    "Site",
    "Sites",
    "SurgeryError",
    "Task",
    "TokenClassification",
    "TrainingError",
    "Units",
    "XPruneError",
    "apply",
    "compare",
    "count_macs",
    "count_params",
    "evaluate",
    "explain",
    "find_sites",
    "finetune",
    "latency",
    "load",
    "measure_costs",
    "save",
    "score",
    "select",
]
