"""The commands: prune, compare, evaluate, sites, show, report, export, list and demo.

Options have the names of the arguments in the Python API. The docstring of a command and the help of its options are
what `xprune COMMAND --help` shows.
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
    dense_costs,
    dense_model,
    example_images,
    limited,
    measured_data,
    named_data,
    named_model,
)
from xprune.comparison.plots import is_drawn
from xprune.core.plan import Plan
from xprune.data import class_names
from xprune.errors import ArtefactError, PlanError, XPruneError
from xprune.report.text import found_tables, metrics_table, sites_table, unseen
from xprune.surgery.cut import check_fit

app = typer.Typer(
    help="Structured pruning of transformers: removes attention heads, MLP neurons and channels, with a proof.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()

ModelName = Annotated[
    str, typer.Option("--model", help="Name of a timm model (also hf-hub:...), or a folder that xprune saved.")
]
DataName = Annotated[
    str, typer.Option("--data", help="Folder of images with train/ and val/, one folder per class, or a name: digits.")
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", help="Argument key=value of timm.create_model. Can be repeated.")
]
CRITERION = "Criterion, see `xprune list`. Settings follow after commas, as in xpruner,objective=label."
Saved = Annotated[Path, typer.Argument(help="Folder that xprune saved.")]
Batch = Annotated[int, typer.Option(help="Number of samples per batch.", min=1)]
Pretrained = Annotated[bool, typer.Option(help="Use timm's pretrained weights, which are downloaded once.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="File of your own weights (.safetensors), used instead of timm's.")
]
Workers = Annotated[int, typer.Option(help="Number of processes that load data.")]
Epochs = Annotated[int, typer.Option(help="Epochs of fine-tuning. 0 for none.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate of fine-tuning.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of the names of sites to leave alone, such as blocks.0.*. Can be repeated."),
]


@app.command()
def prune(
    model: ModelName,
    data: DataName,
    out: Annotated[Path, typer.Option(help="Folder to write. It has to be new, empty, or saved by xprune.")],
    criterion: Annotated[str, typer.Option(help=CRITERION)] = "xpruner",
    selection: Annotated[str, typer.Option(help="Selection, see `xprune list`.")] = "global",
    macs: Annotated[
        float | None, typer.Option(help="Largest fraction of the MACs to keep. 0.5 if no limit is given.")
    ] = None,
    params: Annotated[float | None, typer.Option(help="Largest fraction of the parameters to keep.")] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="RESOURCE=FRACTION for any resource of `xprune list`. Can be repeated."),
    ] = None,
    min_units: Annotated[int, typer.Option(help="Least number of units to keep at each site.")] = 1,
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this number of features at each site.")] = 1,
    units: Annotated[
        list[str] | None,
        typer.Option(help="Unit kind to prune, see `xprune list`. Can be repeated. Default: head and neuron."),
    ] = None,
    exclude: Exclude = None,
    epochs: Epochs = 5,
    lr: Rate = 2e-4,
    distill: Annotated[float, typer.Option(help="Weight of distillation from the dense model, 0 to 1.")] = 0.0,
    mixed_precision: Annotated[str | None, typer.Option(help="Precision of fine-tuning: no, fp16 or bf16.")] = None,
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Folder for the state of the run, from which a killed run continues.")
    ] = None,
    latency: Annotated[bool, typer.Option(help="Measure the latency of the dense and the pruned model.")] = True,
) -> None:
    """Prune a model to a budget, fine-tune it and save it."""
    check_folder(out)  # before hours of work, not after
    limits = dict(limited(text) for text in limit or ())
    macs = 0.5 if macs is None and params is None and not limits else macs
    budget = xprune.Budget(macs, params, min_units, round_to, limits)
    settings = (
        xprune.Finetune(epochs=epochs, lr=lr, distill=distill, mixed_precision=mixed_precision) if epochs else None
    )
    dense, arch = named_model(model, model_arg, pretrained, checkpoint)
    loaded = named_data(data, dense, batch_size, workers, seed)
    _say(loaded.note)
    pruner = xprune.Pruner(
        dense,
        criterion,
        budget,
        selection,
        settings,
        units=units or None,
        exclude=exclude or (),
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        latency=latency,
    )
    result = pruner.run(loaded.train, loaded.val)
    if _is_main_process():
        folder = _save(result, out, arch)
        console.print(sites_table(result.plan), metrics_table(result.metrics))
        _say(f"{unseen(result.scores)}Saved in {folder}")


@app.command()
def compare(
    model: ModelName,
    data: DataName,
    out: Annotated[
        Path,
        typer.Option(help="Folder of the results. Runs whose results are there are not repeated."),
    ],
    criterion: Annotated[list[str] | None, typer.Option(help=f"{CRITERION} Can be repeated. Default: all.")] = None,
    selection: Annotated[
        list[str] | None, typer.Option(help="Selection, see `xprune list`. Can be repeated. Default: global.")
    ] = None,
    macs: Annotated[
        list[float] | None,
        typer.Option(help="Largest fraction of the MACs to keep. Can be repeated. Default: 0.5."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds. Each run is repeated with seeds 0, 1 and so on.")] = 3,
    epochs: Epochs = 5,
    lr: Rate = 2e-4,
    exclude: Exclude = None,
    faithfulness: Annotated[
        bool, typer.Option(help="Measure whether class-wise scores name the units that each class needs.")
    ] = False,
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Compare criteria and selections at the same budgets, on the same data.

    Writes a table with means and spread over seeds, a picture, and a JSON file with all figures.
    """
    table, picture = out / "table.md", out / "accuracy.png"
    # Files of the user are refused before hours of work, not after.
    check_file(table, is_stamped)
    check_file(picture, is_drawn)
    dense, _ = named_model(model, model_arg, pretrained, checkpoint)
    loaded = named_data(data, dense, batch_size, workers, 0)
    _say(loaded.note)
    grid = xprune.Grid(
        {name: name for name in criterion or xprune.CRITERIA},
        {name: name for name in selection or ("global",)},
        tuple(xprune.Budget(macs=share) for share in macs or (0.5,)),
        tuple(range(seeds)),
        xprune.Finetune(epochs=epochs, lr=lr) if epochs else None,
        faithfulness=faithfulness,
    )
    case = xprune.Case(dense, loaded.train, loaded.val, exclude=exclude or ())
    comparison = xprune.compare(case, grid, out, model=model, data=data, batch_size=batch_size)
    if _is_main_process():
        table.write_text(stamped(comparison.markdown()))
        console.print(comparison.table())
        _say(f"Table, picture and figures are in {out}")
        comparison.plot(picture)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder that xprune saved, or the name of a timm model.")
    ],
    data: Annotated[
        str,
        typer.Option("--data", help="Folder of images with one folder per class, with or without val/, or: digits."),
    ],
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Measure the accuracy, cost and latency of a saved model or a dense one.

    If the data has splits, val/ is used, or test/ if there is no val/. Otherwise all images are used.
    """
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
def sites(model: ModelName, checkpoint: Checkpoint = None, model_arg: ModelArg = None) -> None:
    """List the sites of a model, and the modules that are left alone, with the reason.

    Nothing is downloaded: the weights are random, unless you give a checkpoint.
    """
    dense, _ = named_model(model, model_arg, checkpoint=checkpoint)
    example = example_images(dense, 2)
    console.print(*found_tables(xprune.find_sites(dense, example)))


@app.command()
def show(saved: Saved) -> None:
    """Show which units a saved model kept at each site, and its metrics when it was saved."""
    header = read_header(saved)
    arch = header["arch"]
    name = arch["name"] if arch else "the architecture is not saved, so xprune.load needs model_fn"
    console.print(f"{saved}: {name}", highlight=False)
    console.print(sites_table(Plan.from_json(header["plan"])))
    metrics = header["extra"].get("metrics")
    if metrics:
        console.print(f"criterion: {header['extra'].get('criterion')}")
        console.print(metrics_table({name: xprune.Metrics(**row) for name, row in metrics.items()}))


@app.command()
def report(
    saved: Saved,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: report.html in the saved folder.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data for pictures and class names, given as --data of `xprune prune`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Dense model for pictures, given as --model of `xprune prune`, without --model-arg."),
    ] = None,
    pretrained: Pretrained = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the weights of the dense model (.safetensors), for pictures.")
    ] = None,
    model_arg: ModelArg = None,
    faithfulness: Annotated[
        bool, typer.Option(help="Measure whether the scores name the units that each class needs.")
    ] = False,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Write an HTML page about a saved model: which units were removed, why, and the accuracy of each class."""
    if faithfulness and (data is None or (model is None and checkpoint is None)):
        raise typer.BadParameter(
            "--faithfulness needs data and the dense model. Give --data and one of --model and --checkpoint."
        )
    out = out or saved / REPORT
    check_file(out, is_stamped)
    result, names, curves = xprune.PruneResult.load(saved), None, None
    if data is not None:
        loaded = measured_data(data, result.model, batch_size, workers)
        names, result = class_names(loaded.loader), replace(result, data=loaded.loader, task=xprune.Classification())
        _say(loaded.note)
    dense = dense_model(saved, model, model_arg, pretrained, checkpoint)
    if dense is not None:
        # Pictures of another model than the dense one would be wrong without a sign of it.
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
    console.print(f"Report in {path}", highlight=False, soft_wrap=True)


