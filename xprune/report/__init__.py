"""One HTML page that says what was cut and why. It is readable without network, on a phone and on paper.

May import: explain, artefact, core and all below them. A new section is facts in `collect`, a chart in `charts` and a
place in the template. `text` holds the tables for the terminal, `plots` the pictures for papers.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from xprune.artefact.files import check_file, is_stamped, stamped
from xprune.core.record import Record
from xprune.errors import ModelError
from xprune.explain.curves import Named

NEEDED = ("jinja2", "matplotlib", "plotly")


def write(
    result: Record,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    faithfulness: Named | None = None,
) -> Path:
    """Writes the page of a result.

    Pictures of inputs need the dense model and the data in the result. A section whose data is not there is left out,
    or says why.

    Args:
        result: The result of a run.
        path: The file to write. A page that xprune wrote there before is replaced, any other file is refused.
        classes: Names by index. None: numbers.
        faithfulness: By name (a criterion, an order) what `xprune.explain.faithfulness` gave; or curves: "fractions" of
            units deleted, the accuracy of a class on its "own" samples and on the "others", one a fraction each.

    Returns:
        The path.

    Raises:
        ModelError: The extra `report` is not installed, or names or curves do not fit.
        ArtefactError: Another file is there.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ModelError(f"a report needs {', '.join(missing)}: pip install 'xprune[report]'.")
    from xprune.report.collect import collect
    from xprune.report.page import render

    path = Path(path)
    check_file(path, is_stamped)
    page = render(collect(result, classes, faithfulness))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stamped(page), encoding="utf-8")
    return path
