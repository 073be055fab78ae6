"""The report: one HTML page that shows which units were removed, and why. It opens without an internet connection.

`collect` reads a result and returns plain data, the facts. From the facts, `findings` makes the headings and `charts`
makes the charts. `page` puts facts, headings and charts into the HTML template. `text` makes the tables for the
terminal, and `plots` makes pictures for papers.

May import: explain, artefact, core and all below them. To add a section, add its facts to `collect`, its chart to
`charts` and its HTML to the template.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from xprune.artefact.files import check_file, is_stamped, stamped
from xprune.core.record import Record
from xprune.errors import ModelError
from xprune.explain.curves import Named

NEEDED = ("jinja2", "matplotlib", "plotly")
"""The packages that a report needs. The extra `report` installs them."""


def write(
    result: Record,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    faithfulness: Named | None = None,
) -> Path:
    """Writes the HTML report of a result to a file.

    Pictures of inputs need the dense model and the data. The result of `Pruner.run` holds both, and a result that was
    loaded from a folder holds neither. If the data for a section are missing, the page leaves the section out, or the
    section says why it is empty.

    Args:
        result: The result of a run.
        path: The file to write. If xprune wrote the file before, it is replaced. If any other file is there, an error
            is raised.
        classes: Names of the classes, in the order of the class indices. None: the names that the task of the run
            has. If it has none, they are "class 0", "class 1" and so on.
        faithfulness: Mapping from a name, such as "xpruner, contrast", to the curves to draw. The curves are a result
            of `xprune.explain.faithfulness`, or a mapping with three lists of the same length: "fractions" holds the
            fractions of deleted units. For each fraction, "own" holds the accuracy on samples of the class, and
            "others" the accuracy on samples of other classes. None: the page has no section on faithfulness.

    Returns:
        The path of the file.

    Raises:
        ModelError: A package of the extra `report` is not installed. Or there are fewer names than classes. Or curves
            have another form.
        ArtefactError: The file exists and xprune did not write it.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ModelError(f"A report needs {', '.join(missing)}: pip install 'xprune[report]'.")
    # These imports are not at the top, because both modules need the packages of the extra.
    from xprune.report.collect import collect
    from xprune.report.page import render

    path = Path(path)
    check_file(path, is_stamped)
    # The page is rendered before the file is opened, so after an error the old page is unchanged.
    page = render(collect(result, classes, faithfulness))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stamped(page), encoding="utf-8")
    return path
