"""The criteria "captum:<class>": one for every attribution class of Captum that can score units."""

from collections.abc import Mapping
from dataclasses import make_dataclass
from functools import cache
from inspect import isclass, signature
from typing import Any

import captum.attr
from captum.attr import Attribution, LayerAttribution, NeuronAttribution

from xprune.criteria.captum.base import CaptumMethod, settings
from xprune.criteria.captum.gates import GateMethod
from xprune.criteria.captum.layers import LayerMethod
from xprune.errors import PluginError

PREFIX = "captum:"
COMPLETE = ("IntegratedGradients", "GradientShap", "ShapleyValueSampling", "ShapleyValues", "KernelShap")
"""Methods whose attributions add up to the effect of all units together."""
DEFAULTS: Mapping[str, Any] = {"n_steps": 16}
"""Settings whose default in Captum costs more time than scores of units need."""
_RULES = (
    "its rules know ReLU and similar functions, but no gate, LayerNorm, GELU or attention: over gates it would be {}"
)
REFUSED: Mapping[str, str] = {
    "DeepLift": _RULES.format("captum:InputXGradient under another name"),
    "DeepLiftShap": _RULES.format("captum:InputXGradient under another name"),
    "LRP": _RULES.format("nothing; try captum:LayerLRP"),
    "GuidedBackprop": _RULES.format("captum:Saliency with a sign"),
    "Deconvolution": _RULES.format("captum:Saliency with a sign"),
    "FeaturePermutation": "gates are the same for all samples: permuting them changes nothing",
    "LayerFeaturePermutation": "it permutes single features of a token, not units; use captum:FeatureAblation",
    "LayerFeatureAblation": "it ablates single features of a token, not units; use captum:FeatureAblation",
    "LayerDeepLiftShap": "it wants a distribution of baseline inputs; use captum:LayerDeepLift",
    "LayerGradCam": "it sums over the features that distinguish units; use captum:LayerGradientXActivation",
    "Occlusion": "it slides a window over neighbours, and units have none; use captum:FeatureAblation",
    "GuidedGradCam": "it explains inputs, not units",
    "NoiseTunnel": "it wraps another method; captum:GradientShap adds noise to gates (stdevs=0.1)",
    "DataLoaderAttribution": "it wraps another method, and batches are read here already",
    "LimeBase": "it is built from functions, not from settings; use captum:Lime",
}
"""Name of an attribution class that cannot score units -> the reason, and a better choice."""


def served() -> dict[str, Any]:
    """Returns the attribution classes of Captum that can score units: name -> class."""
    found: dict[str, Any] = {}
    # Neuron attributions explain one neuron, and LLM attributions explain tokens: neither scores units.
    for name in captum.attr.__all__:
        kind = getattr(captum.attr, name)
        fits = isclass(kind) and issubclass(kind, Attribution) and not issubclass(kind, NeuronAttribution)
        if fits and hasattr(kind, "attribute") and "LLM" not in name and name not in REFUSED:
            found[name] = kind
    return found


@cache
def member(name: str) -> type[CaptumMethod]:
    """Makes the criterion of one attribution class of Captum.

    Args:
        name: "captum:" and the name of the class, such as "captum:Saliency".

    Returns:
        A frozen dataclass. Its fields are the arguments of the Captum class that have plain values.

    Raises:
        PluginError: Captum has no such class, or the class cannot score units. The message gives the reason.

    Example:
        >>> member("captum:Saliency")()
        Saliency(batches=None, abs=True)
    """
    short, known = name.removeprefix(PREFIX), served()
    if short in REFUSED:
        raise PluginError(f"{name} cannot score units: {REFUSED[short]}.")
    if short not in known:
        raise PluginError(f"unknown criterion {name!r}; known from Captum: {', '.join(sorted(known))}.")
    kind = known[short]
    given = {**settings(kind.__init__), **settings(kind.attribute)}
    names = signature(kind.attribute).parameters
    more = {"baseline": 0.0} if "baselines" in names else {}
    more |= {"groups": 8} if "feature_mask" in names else {}
    fields = [(key, type(value), DEFAULTS.get(key, value)) for key, value in {**given, **more}.items()]
    base = LayerMethod if issubclass(kind, LayerAttribution) else GateMethod
    about = f"Captum's {short} of the class's log probability, {'at layers' if base is LayerMethod else 'over gates'}."
    # `member` lets `xprune.core.registry.resolve` make the other criteria from any one of them.
    space = {"name": name, "attribution": kind, "complete": short in COMPLETE, "member": staticmethod(member)}
    space |= {"__doc__": f"{about}\n\n    {base.__doc__}", "__module__": __name__}
    found: type[CaptumMethod] = make_dataclass(short, fields, bases=(base,), namespace=space, frozen=True)
    return found


IntegratedGradients = member("captum:IntegratedGradients")
"""Integrated gradients (Sundararajan et al., ICML 2017).

It is the only criterion from Captum in the table of criteria. The others are found through it, by its method `member`.
"""