@app.command()
def export(
    saved: Saved,
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    batch_size: Annotated[
        int, typer.Option(help="Number of samples of the example. The file takes any number of samples.")
    ] = 2,
) -> None:
    """Export a saved model to ONNX, and compare its outputs in onnxruntime with those of the model."""
    model = xprune.load(saved)
    example = example_images(model, batch_size)
    error = export_onnx(model, example, out)
    console.print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB. The largest difference in onnxruntime is {error:.1e}.",
        highlight=False,
        soft_wrap=True,
    )


@app.command(name="list")
def list_() -> None:
    """List the installed criteria, selections, adapters, unit kinds and resources."""
    for title in ("criteria", "selections", "adapters", "unit_kinds", "resources"):
        plugins: Mapping[str, Any] = getattr(xprune, title.upper())
        table = Table(title.replace("_", " "), "classes served" if title == "adapters" else "description")
        for name, plugin in plugins.items():
            # Adapters list their classes, other plug-ins have the first line of their docstring.
            about = ", ".join(getattr(plugin, "classes", ())) or (plugin.__doc__ or "").strip().partition("\n")[0]
            table.add_row(name, about)
        console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pruned model.")] = Path("demo-pruned"),
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the trained dense model, which later runs use again.")
    ] = None,
) -> None:
    """Train a small ViT on scanned digits, prune it to half of its MACs with each criterion, and compare them."""
    from xprune.cli.demo import run

    run(out, cache, console)


