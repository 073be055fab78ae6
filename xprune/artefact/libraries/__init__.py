"""The libraries whose models are saved by name. Each one says how to build a model without weights.

May import: core, modules, errors. To add a library, write a file with a `Library` and add a line to the table.
"""

from collections.abc import Mapping

from xprune.artefact.libraries.library import Library
from xprune.artefact.libraries.timm import TIMM
from xprune.artefact.libraries.transformers import TRANSFORMERS

LIBRARIES: Mapping[str, Library] = {library.name: library for library in (TIMM, TRANSFORMERS)}
"""Library by the name that a header holds."""
