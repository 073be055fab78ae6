"""The commands of xprune: prune, prune-folder, frontier, compare, evaluate, sites, show, report, export, list and demo.

Options have the same names as the arguments of the Python functions. `xprune COMMAND --help` prints the docstring of
the function and the help texts of its options.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import xprune
from xprune import explain
from xprune.artefact.files import REPORT, check_file, check_folder, is_stamped, stamped
from xprune.artefact.onnx import export_onnx
from xprune.artefact.save_load import read_header
from xprune.cli.inputs import (
    check_saved_task,
    dense_costs,
    dense_model,
    example_images,
    limited,
    measured_data,
    multiple,
    named_data,
    named_model,
    named_task,
    with_names,
)
from xprune.comparison.plots import is_drawn
from xprune.core.coverage import Coverage
from xprune.core.plan import Plan
from xprune.data import class_names
from xprune.errors import ArtefactError, PlanError, XPruneError
from xprune.report.gained import gain_note
from xprune.report.text import allowed_time_text, found_tables, metrics_table, part_text, sites_table, unseen
from xprune.surgery.cut import check_fit
from xprune.tradeoff.measure import ELASTIC
from xprune.tradeoff.points import is_frontier

app = typer.Typer(
    help="Removes attention heads, MLP neurons and channels from transformers, and proves each removal.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()

ModelName = Annotated[
    str,
    typer.Option("--model", help="Name of a timm model (also hf-hub:...), or a folder in which xprune saved a model."),
]
DataName = Annotated[
    str,
    typer.Option("--data", help="Folder of images with train/ and val/, or with one folder for each class. Or digits."),
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", help="Argument key=value for timm.create_model. Can be repeated.")
]
CRITERION = "Criterion that scores the units, see `xprune list`. Settings follow: xpruner,objective=label."
Saved = Annotated[Path, typer.Argument(help="Folder in which xprune saved a model.")]
Batch = Annotated[int, typer.Option(help="Number of samples in a batch.", min=1)]
Pretrained = Annotated[
    bool, typer.Option(help="Use the pretrained weights of timm, which are downloaded once. Otherwise random weights.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="File with your weights (.safetensors), which are used instead of those of timm.")
]
Workers = Annotated[int, typer.Option(help="Number of processes that load data.")]
Epochs = Annotated[int, typer.Option(help="Number of epochs of fine-tuning. 0 for no fine-tuning.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate of fine-tuning.")]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        help="Task of the model, see `xprune list`. Settings follow: embeddings,measure=similarity.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Pattern such as blocks.0.*: sites with such names keep all units. Can be repeated."),
]

Inside = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of module paths such as vision_model.*: only this part is pruned. Can be repeated."),
]
Of = Annotated[
    str, typer.Option(help="What the fractions are fractions of: model, or part for the part that --inside names.")
]
UnitKinds = Annotated[
    list[str] | None,
    typer.Option(help="Unit kind to prune, see `xprune list`. Can be repeated. Default: head and neuron."),
]
MinUnits = Annotated[int, typer.Option(help="Smallest number of units that each site keeps.")]
RoundTo = Annotated[
    str, typer.Option(help="The number of kept features of a site is a multiple of this. auto: as the device likes.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
TargetText = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Where the latency is meant: device, dtype, batch, compiled, threads or table, as in batch=1,threads=2.",
    ),
]


@app.command()
def prune(
    model: ModelName,
    data: DataName,
    out: Annotated[
        Path, typer.Option(help="Folder for the pruned model: new or empty. A model that xprune saved is replaced.")
    ],
    criterion: Annotated[str, typer.Option(help=CRITERION)] = "xpruner",
    selection: Annotated[str, typer.Option(help="Selection that makes the plan, see `xprune list`.")] = "global",
    macs: Annotated[
        float | None, typer.Option(help="Largest fraction of the MACs to keep. 0.5 if you give no limit.")
    ] = None,
    params: Annotated[float | None, typer.Option(help="Largest fraction of the parameters to keep.")] = None,
    latency_share: Annotated[
        float | None,
        typer.Option("--latency", help="Largest fraction of the time of a forward pass. The time is measured."),
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Longest time of a forward pass, in milliseconds.")] = None,
    target: TargetText = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="Largest fraction of a resource, RESOURCE=FRACTION, see `xprune list`. Can be repeated."),
    ] = None,
    min_units: MinUnits = 1,
    round_to: RoundTo = "auto",
    units: UnitKinds = None,
    exclude: Exclude = None,
    inside: Inside = None,
    of: Of = "model",
    task: TaskName = "classification",
    epochs: Epochs = 5,
    lr: Rate = 2e-4,
    distill: Annotated[
        float, typer.Option(help="Weight of the distillation loss, 0 to 1. 0 for no distillation.")
    ] = 0.0,
    mixed_precision: Annotated[str | None, typer.Option(help="Precision of fine-tuning: no, fp16 or bf16.")] = None,
    accumulate: Annotated[int, typer.Option(help="Number of batches for one update in fine-tuning.")] = 1,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Factor of the learning rate from each layer to the one before it. Default: equal rates."),
    ] = None,
    recompute_activations: Annotated[
        bool, typer.Option(help="Compute activations again in the backward pass of fine-tuning. Needs less memory.")
    ] = False,
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    seed: Seed = 0,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Folder for the state of the run. A killed run continues from this state.")
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Number of updates after which the state is written. Default: not counted.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(help="Number of minutes after which the state is written.")] = 10,
    timed: Annotated[
        bool,
        typer.Option("--measure-latency/--no-latency", help="Measure the latency of the dense and the pruned model."),
    ] = True,
) -> None:
    """Prune a model to a budget, fine-tune it and save it."""
    # The folder is checked before hours of work, and not after them.
    check_folder(out)
    limits = dict(limited(text) for text in limit or ())
    if (macs, params, latency_share, latency_ms) == (None, None, None, None) and not limits:
        macs = 0.5
    budget = xprune.Budget(
        macs,
        params,
        min_units,
        multiple(round_to),
        limits,
        of=of,
        latency=latency_share,
        latency_ms=latency_ms,
        target=target,
    )
    settings = None
    if epochs:
        settings = xprune.Finetune(
            epochs=epochs,
            lr=lr,
            distill=distill,
            mixed_precision=mixed_precision,
            accumulate=accumulate,
            layer_decay=layer_decay,
            recompute_activations=recompute_activations,
        )
    state = None
    if checkpoint_dir is not None:
        state = xprune.Checkpoint(checkpoint_dir, checkpoint_steps, checkpoint_minutes)
    chosen = named_task(task)
    dense, arch = named_model(model, model_arg, pretrained, checkpoint)
    loaded = named_data(data, dense, batch_size, workers, seed, chosen)
    _say(loaded.note)
    pruner = xprune.Pruner(
        dense,
        criterion,
        budget,
        selection,
        settings,
        with_names(chosen, class_names(loaded.train)),
        units=units or None,
        exclude=exclude or (),
        inside=inside or (),
        seed=seed,
        checkpoint_dir=state,
        latency=timed,
    )
    result = pruner.run(loaded.train, loaded.val)
    if _is_main_process():
        folder = _save(result, out, arch)
        console.print(sites_table(result.plan), metrics_table(result.metrics))
        lines = (gain_note(result.metrics, result.settings), part_text(result), allowed_time_text(result.plan))
        notes = "".join(f"{line}\n" for line in lines if line)
        _say(f"{notes}{unseen(result.scores, result.class_names)}Saved in {folder}")


@app.command()
def prune_folder(
    directory: Annotated[
        Path, typer.Argument(help="Folder that save_pretrained of transformers wrote: config.json and safetensors.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the pruned model: new or empty. A model that xprune saved is replaced.")
    ],
    criterion: Annotated[
        str, typer.Option(help="Criterion that scores the units: magnitude or random. Settings follow: magnitude,p=1.")
    ] = "magnitude",
    selection: Annotated[str, typer.Option(help="Selection that makes the plan: global or uniform.")] = "global",
    macs: Annotated[
        float | None, typer.Option(help="Largest fraction of the MACs to keep. 0.5 if you give no limit.")
    ] = None,
    params: Annotated[float | None, typer.Option(help="Largest fraction of the parameters to keep.")] = None,
    min_units: MinUnits = 1,
    round_to: Annotated[int, typer.Option(help="The number of kept features of a site is a multiple of this.")] = 1,
    units: Annotated[
        list[str] | None, typer.Option(help="Unit kind to prune. Can be repeated. Default: head and neuron.")
    ] = None,
    exclude: Exclude = None,
    blocks: Annotated[
        str | None, typer.Option(help="Path of the list of blocks, such as model.layers. Found if you give none.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the sequences for the proof and for counting MACs.")] = 128,
    shard_size: Annotated[float, typer.Option(help="Largest size of a file of weights, in GB.")] = 2.0,
    seed: Seed = 0,
) -> None:
    """Prune a language model that does not fit into memory, one block at a time, without fine-tuning."""
    budget = xprune.Budget(0.5 if macs is None and params is None else macs, params, min_units, round_to)
    found = xprune.prune_folder(
        directory,
        out,
        budget,
        criterion,
        selection,
        tokens=tokens,
        units=units or None,
        exclude=exclude or (),
        blocks=blocks,
        max_shard_size=round(shard_size * 1e9),
        seed=seed,
    )
    console.print(sites_table(found.plan))
    kept = ", ".join(f"{found.pruned[name] / cost:.1%} of the {name}" for name, cost in found.dense.items())
    _say(f"{found.coverage.text}\nThe pruned model has {kept}.\nSaved in {found.directory}")


@app.command()
def frontier(
    model: ModelName,
    data: DataName,
    out: Annotated[Path, typer.Option(help="Folder for frontier.json and frontier.html.")],
    resource: Annotated[str, typer.Option(help="Resource that the budgets limit, see `xprune list`.")] = "macs",
    criterion: Annotated[str, typer.Option(help=CRITERION)] = ELASTIC,
    selection: Annotated[str, typer.Option(help="Selection that makes the plans, see `xprune list`.")] = "global",
    share: Annotated[
        list[float] | None,
        typer.Option(help="Budget: a fraction of the dense model's cost. Can be repeated. Default: 0.9, 0.8 to 0.1."),
    ] = None,
    chance: Annotated[bool, typer.Option(help="Measure models with random scores too.")] = True,
    min_units: MinUnits = 1,
    round_to: RoundTo = "auto",
    units: UnitKinds = None,
    exclude: Exclude = None,
    inside: Inside = None,
    of: Of = "model",
    task: TaskName = "classification",
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    seed: Seed = 0,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Folder for the state of the scoring. A killed run continues from this state.")
    ] = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--measure-latency/--no-latency", help="Measure the latency of the dense model and of each pruned one."
        ),
    ] = True,
    target: TargetText = None,
) -> None:
    """Measure the accuracy of a model at many budgets, before you choose one.

    Scores the model once, then cuts it at each budget and measures it, without fine-tuning. Writes a table, a JSON file
    and an HTML page with an interactive picture.
    """
    table, page = out / "frontier.json", out / "frontier.html"
    # Files that xprune did not write are refused before the work, and not after it.
    check_file(table, is_frontier)
    check_file(page, is_stamped)
    chosen = named_task(task)
    dense, _ = named_model(model, model_arg, pretrained, checkpoint)
    loaded = named_data(data, dense, batch_size, workers, seed, chosen)
    _say(loaded.note)
    found = xprune.frontier(
        dense,
        loaded.train,
        loaded.val,
        resource=resource,
        criterion=criterion,
        selection=selection,
        points=share or None,
        chance=chance,
        task=chosen,
        units=units or None,
        exclude=exclude or (),
        inside=inside or (),
        min_units=min_units,
        round_to=multiple(round_to),
        of=of,
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        latency=timed,
        target=target,
    )
    if _is_main_process():
        console.print(found.table())
        for note in found.notes:
            _say(note)
        found.save(table)
        _say(f"The measured values are in {table}, the picture is in {found.report(page)}")


@app.command()
def compare(
    model: ModelName,
    data: DataName,
    out: Annotated[
        Path,
        typer.Option(help="Folder for the results. Combinations with results in this folder do not run again."),
    ],
    criterion: Annotated[list[str] | None, typer.Option(help=f"{CRITERION} Can be repeated. Default: all.")] = None,
    selection: Annotated[
        list[str] | None, typer.Option(help="Selection, see `xprune list`. Can be repeated. Default: global.")
    ] = None,
    macs: Annotated[
        list[float] | None,
        typer.Option(help="Largest fraction of the MACs to keep. Can be repeated. Default: 0.5."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds. Each combination runs with seeds 0, 1 and so on.")] = 3,
    epochs: Epochs = 5,
    lr: Rate = 2e-4,
    exclude: Exclude = None,
    inside: Inside = None,
    of: Of = "model",
    task: TaskName = "classification",
    faithfulness: Annotated[bool, typer.Option(help="Measure whether the class-wise scores are right.")] = False,
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Prune a model with each combination of criteria, selections, budgets and seeds, and compare the results.

    Writes a table of accuracies (mean and standard deviation over the seeds), a picture, and a JSON file.
    """
    table, picture = out / "table.md", out / "accuracy.png"
    # Files that xprune did not write are refused before hours of work, and not after them.
    check_file(table, is_stamped)
    check_file(picture, is_drawn)
    chosen = named_task(task)
    dense, _ = named_model(model, model_arg, pretrained, checkpoint)
    loaded = named_data(data, dense, batch_size, workers, 0, chosen)
    _say(loaded.note)
    grid = xprune.Grid(
        {name: name for name in criterion or xprune.CRITERIA},
        {name: name for name in selection or ("global",)},
        tuple(xprune.Budget(macs=share, of=of) for share in macs or (0.5,)),
        tuple(range(seeds)),
        xprune.Finetune(epochs=epochs, lr=lr) if epochs else None,
        task=chosen,
        faithfulness=faithfulness,
    )
    case = xprune.Case(dense, loaded.train, loaded.val, exclude=exclude or (), inside=inside or ())
    comparison = xprune.compare(case, grid, out, model=model, data=data, batch_size=batch_size)
    if _is_main_process():
        lines = "".join(f"\n{line}\n" for line in comparison.coverage())
        table.write_text(stamped(comparison.markdown() + lines))
        console.print(comparison.table())
        _say(f"The table, the picture and the measured values are in {out}")
        comparison.plot(picture)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder in which xprune saved a model, or name of a timm model.")
    ],
    data: Annotated[
        str,
        typer.Option("--data", help="Folder of images with val/, or with one folder for each class. Or digits."),
    ],
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Measure the accuracy, cost and latency of a saved model or of a timm model.

    Uses the images of val/, or of test/ if there is no val/. If the data has no such folders, uses all images.
    """
    check_saved_task(Path(model))
    net, arch = named_model(model, model_arg, pretrained, checkpoint)
    loaded = measured_data(data, net, batch_size, workers)
    inputs = next(iter(loaded.loader))[0]
    metrics = xprune.evaluate(net, loaded.loader, data=loaded.split).with_costs(
        **xprune.count_resources(net, inputs[:2]),
        latency_ms=xprune.latency(net, inputs),
        latency_rows=len(inputs),
    )
    if _is_main_process():
        dense = metrics.costs if arch else dense_costs(Path(model), inputs[:2])
        _say(loaded.note)
        console.print(metrics_table({Path(model).name: metrics}, dense))


@app.command()
def sites(model: ModelName, checkpoint: Checkpoint = None, model_arg: ModelArg = None, inside: Inside = None) -> None:
    """List the units that can be removed from a model, and the modules that are left alone, with the reason.

    Also prints which share of the model's MACs the units cover.

    Downloads nothing. If you give no checkpoint, the weights are random.
    """
    dense, _ = named_model(model, model_arg, checkpoint=checkpoint)
    example = example_images(dense, 2)
    found = xprune.find_sites(dense, example, inside=inside or ())
    console.print(*found_tables(found))
    try:
        _say(Coverage.of(xprune.measure_costs(dense, found, example), found.left, found.inside).text)
    except XPruneError as error:
        # The tables are right even if the costs of the model cannot be measured.
        _say(f"{Coverage(None, len(found), found.left, found.inside).text} The share is not known: {error}")


@app.command()
def profile(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="File for the table, such as table.json.")],
    target: TargetText = None,
    units: Annotated[list[str] | None, typer.Option(help="Unit kind to measure. Can be repeated.")] = None,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
) -> None:
    """Measure a latency table: how long each site of a model takes with fewer units, on this computer.

    Another computer can prune for this one with it: xprune prune --latency 0.5 --target table=table.json.

    Downloads nothing. If you give no checkpoint, the weights are random, which does not change the times.
    """
    dense, _ = named_model(model, model_arg, checkpoint=checkpoint)
    table = xprune.profile(dense, example_images(dense, 2), target, units=units or None)
    table.save(out)
    _say(
        f"{table.dense_ms:.1f} ms for a forward pass of the dense model ({table.target.name}). Measured in "
        f"{table.seconds:.0f} s. The table is in {out}"
    )


@app.command()
def show(saved: Saved) -> None:
    """Print the kept units of each site of a saved model, and the metrics, gain and coverage measured in its run."""
    header = read_header(saved)
    arch = header["arch"]
    name = arch["name"] if arch else "the architecture was not saved, so xprune.load needs model_fn"
    console.print(f"{saved}: {name}", highlight=False)
    console.print(sites_table(Plan.from_json(header["plan"])))
    metrics = {name: xprune.Metrics(**row) for name, row in (header["extra"].get("metrics") or {}).items()}
    if metrics:
        console.print(f"criterion: {header['extra'].get('criterion')}")
        console.print(metrics_table(metrics))
        if note := gain_note(metrics, header["extra"].get("settings")):
            _say(note)
    # Files of older releases have no coverage.
    if header["extra"].get("coverage") is not None:
        _say(Coverage.from_json(header["extra"]["coverage"]).text)


@app.command()
def report(
    saved: Saved,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: report.html in the folder of the model.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data for pictures and class names, as for `xprune prune`.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Dense model for pictures, as for `xprune prune`. You need no --model-arg."),
    ] = None,
    pretrained: Pretrained = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the weights of the dense model (.safetensors), for pictures.")
    ] = None,
    model_arg: ModelArg = None,
    faithfulness: Annotated[
        bool, typer.Option(help="Measure whether the class-wise scores are right. Needs data and the dense model.")
    ] = False,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Write an HTML page about a saved model: which units were removed and why, and the accuracy of each class."""
    if faithfulness and (data is None or (model is None and checkpoint is None)):
        raise typer.BadParameter(
            "--faithfulness needs data and the dense model. Give --data and one of --model and --checkpoint."
        )
    out = out or saved / REPORT
    check_file(out, is_stamped)
    result, names, curves = xprune.PruneResult.load(saved), None, None
    if data is not None:
        check_saved_task(saved)
        loaded = measured_data(data, result.model, batch_size, workers)
        names, result = class_names(loaded.loader), replace(result, data=loaded.loader, task=xprune.Classification())
        _say(loaded.note)
    dense = dense_model(saved, model, model_arg, pretrained, checkpoint)
    if dense is not None:
        # Pictures of a wrong dense model would be wrong, and nobody would notice.
        try:
            for site in result.plan.sites:
                check_fit(dense, site, xprune.ADAPTERS)
        except PlanError as error:
            raise PlanError(
                f"{error} If this model was pruned from a model that xprune had saved, give that folder as --model."
            ) from error
        result = replace(result, dense=dense)
    if faithfulness and dense is not None:
        curves = {
            order: explain.faithfulness(dense, result.scores, loaded.loader, order=order) for order in explain.ORDERS
        }
    path = result.report(out, classes=names, faithfulness=curves)
    if result.coverage is not None:
        _say(result.coverage.text)
    console.print(f"Report in {path}", highlight=False, soft_wrap=True)


