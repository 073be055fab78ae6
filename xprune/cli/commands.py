"""The command line: prune, compare, evaluate, sites, show, report, export, list, demo, in the words of the API."""

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
    help="Structured pruning of transformers: exact, or refused.", no_args_is_help=True, add_completion=False
)
console = Console()

ModelName = Annotated[
    str, typer.Option("--model", help="timm name (also hf-hub:...), or a directory that xprune saved")
]
DataName = Annotated[str, typer.Option("--data", help="an ImageFolder (train/ and val/), or a known name: digits")]
ModelArg = Annotated[list[str] | None, typer.Option("--model-arg", help="key=value for timm.create_model, repeatable")]
CRITERION = "see `xprune list`; settings behind commas: xpruner,objective=label"
Saved = Annotated[Path, typer.Argument(help="a directory that xprune saved")]
Batch = Annotated[int, typer.Option(help="samples a batch", min=1)]
Pretrained = Annotated[bool, typer.Option(help="timm's weights, downloaded once")]
Checkpoint = Annotated[Path | None, typer.Option(help="your weights (.safetensors) instead")]
Workers = Annotated[int, typer.Option(help="processes that load data")]


@app.command()
def prune(
    model: ModelName,
    data: DataName,
    out: Annotated[Path, typer.Option(help="directory to write")],
    criterion: Annotated[str, typer.Option(help=CRITERION)] = "xpruner",
    selection: Annotated[str, typer.Option(help="see `xprune list`")] = "global",
    macs: Annotated[float | None, typer.Option(help="fraction of the MACs; 0.5 where neither is given")] = None,
    params: Annotated[float | None, typer.Option(help="fraction of the parameters")] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="RESOURCE=FRACTION of any resource of `xprune list`, repeatable")
    ] = None,
    min_units: Annotated[int, typer.Option(help="units that stay at every site")] = 1,
    round_to: Annotated[int, typer.Option(help="kept features of a site are a multiple of this")] = 1,
    units: Annotated[
        list[str] | None, typer.Option(help="see `xprune list`; repeatable, default head and neuron")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="pattern of site names to leave alone, repeatable")] = None,
    epochs: Annotated[int, typer.Option(help="of fine-tuning, 0 for none")] = 5,
    lr: Annotated[float, typer.Option(help="peak learning rate of fine-tuning")] = 2e-4,
    distill: Annotated[float, typer.Option(help="weight of distillation from the dense model, 0 to 1")] = 0.0,
    mixed_precision: Annotated[str | None, typer.Option(help="no, fp16, bf16")] = None,
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    seed: int = 0,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="where a killed run goes on from")] = None,
    latency: Annotated[bool, typer.Option(help="time the dense and the pruned model")] = True,
) -> None:
    """Prune a model to a budget, fine-tune it, and save it."""
    check_folder(out)
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
        _say(f"{unseen(result.scores)}saved in {folder}")


