"""prune_folder: prunes a model whose weights lie in a folder, with one block in memory at a time."""

import gc
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.artefact import files
from xprune.artefact.rebuild import proved_arch
from xprune.artefact.shards import ShardWriter
from xprune.blockwise.blocks import Alone, Blocks, empty, fill, find_blocks, find_in_blocks, in_block
from xprune.blockwise.folder import Opened, open_folder
from xprune.blockwise.scoring import refuse_gradients, score_blocks
from xprune.blockwise.walk import walk
from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.coverage import Coverage
from xprune.core.interfaces import Context, Criterion, Selection
from xprune.core.plan import Plan
from xprune.core.registry import resolve
from xprune.core.scores import Scores
from xprune.core.task import Task
from xprune.costs.count import count_resources
from xprune.costs.measure import measure_costs
from xprune.criteria import CRITERIA
from xprune.errors import BudgetError, DataError, ModelError, PluginError, SurgeryError
from xprune.modules.calls import call, map_tensors
from xprune.modules.copies import shared_copy, tensors
from xprune.modules.forward import error_text
from xprune.modules.refused import KINDS
from xprune.modules.sliced import fill as make_whole
from xprune.modules.sliced import slice_of
from xprune.selections import SELECTIONS
from xprune.selections.selecting import selected
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify
from xprune.tasks import TASKS
from xprune.training.runtime import check_loader, stage

SAMPLES, PROVED = 2, 16
"""The number of samples of random tokens, and the largest length of the sequences for proofs.

With two samples, the axis of the samples can be found. MACs may be counted for longer sequences.
"""


@dataclass(frozen=True)
class PrunedFolder:
    """The result of `prune_folder`. The pruned model itself is in the folder, and not in memory.

    Attributes:
        directory: The folder. `xprune.load` reads it.
        plan: The units that stay at each site.
        scores: The scores of all units of the dense model.
        coverage: The share of the model's MACs that the units cover, and the modules that were left alone.
        dense: The cost of the dense model in each resource, by the name of the resource.
        pruned: The cost of the pruned model.
        errors: For each block, how far its output is from that of the gated dense block: the largest absolute
            difference, in float32. It is 0 for a block without sites.

    Example:
        >>> coverage, scores = Coverage(0.9, 0), Scores((), (), "magnitude")
        >>> found = PrunedFolder(Path("pruned"), Plan((), ()), scores, coverage, {"macs": 10.0}, {"macs": 8.0}, (0.0,))
        >>> found.pruned["macs"] / found.dense["macs"]
        0.8
    """

    directory: Path
    plan: Plan
    scores: Scores
    coverage: Coverage
    dense: dict[str, float]
    pruned: dict[str, float]
    errors: tuple[float, ...]


