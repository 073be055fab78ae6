"""The libraries whose models can be built from a name, such as timm. `load` builds the dense model with them.

This folder may import core, modules and errors. To add a library, write a file with a `Library` here and add a line to
the table.
"""

from collections.abc import Mapping

from xprune.artefact.libraries.library import Library
from xprune.artefact.libraries.timm import TIMM
from xprune.artefact.libraries.transformers import TRANSFORMERS

LIBRARIES: Mapping[str, Library] = {library.name: library for library in (TIMM, TRANSFORMERS)}
"""The libraries by the names that headers of artefacts hold."""