@app.command()
def compare(
    model: ModelName,
    data: DataName,
    out: Annotated[
        Path,
        typer.Option(help="directory of the results; cells that are there are not run again"),
    ],
    criterion: Annotated[list[str] | None, typer.Option(help=CRITERION + "; repeatable, default all")] = None,
    selection: Annotated[list[str] | None, typer.Option(help="repeatable, default global")] = None,
    macs: Annotated[list[float] | None, typer.Option(help="fraction of the MACs; repeatable, default 0.5")] = None,
    seeds: Annotated[int, typer.Option(help="each cell is run for the seeds 0, 1, ...")] = 3,
    epochs: Annotated[int, typer.Option(help="of fine-tuning, 0 for none")] = 5,
    lr: Annotated[float, typer.Option(help="peak learning rate of fine-tuning")] = 2e-4,
    exclude: Annotated[list[str] | None, typer.Option(help="pattern of site names to leave alone, repeatable")] = None,
    faithfulness: Annotated[bool, typer.Option(help="measure what class-wise scores say of classes")] = False,
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Compare criteria and selections on the same terms: one table with spread, one picture, one JSON file."""
    table, picture = out / "table.md", out / "accuracy.png"
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
        _say(f"table, picture and figures are in {out}")
        comparison.plot(picture)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a directory that xprune saved, or a timm name")],
    data: Annotated[str, typer.Option("--data", help="an ImageFolder, or a known name: digits")],
    pretrained: Pretrained = True,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Measure a saved model, or a dense one.

    Of a folder with splits on val/, or on test/ where there is no val/. Of a folder with one folder a class on all
    images.
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
    """What of a model can go, and what is left alone and why. Nothing is downloaded: weights are yours or random."""
    dense, _ = named_model(model, model_arg, checkpoint=checkpoint)
    example = example_images(dense, 2)
    console.print(*found_tables(xprune.find_sites(dense, example)))


@app.command()
def show(saved: Saved) -> None:
    """What went where, and what the model measured when it was saved."""
    header = read_header(saved)
    arch = header["arch"]
    name = arch["name"] if arch else "architecture not saved, load needs model_fn"
    console.print(f"{saved}: {name}", highlight=False)
    console.print(sites_table(Plan.from_json(header["plan"])))
    metrics = header["extra"].get("metrics")
    if metrics:
        console.print(f"criterion: {header['extra'].get('criterion')}")
        console.print(metrics_table({name: xprune.Metrics(**row) for name, row in metrics.items()}))


@app.command()
def report(
    saved: Saved,
    out: Annotated[Path | None, typer.Option(help="the page to write; default: report.html in the directory")] = None,
    data: Annotated[str | None, typer.Option(help="for pictures and class names: as --data of prune")] = None,
    model: Annotated[
        str | None, typer.Option(help="for pictures: the dense model, as --model of prune; its arguments are known")
    ] = None,
    pretrained: Pretrained = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="for pictures: the dense model's weights (.safetensors)")
    ] = None,
    model_arg: ModelArg = None,
    faithfulness: Annotated[bool, typer.Option(help="measure on --data what scores say of --model")] = False,
    batch_size: Batch = 64,
    workers: Workers = 0,
) -> None:
    """Write one HTML page: what was cut, why, and what it did to each class."""
    if faithfulness and (data is None or (model is None and checkpoint is None)):
        raise typer.BadParameter(
            "--faithfulness is measured on --data with the dense model, from --model or --checkpoint: give both."
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
        try:
            for site in result.plan.sites:
                check_fit(dense, site, xprune.ADAPTERS)
        except PlanError as error:
            raise PlanError(
                f"{error} If this model was pruned from one that xprune had saved, give that folder as --model."
            ) from error
        result = replace(result, dense=dense)
    if faithfulness and dense is not None:
        curves = {
            order: explain.faithfulness(dense, result.scores, loaded.loader, order=order) for order in explain.ORDERS
        }
    path = result.report(out, classes=names, faithfulness=curves)
    console.print(f"report in {path}", highlight=False, soft_wrap=True)


@app.command()
def export(
    saved: Saved,
    out: Annotated[Path, typer.Option(help="the .onnx file to write")],
    batch_size: Annotated[int, typer.Option(help="rows of the example; the file takes any number")] = 2,
) -> None:
    """Write ONNX, with the outputs compared in onnxruntime."""
    model = xprune.load(saved)
    example = example_images(model, batch_size)
    error = export_onnx(model, example, out)
    console.print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, onnxruntime agrees within {error:.1e}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(name="list")
def list_() -> None:
    """The criteria, selections, adapters, kinds of unit and resources that are installed."""
    for title in ("criteria", "selections", "adapters", "unit_kinds", "resources"):
        plugins: Mapping[str, Any] = getattr(xprune, title.upper())
        table = Table(title.replace("_", " "), "what it is")
        for name, plugin in plugins.items():
            about = ", ".join(getattr(plugin, "classes", ())) or (plugin.__doc__ or "").strip().partition("\n")[0]
            table.add_row(name, about)
        console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the pruned model goes")] = Path("demo-pruned"),
    cache: Annotated[Path | None, typer.Option(help="where the dense model is kept between runs")] = None,
) -> None:
    """Train a small ViT on scanned digits, prune it to half its MACs with every criterion, and compare."""
    from xprune.cli.demo import run

    run(out, cache, console)


def _save(result: xprune.PruneResult, out: Path, arch: Any) -> Path:
    """Saves the result. Where the folder has meanwhile got what is not ours, beside it: no work is lost."""
    try:
        check_folder(out)
    except ArtefactError as error:
        beside = next(path for n in count(2) if not (path := out.with_name(f"{out.name}-{n}")).exists())
        _complain(f"saved in {beside} instead", error)
        out = beside
    return result.save(out, arch=arch)


def _complain(title: str, error: Exception) -> None:
    """Prints an error in one line: a path that is broken in the middle cannot be copied."""
    Console(stderr=True).print(f"[bold red]{title}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _say(note: str) -> None:
    if _is_main_process():
        console.print(note, highlight=False, soft_wrap=True)


def _is_main_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    Console(stderr=True).print(f"[yellow]{category.__name__}:[/] {escape(str(message))}", highlight=False)


def main() -> None:
    """The command line, with errors and warnings as one message, not a traceback or a line of code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except XPruneError as error:
        _complain(type(error).__name__, error)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
