"""Measures what xprune can do with every model of a library, and sums it up.

`python -m benchmarks.prunability --library transformers` calls `sweep`. `benchmarks/model_rows.py` describes a row.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.children import Report, in_children
from benchmarks.record import RESULTS, record

LIBRARIES = ("transformers", "timm", "torchvision", "pyg", "own")
NO_ATTENTION = "it has no attention"


def builders(library: str) -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Returns name -> a function that builds (model, example inputs), for all models of a library.

    Args:
        library: One of LIBRARIES. "own" stands for models that are written by hand.
    """
    if library == "transformers":
        from benchmarks.transformers_models import TYPES, build

        return {name: partial(_two, build, name) for name in TYPES}
    from benchmarks import zoo

    if library == "own":
        own = {name: build for name, build in zoo.BUILDERS.items() if name.startswith("torch encoder")}
        try:
            from benchmarks.own_models import ZOO  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            return own
        return own | {name: each.build for name, each in ZOO.items()}
    chosen = {
        "timm": zoo.TIMM,
        "torchvision": [f"torchvision {name}" for name in zoo.TORCHVISION],
        "pyg": [name for name in zoo.BUILDERS if name.startswith("pyg ")],
    }
    return {name: zoo.BUILDERS[name] for name in chosen[library]}


def _two(build: Callable[[str], Any], name: str) -> tuple[nn.Module, Any]:
    built = build(name)
    return built.model, built.inputs


def _work(library: str, made: Mapping[str, Callable[[], tuple[nn.Module, Any]]], name: str, report: Report) -> None:
    """Measures one model. It runs in a child process."""
    from benchmarks.model_rows import measure

    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"type": name, "library": library, "step": "build"}
    report(row)
    try:
        measure(row, made[name], report)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        if type(error).__name__ == "NotBuilt":
            report({"type": name, "library": library, "not built": text})
        else:
            report(row | {"died": f"{type(error).__name__}: {text}"})