@stage()
def prune_folder(
    directory: str | Path,
    out: str | Path,
    budget: Budget | None = None,
    criterion: str | Criterion = "magnitude",
    selection: str | Selection = "global",
    *,
    example_inputs: Any = None,
    tokens: int = 128,
    loader: Iterable[Any] | None = None,
    task: str | Task | None = None,
    units: Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    blocks: str | None = None,
    model_fn: Callable[[], nn.Module] | None = None,
    max_shard_size: int = 2 * 10**9,
    seed: int = 0,
) -> PrunedFolder:
    """Prunes a model that does not fit into memory. Its weights are read from a folder, one block at a time.

    The pruned model is written to another folder. It is the model that `find_sites`, `score`, `select`, `apply` and
    `save` would give with the whole model in memory and `inside=` the list of blocks. The steps are:

    1. The model is built without values. The sites are found and proved in the first block. The other blocks have to
       have the same modules and shapes.
    2. MACs and parameters are counted on the meta device.
    3. The units are scored, see `Criterion.needs`, and the plan is made for all blocks together.
    4. The model runs once on the example inputs. When the turn of a block comes, its weights are read. The block is
       cut, and it is proved that it computes what the gated dense block computes, on the inputs that it has in the
       pruned model. Then it computes the inputs of the next block, and is written and dropped.

    Fine-tuning is not possible in this way. Memory is needed for about two blocks and the embeddings.

    Args:
        directory: A folder that `save_pretrained` of transformers wrote: config.json and safetensors files.
        out: The folder for the pruned model: new, empty, or with an artefact, which is replaced.
        budget: How much the pruned model may cost, in MACs, parameters or another resource that is counted. None means
            half of the dense model's MACs. With round_to="auto", widths are not rounded, as on a CPU. Give a multiple
            such as 64 for a GPU.
        criterion: A name from `xprune.CRITERIA`, which may be followed by settings, or an instance. It must not need
            gradients.
        selection: A name from `xprune.SELECTIONS`, which may be followed by settings, or an instance. It must need no
            data.
        example_inputs: The inputs for the proof and for counting MACs: a tensor, a tuple of arguments, or a dict of
            keyword arguments. None means random tokens, for a model that reads `input_ids`.
        tokens: The length of the sequences of random tokens. MACs are counted for this length. The proof uses at most
            16 tokens of each sequence.
        loader: Batches for a criterion that runs the model. None means that there are no data.
        task: Reads the batches of the loader. An instance, or a name from `xprune.TASKS`. None means classification.
        units: The unit kinds to find, such as ["neuron"]. None means the kinds that `find_sites` finds by default.
            Kinds whose units lie in several blocks, such as "channel", are refused.
        exclude: Sites whose names match keep all units. One pattern or a list of patterns, such as "model.layers.0.*".
        blocks: The path of the list of blocks, such as "model.layers". None means that it is found.
        model_fn: A function without arguments that builds the dense model, for a model that is not part of
            transformers. Its parameters get no memory. None means that the model is built from config.json.
        max_shard_size: The largest size of a file of weights in bytes. A file is never larger than the largest block or
            tensor, because it is held in memory until it is written.
        seed: The seed of all random choices.

    Returns:
        The plan, the scores, the costs and the errors of the proofs.

    Raises:
        ArtefactError: `directory` holds no such model, or `out` cannot be used.
        ModelError: The model has no list of alike blocks, or its forward fails, or it has no sites.
        PluginError: The criterion needs gradients, or the selection needs data.
        BudgetError: No plan can meet the budget.
        SurgeryError: A block is not exact. Nothing is written then.

    Example:
        >>> import transformers, xprune
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> transformers.LlamaForCausalLM(config).save_pretrained("dense")
        >>> found = prune_folder("dense", "pruned", xprune.Budget(macs=0.8), tokens=8)
        >>> found.pruned["macs"] <= 0.8 * found.dense["macs"], max(found.errors) < 1e-4
        (True, True)
        >>> type(xprune.load("pruned")).__name__
        'LlamaForCausalLM'
    """
    out, budget = Path(out), _counted(budget or Budget(macs=0.5))
    chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
    selects: Selection = resolve(selection, SELECTIONS, Selection, "selection")
    refuse_gradients(chosen)
    if loader is not None:
        check_loader(loader)
    files.check_folder(out)
    opened = open_folder(directory, model_fn)
    _refuse(opened.model)
    listed = find_blocks(opened, blocks)
    inputs = counted = example_inputs
    if example_inputs is None:
        counted = _random_tokens(opened.model, tokens, seed)
        inputs = {name: tensor[:, :PROVED] for name, tensor in counted.items()}
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    found = find_in_blocks(opened, listed, inputs, None if units is None else list(units), patterns)
    gc.collect()
    costs = _costs(opened.model, found.sites, counted, budget, found.axis)
    # An impossible budget is refused before the weights are read.
    costs.limits(budget)
    named: Task = resolve(task or "classification", TASKS, Task, "task")
    context = Context(opened.model, inputs, named, loader, seed, None, budget, costs=costs)
    scores = score_blocks(chosen, opened, listed, found.sites, context)
    plan = _plan(context, scores, costs, budget, selects)
    pruned = remove_units(shared_copy(opened.model, device="meta"), plan, ADAPTERS)
    arch, why = proved_arch(pruned, plan, None)
    if arch is None:
        warnings.warn(
            f"the architecture is not saved: {why.rstrip('.')}. load({str(out)!r}) will need model_fn=, a function "
            "that builds the dense model.",
            stacklevel=3,
        )
    coverage = Coverage.of(costs, found.sites.left, found.sites.inside)
    header: dict[str, Any] = {"arch": arch.to_json() if arch else None, "plan": plan.to_json(), "ties": opened.ties}
    with files.new_artefact(out) as working:
        sizes = [_bytes(opened.model.get_submodule(listed.at(index))) for index in range(listed.count)]
        writer = ShardWriter(working, max(1, min(max_shard_size, max(sizes))))
        errors = _cut_and_write(opened, listed, plan, inputs, writer)
        for name, tensor in tensors(opened.model).items():
            if listed.index_of(name) is None and name not in opened.ties:
                # Buffers may share memory with each other, which a file cannot hold.
                writer.add(name, opened.stored[name] if tensor.is_meta else tensor.clone())
        header["extra"] = {
            "criterion": chosen.name,
            "selection": selects.name,
            "budget": budget.name,
            "seed": seed,
            "coverage": coverage.to_json(),
            "errors": errors,
        }
        files.write_header(working, header | writer.finish())
    return PrunedFolder(
        out,
        plan,
        scores,
        coverage,
        {name: cost.total([site.size for site in found.sites]) for name, cost in costs.by_resource.items()},
        dict(count_resources(pruned, counted, budget.limited, batch_axis=found.axis)),
        tuple(errors),
    )