@app.command()
def export(
    saved: Saved,
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    batch_size: Annotated[
        int, typer.Option(help="Number of samples in the example inputs. The file accepts any number of samples.")
    ] = 2,
) -> None:
    """Write a saved model as an ONNX file, and compare its outputs in onnxruntime with those of PyTorch."""
    model = xprune.load(saved)
    example = example_images(model, batch_size)
    error = export_onnx(model, example, out)
    console.print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB. The outputs in onnxruntime differ by at most {error:.1e}.",
        highlight=False,
        soft_wrap=True,
    )


@app.command(name="list")
def list_() -> None:
    """List the installed criteria, selections, tasks, adapters, unit kinds and resources."""
    for title in ("criteria", "selections", "tasks", "adapters", "unit_kinds", "resources"):
        plugins: Mapping[str, Any] = getattr(xprune, title.upper())
        table = Table(title.replace("_", " "), "classes" if title == "adapters" else "description")
        for name, plugin in plugins.items():
            # The table lists the classes of an adapter. For another plug-in, it shows the first line of the docstring.
            about = ", ".join(plugin.classes) if title == "adapters" and hasattr(plugin, "classes") else ""
            about = about or (plugin.__doc__ or "").strip().partition("\n")[0]
            table.add_row(name, about)
        console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pruned model. The report is written beside it.")] = Path(
        "demo-pruned"
    ),
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the trained dense model. Later runs read it from there.")
    ] = None,
) -> None:
    """Train a small ViT on scanned digits, prune it to half of its MACs with each criterion, and compare them."""
    from xprune.cli.demo import run

    run(out, cache, console)


