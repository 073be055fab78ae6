"""The libraries whose models are saved by name. Each says how to build one without weights. `LIBRARIES` is the table.

May import: core, modules, errors. To add one: a file with a `Library`, and a line in the table.
"""

from collections.abc import Mapping

from xprune.artefact.libraries.library import Library
from xprune.artefact.libraries.timm import TIMM
from xprune.artefact.libraries.transformers import TRANSFORMERS

LIBRARIES: Mapping[str, Library] = {library.name: library for library in (TIMM, TRANSFORMERS)}
"""Library by name."""