def _prepare(library: str) -> None:
    """Imports what every child needs, so that no child has to."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    import torch_pruning  # noqa: F401

    import benchmarks.model_rows  # noqa: F401

    if library == "transformers":
        import transformers
        import transformers.generation
        import transformers.modeling_utils

        transformers.logging.set_verbosity_error()
        transformers.generation.GenerationMixin  # noqa: B018


def sweep(library: str, only: str, jobs: int, seconds: int, gigabytes: int, rows_file: Path | None) -> None:
    """Measures the models of a library and records docs/results/prunability-LIBRARY.json and .md.

    Args:
        library: One of LIBRARIES.
        only: Only names that contain this text, or that equal one of these names, separated by commas. The others keep
            their rows.
        jobs: How many models are measured at the same time.
        seconds: The time limit of a model.
        gigabytes: The limit of the address space of a model.
        rows_file: If it is given, the rows are written to this file, one line of JSON each, and nothing is recorded.
    """
    _prepare(library)
    made = builders(library)
    wanted = only.split(",") if "," in only else []
    names = [name for name in made if (name in wanted if wanted else only in name)]
    if not names:
        raise SystemExit(f"The name of no model of {library} contains {only!r}. Some names: {', '.join([*made][:20])}.")
    rows = []
    for row in in_children(names, partial(_work, library, made), jobs, seconds, gigabytes):
        rows.append(row)
        print(f"{len(rows)}/{len(names)} {line(row)}", flush=True)
        if rows_file:
            with rows_file.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if rows_file:
        print("\n".join(summary(rows)))
        return
    target = RESULTS / f"prunability-{library}.json"
    before = json.loads(target.read_text())["rows"] if target.is_file() else []
    rows += [row for row in before if row["type"] not in names and row["type"] in made]
    rows.sort(key=lambda row: list(made).index(row["type"]))
    about = f"models of {library}: which attentions and MLPs are found, and whether the pruned models are exact"
    text = markdown(rows)
    _record(f"prunability-{library}", rows, about, seconds=seconds, gigabytes=gigabytes)
    target.with_suffix(".md").write_text(text + "\n")
    print("\n".join(summary(rows)))


def _record(name: str, rows: list[dict[str, Any]], about: str, **settings: Any) -> None:
    """Records the rows. The table that `record` prints gets short lines, the file gets everything."""
    file = record(name, [{"type": row["type"], "result": verdict(row)} for row in rows], about, **settings)
    report = json.loads(file.read_text())
    report["summary"] = summary(rows)
    report["rows"] = rows
    file.write_text(json.dumps(report, indent=1) + "\n")


def verdict(row: Mapping[str, Any]) -> str:
    """Returns one word or two for a row.

    - "exact": all expected attentions and MLPs have sites, and all plans are exact.
    - "partly": all plans are exact, and some attention or MLP has no site.
    - "wrong", "refused", "error", "timeout": the worst thing that happened.
    - "not built", "no units": not counted.
    """
    if "not built" in row:
        return "not built"
    if row.get("timeout"):
        return "timeout"
    results = [each["result"] for each in row.get("plans", {}).values()]
    if "wrong" in results:
        return "wrong"
    if row.get("foreign") or "died" in row:
        return "error"
    counts = [row.get("attentions", {}), row.get("mlps", {})]
    if not any(each.get("expected") for each in counts):
        return "no units"
    if "refused" in row or "refused" in results or not results:
        return "refused"
    return "exact" if all(each["exact"] == each["expected"] for each in counts) else "partly"


def line(row: Mapping[str, Any]) -> str:
    """Returns one line about a row, for the log."""
    if "not built" in row:
        return f"{row['type']}: not built: {row['not built'][:120]}"
    parts = [f"{row['type']} ({row.get('class', '')}): {verdict(row)}"]
    for key in ("attentions", "mlps"):
        if key in row:
            parts.append(f"{key} {row[key]['exact']}/{row[key]['found']}/{row[key]['expected']}")
    parts += [f"{key}: {row[key][:70]}" for key in ("saved", "generated") if row.get(key)]
    reasons = [each["reason"] for each in row.get("plans", {}).values() if each.get("reason")]
    parts += [
        str(each)[:160] for each in [row.get("refused"), row.get("died"), *row.get("foreign", []), *reasons] if each
    ]
    return f"{'; '.join(parts)}; {row['seconds']} s"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the sums over the rows, one sentence each."""
    built = [row for row in rows if "not built" not in row]
    verdicts = Counter(verdict(row) for row in rows)
    counted = [row for row in built if row.get("attentions")]

    def total(key: str, what: str) -> int:
        return sum(row[key][what] for row in counted)

    said = [row["saved"] for row in built if row.get("saved")]
    made = [row["generated"] for row in built if row.get("generated")]
    made = [text for text in made if not text.startswith("the dense model does not")]
    plans = Counter(each["result"] for row in built for each in row.get("plans", {}).values())
    return [
        f"{len(rows)} types, {len(built)} built: " + ", ".join(f"{n} {word}" for word, n in verdicts.most_common()),
        *(
            f"{key}: {total(key, 'exact')} of {total(key, 'expected')} found and exact, {total(key, 'found')} found"
            for key in ("attentions", "mlps")
        ),
        "plans: " + ", ".join(f"{n} {word}" for word, n in plans.most_common()),
        f"errors that are not of xprune: {sum(bool(row.get('foreign') or 'died' in row) for row in built)} types; "
        f"timeouts: {sum(bool(row.get('timeout')) for row in built)} types",
        f"saved and loaded without arch: {said.count('exact')} of {len(said)}",
        f"generates what the gated dense model generates: {made.count('equal')} of {len(made)}",
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the sums, the lists of types by verdict, and a table with one line for each type."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(verdict(row), []).append(row["type"])
    order = ("exact", "partly", "refused", "wrong", "error", "timeout", "no units", "not built")
    lists = [f"**{word}** ({len(groups[word])}): {', '.join(groups[word])}" for word in order if word in groups]
    table = ["| type | class | result | attentions | MLPs | saved | generates | reason |", "| --- " * 8 + "|"]
    for row in rows:
        if "not built" in row:
            cells = [row["type"], "", "not built", "", "", "", "", row["not built"]]
        else:
            counts = [
                f"{row[k]['exact']} of {row[k]['expected']}" if row.get(k) else "" for k in ("attentions", "mlps")
            ]
            saved, made = row.get("saved", ""), row.get("generated", "")
            cells = [
                row["type"], row.get("class", ""), verdict(row), *counts,
                "yes" if saved == "exact" else "no" if saved else "",
                "equal" if made == "equal" else "no" if made else "",
                first_reason(row),
            ]  # fmt: skip
        table.append("| " + " | ".join(str(each).replace("|", "/").replace("\n", " ")[:200] for each in cells) + " |")
    return "\n\n".join(["\n".join(f"- {each}" for each in summary(rows)), *lists, "\n".join(table)])


def first_reason(row: Mapping[str, Any]) -> str:
    """Returns the first reason why a row is not exact, or ""."""
    reasons = [each["reason"] for each in row.get("plans", {}).values() if each.get("reason")]
    missing = [f"{path}: {why}" for path, why in row.get("missing", {}).items()]
    return next(
        (each for each in [row.get("died"), *row.get("foreign", []), row.get("refused"), *reasons, *missing] if each),
        "",
    )
