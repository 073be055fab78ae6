"""The report: one HTML page that shows which units were removed, and why. It needs no network.

`collect` gathers the facts of a result. `findings` turns them into headings, `charts` into figures, and `page` puts all
of them into the template. `text` holds the tables for the terminal, and `plots` the pictures for papers.

May import: explain, artefact, core and all below them. To add a section, add its facts to `collect`, its chart to
`charts` and its place to the template.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from xprune.artefact.files import check_file, is_stamped, stamped
from xprune.core.record import Record
from xprune.errors import ModelError
from xprune.explain.curves import Named

NEEDED = ("jinja2", "matplotlib", "plotly")
"""Packages that a report needs, which the extra `report` installs."""


def write(
    result: Record,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    faithfulness: Named | None = None,
) -> Path:
    """Writes the HTML page of a result.

    Pictures of inputs need the dense model and the data, which `Pruner.run` puts into its result. A section without
    data is left out, or says why it is empty.

    Args:
        result: The result of a run.
        path: The file to write. A page that xprune wrote is replaced. Any other file is refused.
        classes: Names of the classes, by index. None: "class 0", "class 1" and so on.
        faithfulness: Curves to draw, each under a name such as "xpruner, contrast". A curve is a result of
            `xprune.explain.faithfulness`, or a mapping with three lists of one length: "fractions" of units deleted,
            and for each of them the accuracy of a class on its "own" samples and on the samples of "others".

    Returns:
        The path of the file.

    Raises:
        ModelError: A package of the extra `report` is not installed, or the class names or curves do not fit.
        ArtefactError: A file that xprune did not write is there.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ModelError(f"A report needs {', '.join(missing)}: pip install 'xprune[report]'.")
    # Imported here, because both need the packages of the extra.
    from xprune.report.collect import collect
    from xprune.report.page import render

    path = Path(path)
    check_file(path, is_stamped)
    # Rendered in full before the file is opened: an error leaves the old page as it was.
    page = render(collect(result, classes, faithfulness))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stamped(page), encoding="utf-8")
    return path