def _save(result: xprune.PruneResult, out: Path, arch: Any) -> Path:
    """Saves the result in the folder `out`, and returns the folder.

    While the model was pruned, the user may have put other files into the folder. Then the result is saved in a new
    folder with a similar name, so that no work is lost.
    """
    try:
        check_folder(out)
    except ArtefactError as error:
        other = next(path for n in count(2) if not (path := out.with_name(f"{out.name}-{n}")).exists())
        _print_error(f"saved in {other} instead", error)
        out = other
    return result.save(out, arch=arch)


def _print_error(title: str, error: Exception) -> None:
    """Prints an error to stderr without line breaks, so that a path in it can be copied."""
    Console(stderr=True).print(f"[bold red]{title}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _say(note: str) -> None:
    """Prints a note without line breaks, if this is the main process."""
    if _is_main_process():
        # Without markup, because a pattern such as layers.[01].* would be read as a colour.
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _is_main_process() -> bool:
    """Returns True if this is the first process of several, or the only one. False in the other processes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Prints a warning to stderr. Unlike Python, it does not print the line of code that caused the warning."""
    Console(stderr=True).print(f"[yellow]{category.__name__}:[/] {escape(str(message))}", highlight=False)


def main() -> None:
    """Runs the command line. Prints an error of xprune as one message, without a traceback, and exits with status 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except XPruneError as error:
        _print_error(type(error).__name__, error)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
