"""Makes the criteria "captum:<class>", one for each attribution class of Captum that can score units."""

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
"""The methods whose attributions add up to the effect of all units together."""
DEFAULTS: Mapping[str, Any] = {"n_steps": 16}
"""Defaults that differ from Captum's. With Captum's own defaults, scoring would need more time than necessary."""
EVERY = 4
"""The default of `every` for methods with `n_steps`: of each 4 consecutive batches, one is used, see `CaptumMethod`.

With 16 steps, a batch costs about 17 times as much as with Taylor. So the whole loader costs about 4 times as much.
"""
_RULES = (
    "its rules exist for ReLU and similar functions, but not for gates, LayerNorm, GELU or attention. For gates, its "
    "result would be {}"
)
REFUSED: Mapping[str, str] = {
    "DeepLift": _RULES.format("the same as that of captum:InputXGradient, so use that"),
    "DeepLiftShap": _RULES.format("the same as that of captum:InputXGradient, so use that"),
    "LRP": _RULES.format("meaningless. Use captum:LayerLRP"),
    "GuidedBackprop": _RULES.format("the same as that of captum:Saliency with abs=False, so use that"),
    "Deconvolution": _RULES.format("the same as that of captum:Saliency with abs=False, so use that"),
    "FeaturePermutation": "it exchanges gates between samples, which changes nothing because they are equal",
    "LayerFeaturePermutation": "it permutes single features of a token, not units. Use captum:FeatureAblation",
    "LayerFeatureAblation": "it removes single features of a token, not units. Use captum:FeatureAblation",
    "LayerDeepLiftShap": "it needs a distribution of baseline inputs. Use captum:LayerDeepLift",
    "LayerGradCam": "it sums over the features of a layer, so it gives no number for a unit. "
    "Use captum:LayerGradientXActivation",
    "Occlusion": "it removes neighbouring features together, but units have no neighbours. Use captum:FeatureAblation",
    "GuidedGradCam": "it explains inputs, not units",
    "NoiseTunnel": "it adds noise to another method. captum:GradientShap adds noise to gates (stdevs=0.1)",
    "DataLoaderAttribution": "it applies another method to all batches of a loader, which xprune does already",
    "LimeBase": "its arguments are functions, which cannot be settings of a criterion. Use captum:Lime",
}
"""The reason why an attribution class of Captum cannot score units, by the name of the class.

If another method is a better choice, the reason names it.
"""


def served() -> dict[str, Any]:
    """Returns the attribution classes of Captum that can score units, by their names."""
    found: dict[str, Any] = {}
    # Neuron attributions explain one neuron, and LLM attributions explain tokens. So both cannot score units.
    for name in captum.attr.__all__:
        kind = getattr(captum.attr, name)
        fits = isclass(kind) and issubclass(kind, Attribution) and not issubclass(kind, NeuronAttribution)
        if fits and hasattr(kind, "attribute") and "LLM" not in name and name not in REFUSED:
            found[name] = kind
    return found


@cache
def member(name: str) -> type[CaptumMethod]:
    """Makes the criterion for one attribution class of Captum.

    Args:
        name: "captum:" plus the name of the class, such as "captum:Saliency".

    Returns:
        A frozen dataclass, which is a subclass of `Criterion`. Its fields are the arguments of the Captum class with a
        simple default.

    Raises:
        PluginError: Captum has no such class, or the class cannot score units. The message says why.

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
    more |= {"every": EVERY} if "n_steps" in names else {}
    fields = [(key, type(value), DEFAULTS.get(key, value)) for key, value in {**given, **more}.items()]
    base = LayerMethod if issubclass(kind, LayerAttribution) else GateMethod
    about = f"Captum's {short} of the class's log probability, {'at layers' if base is LayerMethod else 'over gates'}."
    # `xprune.core.registry.resolve` calls `member` of one of these criteria to make another one.
    space = {"name": name, "attribution": kind, "complete": short in COMPLETE, "member": staticmethod(member)}
    space |= {"__doc__": f"{about}\n\n    {base.__doc__}", "__module__": __name__}
    found: type[CaptumMethod] = make_dataclass(short, fields, bases=(base,), namespace=space, frozen=True)
    return found


IntegratedGradients = member("captum:IntegratedGradients")
"""The criterion for integrated gradients (Sundararajan et al., ICML 2017).

It is the only criterion from Captum in the table `CRITERIA`. `resolve` makes all others with its method `member`.
"""
