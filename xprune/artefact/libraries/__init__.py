"""The table of libraries whose models are saved by name: how to build one without weights, what a model carries."""

from collections.abc import Mapping

from xprune.artefact.libraries.library import Library
from xprune.artefact.libraries.timm import TIMM
from xprune.artefact.libraries.transformers import TRANSFORMERS

LIBRARIES: Mapping[str, Library] = {library.name: library for library in (TIMM, TRANSFORMERS)}
"""Library by name."""
