"""An extension of griffe, which reads docstrings for the site. It makes our docstrings readable as Markdown."""

import re
from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    """Changes what the site shows of a docstring. The source is not changed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(docstring: str) -> str:
    """The docstring with sections and indices as griffe and Markdown want them.

    griffe knows the section "Examples:" and shows its code as code. It takes "Example:" for a box with text. Markdown
    takes an index such as `rows[fraction][class]` for a link to "class". A link of mkdocstrings has a dotted name.
    """
    docstring = re.sub(r"^( *)Example:$", r"\1Examples:", docstring, flags=re.MULTILINE)
    return re.sub(r"\]\[(?=\w+\])", r"]\\[", docstring)
