"""Builds a small model, with example inputs, of any type that transformers lists.

    from benchmarks.transformers_models import TYPES, build
    model, inputs = build("llama")[:2]

`TYPES` holds the types of transformers' own list `MODEL_MAPPING_NAMES`. All weights are random. Nothing is downloaded.

How a model is built:

1. The config of the type is created with its defaults. Its fields and the fields of nested configs are then replaced
   by small numbers, by their names: 32 for hidden sizes, 2 for layers, 4 for heads. If layers have different kinds,
   such as sliding and full attention, there is one layer of each kind.
2. Several policies are tried in turn, from "all fields are small" to "only a few fields are small". A policy that gives
   more than LARGEST parameters is skipped.
3. The inputs follow from the names of the arguments of the forward. Several sets are tried. The first set with which
   the forward returns finite numbers is used. The batch has two samples.
4. `benchmarks/transformers_special.py` holds what the names do not tell, for single types.

If no policy works, `NotBuilt` gives the reason. `transformers_configs.py` makes configs small, and
`transformers_inputs.py` makes inputs.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Nothing is downloaded, and what would need a download fails fast. transformers reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmarks.transformers_configs import POLICIES, Policy, small_config
from benchmarks.transformers_inputs import candidates
from benchmarks.transformers_special import NOT_BUILT, SPECIAL

LARGEST = 2_000_000
"""The largest number of parameters of a model, unless SPECIAL allows more."""


class NotBuilt(Exception):
    """No policy gives a model that runs.

    The message is the first reason. `problems` holds the reasons of all policies.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


class Built(NamedTuple):
    """A model with inputs.

    Args:
        model: The model in eval mode.
        inputs: The arguments of its forward.
        policy: The policy that worked.
    """

    model: nn.Module
    inputs: dict[str, Any]
    policy: str


def _types() -> dict[str, str]:
    """Returns type -> name of its base class."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return {name: first if isinstance(first, str) else first[0] for name, first in MODEL_MAPPING_NAMES.items()}


TYPES = _types()


def classes(name: str, config: Any) -> list[str]:
    """Returns the names of the classes to try for a type, the best first.

    Encoder-decoders and decoders of text get the class that can generate. Others get the base class.
    """
    from transformers.models.auto import modeling_auto as auto

    if "class" in SPECIAL.get(name, {}):
        return [SPECIAL[name]["class"]]
    found = []
    if getattr(config, "is_encoder_decoder", False):
        for table in (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES):
            found += [table[name]] if name in table else []
    elif name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        found.append(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    found.append(TYPES[name])
    return [each if isinstance(each, str) else each[0] for each in dict.fromkeys(found)]


def build(name: str) -> Built:
    """Builds a small model of a type of transformers.

    Args:
        name: A name in TYPES.

    Raises:
        NotBuilt: No policy works.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    if name in NOT_BUILT:
        raise NotBuilt(NOT_BUILT[name])
    special = SPECIAL.get(name, {})
    try:
        default = CONFIG_MAPPING[special.get("from", name)]()
    except KeyError:
        raise NotBuilt("it has no config class of its own") from None
    except Exception as error:
        raise NotBuilt(f"its default config fails: {_first_line(error)}") from None
    problems: list[str] = []
    for cls in classes(name, default):
        kind = getattr(transformers, cls, None)
        if kind is None:
            problems.append(f"transformers has no {cls}")
            continue
        for policy in POLICIES:
            try:
                model = _model(kind, small_config(default, policy, special.get("config")), policy, special)
                return Built(model, _inputs(model, special.get("inputs")), policy.name)
            except Exception as error:
                problems.append(f"{cls}, {policy.name}: {_first_line(error)}")
    raise NotBuilt(problems[0], problems)


def _first_line(error: Exception) -> str:
    """Returns the class of an error and the first two lines of its message."""
    lines = [each.strip() for each in str(error).splitlines() if each.strip()]
    text = " ".join(lines[:2])[:300]
    return text if isinstance(error, NotBuilt) else f"{type(error).__name__}: {text}"


def _model(kind: Any, config: Any, policy: Policy, special: Mapping[str, Any]) -> nn.Module:
    """Returns a model with random weights in eval mode.

    Raises:
        NotBuilt: The model would be too large.
    """
    allowed = special.get("largest", LARGEST)
    count = _parameters(kind, config)
    # A policy that keeps large fields could need the memory of the full model.
    if count > allowed or (not count and not (policy.sizes and policy.layers)):
        raise NotBuilt(f"more than {allowed} parameters")
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval().float()
    if sum(p.numel() for p in model.parameters()) > allowed:
        raise NotBuilt(f"more than {allowed} parameters")
    return model


def _parameters(kind: Any, config: Any) -> int:
    """Returns the number of parameters without allocating them. 0 if the model cannot be built on the meta device."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in kind(config).parameters())
    except Exception:
        return 0


def _inputs(model: Any, make: Callable[[Any], dict[str, Any]] | None) -> dict[str, Any]:
    """Returns the first inputs with which the forward of the model returns numbers that are no NaN.

    Args:
        model: The model.
        make: A function of the model that returns the inputs, or None to try all candidates.

    Raises:
        NotBuilt: There are none. The message says why the first inputs failed.
    """
    failed = []
    for inputs in [make(model)] if make else candidates(model):
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                found = [t for t in _tensors(model(**inputs)) if t.is_floating_point()]
            if found and not any(t.isnan().any() for t in found):
                return inputs
            failed.append(f"{'+'.join(inputs)}: the forward returns {'NaN' if found else 'no tensor'}")
        except Exception as error:
            failed.append(f"{'+'.join(inputs)}: {_first_line(error)}")
    arguments = ", ".join(inspect.signature(model.forward).parameters)
    raise NotBuilt(failed[0] if failed else f"no inputs fit its forward: {arguments}")


def _tensors(value: Any) -> list[Tensor]:
    """Returns all tensors in the outputs of a model, without those of caches."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for each in value.values() for t in _tensors(each)]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _tensors(each)]
    return []