def _save(result: xprune.PruneResult, out: Path, arch: Any) -> Path:
    """Saves the result, and returns the folder.

    Somebody may have put other files into the folder while the model was pruned. The result is then saved in a new
    folder beside it, so that no work is lost.
    """
    try:
        check_folder(out)
    except ArtefactError as error:
        other = next(path for n in count(2) if not (path := out.with_name(f"{out.name}-{n}")).exists())
        _print_error(f"saved in {other} instead", error)
        out = other
    return result.save(out, arch=arch)


def _print_error(title: str, error: Exception) -> None:
    """Prints an error to stderr in one line. A path that is broken in two lines cannot be copied."""
    Console(stderr=True).print(f"[bold red]{title}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _say(note: str) -> None:
    """Prints a note in one line, on the main process only."""
    if _is_main_process():
        console.print(note, highlight=False, soft_wrap=True)


def _is_main_process() -> bool:
    """True in the first process of a run on several devices, and in a run with one process. False in the others."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Prints a warning to stderr without the line of code, which Python shows by default."""
    Console(stderr=True).print(f"[yellow]{category.__name__}:[/] {escape(str(message))}", highlight=False)


def main() -> None:
    """Runs the command line. Errors of xprune are one message and exit status 2, not a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except XPruneError as error:
        _print_error(type(error).__name__, error)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