def _counted(budget: Budget) -> Budget:
    """Returns the budget with round_to=1 in place of "auto", as on a CPU.

    Raises:
        BudgetError: The budget limits the latency.
    """
    if "latency" in budget.limited:
        raise BudgetError(
            "the latency of a model that is not in memory as a whole cannot be measured. Give a budget with macs= or "
            "params=."
        )
    return replace(budget, round_to=1) if budget.round_to == "auto" else budget


def _refuse(model: nn.Module) -> None:
    """Raises ModelError if a module is of a kind that cannot be cut or saved. The meta device is wanted here."""
    for path, module in model.named_modules():
        for kind in KINDS:
            detail = kind.find(path, module) if kind.name != "meta" else ""
            if detail:
                raise ModelError(kind.message(model, path, detail))


def _random_tokens(model: nn.Module, tokens: int, seed: int) -> dict[str, Any]:
    """Returns random tokens as the inputs of a language model. Raises ModelError for a model that reads no tokens."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or tokens < 1:
        raise ModelError(
            f"there are no inputs for {type(model).__name__}: give example_inputs=. Random tokens need a config with "
            f"vocab_size, which is {size!r}, and tokens= of at least 1, which is {tokens}."
        )
    return {"input_ids": torch.randint(size, (SAMPLES, tokens), generator=torch.Generator().manual_seed(seed))}


def _costs(model: nn.Module, sites: Any, inputs: Any, budget: Budget, axis: int) -> Costs:
    """Measures the costs on the meta device. Raises ModelError if the forward does not run there."""
    try:
        call(shared_copy(model, device="meta"), map_tensors(inputs, lambda tensor: tensor.to("meta")))
    except Exception as problem:
        raise ModelError(
            f"the costs of {type(model).__name__} cannot be counted without its weights: {error_text(problem)}. The "
            "forward reads the values of a tensor, perhaps those of attention_mask. Leave this input out of "
            "example_inputs if all its entries are 1."
        ) from problem
    return measure_costs(model, sites, inputs, budget.limited, batch_axis=axis)


def _plan(context: Context, scores: Scores, costs: Costs, budget: Budget, selection: Selection) -> Plan:
    """Calls the selection. Raises PluginError if it trains weights or reads data."""
    why = (
        f"{selection.name}: block by block, this selection cannot be used, because it trains or reads data. Give "
        "selection='global' or 'uniform', or load the whole model and prune it with xprune.Pruner."
    )
    try:
        found = selected(
            context.model,
            Context(context.model, context.example_inputs, context.task, costs=costs, seed=context.seed),
            scores,
            costs,
            budget,
            selection,
        )
    except DataError as error:
        raise PluginError(why) from error
    if found.model is not None:
        raise PluginError(why)
    return found.plan


def _cut_and_write(opened: Opened, blocks: Blocks, plan: Plan, inputs: Any, writer: ShardWriter) -> list[float]:
    """Runs the model once. Each block is cut, proved and written when its turn comes.

    Returns:
        The error of each block, see `PrunedFolder.errors`.
    """
    errors = [0.0] * blocks.count

    def turn(index: int, block: nn.Module, given: dict[str, Any]) -> Any:
        path = blocks.at(index)
        fill(block, opened.stored, path)
        alone = Alone(path, block)
        places = in_block(plan.sites, blocks, index)
        if places:
            own = Plan(tuple(plan.sites[place] for place in places), tuple(plan.keeps[place] for place in places))
            errors[index] = _prove(alone, own, given)
            # The tensors become smaller one after another, so that no second block is in memory.
            remove_units(alone, own, ADAPTERS, slice_of)
            make_whole(alone)
        output = alone.block(**given)
        for name, tensor in tensors(alone).items():
            writer.add(name, tensor if isinstance(tensor, nn.Parameter) else tensor.clone())
        empty(alone)
        # Otherwise the tensors of this block would be in memory together with the next one.
        if writer.held > writer.limit // 2:
            writer.flush()
        return output

    walk(opened.model, opened.stored, blocks, inputs, turn)
    return errors


def _prove(alone: Alone, plan: Plan, given: dict[str, Any]) -> float:
    """Proves that a block can be cut, on a copy that needs no memory for the cut tensors. Returns the error.

    Raises:
        SurgeryError: The block is not exact.
    """
    try:
        return verify(alone, remove_units(shared_copy(alone), plan, ADAPTERS, slice_of), plan, given)
    except SurgeryError as error:
        raise SurgeryError(f"the block {alone.path} is not exact: {error} Nothing was written.") from error
    finally:
        # The modules of the copies may refer to each other in circles, and they keep the whole tensors alive.
        gc.collect()


def _bytes(module: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers of a module, also if they are on the meta device."""
    return sum(tensor.nbytes for tensor in tensors(module).values())
