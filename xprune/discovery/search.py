"""Finds units in attentions and MLPs of unknown classes, by what they compute. It proves each site before it offers it.

1. The whole model runs once and is watched (`watch`). The record shows in which modules attention is computed, how many
   heads there may be, and which layers are called after it. The first of these layers that reads the heads is the
   consumer.
2. The module that contains all of this runs outside of the model, with the arguments of its first call. Gradients show
   which entries of which tensors each unit depends on (`footprints`). These are the cuts.
3. The forward may read the number of heads from attributes. Those that it reads are found (`attributes`), and sets of
   them are tried. If the forward takes the number of features from its input instead, a changed forward is derived
   (`xprune.adapters.derived`).
4. Each proposed site is tried: units are removed from a copy of the module, and its output has to be that of the module
   with gates of 0 on these units.

A site that passes is plain data, like the sites of adapters. So nothing has to be searched again when a plan is
applied. The search runs once for modules of the same class and shapes. For each further such module, the site that was
found is tried first.
"""

import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.adapters.derived import rewrites_of
from xprune.core.plan import Plan
from xprune.core.site import Cut, Site
from xprune.discovery.alone import FirstCall, copied, first_calls, noisy, with_noise_on
from xprune.discovery.attributes import integers_read, names_heads, proposals, with_twins
from xprune.discovery.footprints import Footprints, Leaf
from xprune.discovery.places import features_of, joined
from xprune.discovery.watch import is_layer
from xprune.errors import XPruneError
from xprune.modules.calls import tensors_in
from xprune.modules.copies import shared_copy, tensors
from xprune.modules.forward import error_text
from xprune.modules.norms import BATCH_NORMS, is_feature_norm
from xprune.modules.paths import input_axis, part_at, weight_axes
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units
from xprune.surgery.outputs import Runs

BLOCKS = (8, 4)
"""Numbers of neighbouring neurons in one unit, if single neurons cannot be removed.

The kernels for mixtures of experts read rows whose length is a multiple of 16 bytes: 8 numbers of half precision, or 4
of float32.
"""

REWRITES, GUESSES = 60, 6
"""How many ways to derive a forward, and how many sets of attributes for each of them, are tried for one module."""


@dataclass(frozen=True)
class Candidate:
    """A module that may hold units, and a layer that may read them.

    Attributes:
        scope: The path of the module that contains the units and the consumer. "" is the model itself.
        consumer: The path of the layer, relative to the scope.
        sizes: The numbers of units to try, the likelier ones first.
        kind: The unit kind.
        called: The name of the units in reasons that users read.
        axis: The axis of the units, if the consumer is a parameter. None if it is a layer.
        lists: The paths of lists with one module for each unit, relative to the scope.

    Example:
        >>> Candidate("blocks.0.attn", "proj", sizes=(4, 2), kind="head", called="heads").consumer
        'proj'
    """

    scope: str
    consumer: str
    sizes: tuple[int, ...]
    kind: str
    called: str
    axis: int | None = None
    lists: tuple[str, ...] = ()


class Finder:
    """Finds and proves the sites of candidates in one model.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        >>> model = nn.Sequential(mlp, nn.Linear(4, 2))
        >>> finder = Finder(model, torch.randn(3, 4))
        >>> candidate = Candidate("0", "2", sizes=(6,), kind="neuron", called="hidden neurons")
        >>> (found,) = finder.find([candidate])
        >>> found[1].size
        6
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.calls = dict[str, FirstCall]()
        # The result for the last module of each class and shapes. A deep model has many equal modules.
        self.before: dict[Any, Site | str] = {}
        self.closed = dict[str, bool]()
        self.flags = dict[Any, tuple[bool, bool]]()
        # Sites that need the same heads in other modules, by the path of their scope.
        self.handed_on = dict[str, Site]()
        # Candidates after which no other consumer has to be tried, and those whose values all use the same scores.
        self.last, self.shared = set[Candidate](), set[Candidate]()

    def find(self, candidates: Iterable[Candidate]) -> list[tuple[Candidate, Site | str]]:
        """Returns the site of each candidate, or the reason why it has none. The reason may be "" for no such units."""
        wanted = list(candidates)
        missing = [each.scope for each in wanted if each.scope not in self.calls]
        if missing:
            self.calls |= first_calls(self.model, self.example_inputs, missing)
        return [(each, self._found(each)) for each in wanted if each.scope in self.calls]

    def _found(self, candidate: Candidate) -> Site | str:
        """Returns the site of one candidate with paths in the model, or the reason why it has none."""
        scope = self.model.get_submodule(candidate.scope)
        shapes = ((name, tensor.shape) for name, tensor in tensors(scope).items())
        key = (type(scope), *(getattr(candidate, name) for name in ("consumer", "kind", "axis", "lists")), *shapes)
        call = self.calls[candidate.scope]
        # A module of the same class may get other arguments, and then take another branch.
        key += tuple((t.dtype, t.dim()) for t in tensors_in((call.args, call.kwargs)))
        try:
            search = _Search(scope, (call.args, call.kwargs), candidate)
            found = self.before[key] = search.result(self.before.get(key))
        # The code of an unknown module runs in many ways here. Whatever it raises, the rest of the model goes on.
        except Exception as problem:
            self.before[key] = (
                f"the search for its {candidate.called} fails with {error_text(problem).splitlines()[0]}."
            )
            return self.before[key]
        flags = self.flags.setdefault(key, (search.last, search.shared))
        self.last |= {candidate} if flags[0] else set()
        self.shared |= {candidate} if flags[1] else set()
        if search.handed_on is not None:
            self.handed_on[candidate.scope] = _at_path(search.handed_on, candidate.scope)
        if isinstance(found, str):
            self.closed[candidate.scope] = search.closed
            return found
        site = _at_path(found, candidate.scope)
        self.closed[site.name] = search.closed
        return site


class _Search:
    """The search for the site of one candidate.

    Args:
        scope: The module. It is not changed.
        inputs: The arguments (args, kwargs) of its first call.
        candidate: The candidate.
    """

    def __init__(self, scope: nn.Module, inputs: Any, candidate: Candidate) -> None:
        self.scope, self.candidate = scope, candidate
        held: Any = part_at(scope, candidate.consumer)
        # The input axis, the tensor that is cut, and its axis that is cut.
        if candidate.axis is None:
            self.axis, self.cut_axis, self.tensor = input_axis(held), weight_axes(held)[0], ".weight"
            features = int(held.weight.shape[weight_axes(held)[1]])
        else:
            self.axis, self.cut_axis, self.tensor, features = candidate.axis, candidate.axis, "", None
        self.alone = noisy(scope, features)
        self.given = inputs
        self.inputs = self._noisy_if_possible(inputs)
        self.closed = False
        self.problems = list[str]()
        self._runs: Runs | None = None
        # The site with the likeliest attributes, if an argument of the call has an entry for each unit.
        self.handed_on: Site | None = None
        # True if no later layer can be the consumer. True if all features of the values use the same scores.
        self.last, self.shared = False, False

    @torch.no_grad()
    def _noisy_if_possible(self, inputs: Any) -> Any:
        """Returns the arguments with noise, or as they are if the module does not run with noise."""
        changed = with_noise_on(inputs)
        try:
            return changed if bool(self.alone(*changed).isfinite().all()) else inputs
        # The forward may check its arguments, or need numbers of a certain range.
        except Exception:
            return inputs

    def result(self, before: Site | str | None) -> Site | str:
        """Returns the site with paths that start with "module", or a reason, or "" if there are no such units.

        Args:
            before: The result for an earlier module of the same class and shapes. A site is tried first. A reason is
                returned, since the same search would fail again. None if there is no earlier module.
        """
        if isinstance(before, str):
            return before
        consumer = joined("module", self.candidate.consumer)
        if before is not None:
            self.closed = self._holds_nothing_else(before)
            first = replace(before, module="")
            if self._disproof(first) is None:
                return self._with_module(first)
        if self.candidate.lists:
            features = features_of(self.scope.get_submodule(self.candidate.consumer))[0]
            return self._with_cuts([], self.candidate.sizes[0], "unit-major", features, [])
        if self.candidate.kind == "neuron" and self.candidate.axis is not None:
            # The kernels of experts often have no second gradient, so there are no footprints.
            (neurons,) = self.candidate.sizes
            for width in (1, *(each for each in BLOCKS if neurons % each == 0 and neurons > each)):
                for cuts in self._by_shape(width):
                    site = self._site(cuts, neurons // width, "unit-major", neurons)
                    if self._disproof(site) is None:
                        return site
            return ""
        prints = Footprints(self.alone, self.inputs, consumer, self.axis)
        if self.candidate.kind == "head" and prints.single_key and prints.follows_attention:
            # The noise may have changed a mask.
            plain = Footprints(self.alone, self.given, consumer, self.axis)
            if plain.single_key or not plain.features:
                return (
                    "on the example inputs, each token attends to a single token. So the scores have no effect, and "
                    "nothing can be said about queries and keys. Give longer example inputs."
                )
            self.inputs, prints = self.given, plain
        for layout in ("unit-major", "width-major"):
            for size in self.candidate.sizes:
                found = prints.cuts(size, layout)
                # Neurons that the module gets as an argument have their producer elsewhere, or none.
                if self.candidate.kind == "neuron" and prints.arguments(size, layout):
                    return ""
                if found is None or not self._plausible(found, prints):
                    continue
                return self._with_cuts(found, size, layout, prints.features, prints.arguments(size, layout))
        if not prints.features:
            try:
                self.alone(*self.inputs)
            except Exception as problem:
                return self._cannot_run(problem)
        # Later layers read what this layer makes of the heads, so they are no consumers of the heads.
        self.last = prints.follows_attention
        if self.candidate.kind == "head" and self.last and prints.cuts(prints.features) is not None:
            self.shared = True
        layers = [path for path, module in self.scope.named_modules() if is_layer(module)]
        if prints.features and self.candidate.kind == "neuron" and len(layers) == 2:
            self.closed = True
            return (
                f"its hidden neurons are mixed between its layers: a feature that {self.candidate.consumer} reads "
                f"depends on several neurons of {layers[0]}. Only operations that treat each neuron separately may lie "
                "between the layers."
            )
        return ""

    def _by_shape(self, block: int) -> Iterator[list[Cut]]:
        """Yields the cuts of the parameters beside the consumer, as far as their shapes show them.

        Args:
            block: The number of neighbouring neurons that are one unit.

        Yields:
            The cuts. A parameter has the neurons along an axis of their number. Or gate and value of each neuron lie on
            one axis, which is twice as long. They come one after the other, or all gates come first.
        """
        (size,), owner = self.candidate.sizes, self.candidate.consumer.rpartition(".")[0]
        held = dict(part_at(self.alone, joined("module", owner)).named_parameters(recurse=False))
        del held[self.candidate.consumer.rpartition(".")[2]]
        for pairs in (False, True):
            cuts = list[Cut]()
            for name, parameter in held.items():
                path = joined("module", owner, name)
                # The first axis of a parameter with three axes is that of the experts.
                first = 1 if parameter.dim() > 2 else 0
                axes = [a for a in range(first, parameter.dim()) if parameter.shape[a] in (size, 2 * size)]
                # An axis of twice the length is that of gates and values. Otherwise the last axis is that of inputs.
                axes.sort(key=lambda a: -parameter.shape[a])
                if axes:
                    twice = parameter.shape[axes[0]] == 2 * size
                    groups, width = (1, block) if not twice else (1, 2 * block) if pairs else (2, block)
                    cuts.append(Cut(path, axes[0], groups, width))
            if any(held[cut.tensor.rpartition(".")[2]].dim() > 1 for cut in cuts):
                yield cuts
                # Biases of the outputs may be as long as the neurons.
                yield [cut for cut in cuts if held[cut.tensor.rpartition(".")[2]].dim() > 2]

    def _plausible(self, cuts: Sequence[Cut], prints: Footprints) -> bool:
        """Returns True if these cuts can be those of such units."""
        if not any(tensors(self.alone)[cut.tensor].dim() > 1 for cut in cuts):
            return False
        if self.candidate.kind != "head":
            return True
        # In a single head, or if heads are mixed, the features of the values can be cut. But they are no heads: all
        # scores depend on all queries then.
        of_scores = prints.of_scores(cuts)
        return of_scores if of_scores is not None else prints.cuts(prints.features) is None

    def _with_cuts(
        self, cuts: Sequence[Cut], size: int, layout: str, features: int, given: Sequence[tuple[Leaf, Cut]]
    ) -> Site | str:
        """Returns the first exact site with these cuts, or the reason why there is none.

        Args:
            cuts: The cuts, without that of the consumer.
            size: The number of units.
            layout: The order of their features in the input of the consumer.
            features: The number of these features.
            given: The arguments of the call with an axis of units.
        """
        site = self._site(self._with_followers(cuts), size, layout, features)
        self.closed = self._holds_nothing_else(site)
        read = integers_read(self.alone, self.inputs)
        lengths = [features, *(cut.length(size) for cut in site.cuts), *(c.per_unit * size for c in site.cuts)]
        likely: tuple[str, ...] | None = None
        for attributes in proposals(read, size, lengths):
            likely = attributes if likely is None else likely
            proposed = replace(site, attributes=with_twins(self.alone, attributes))
            if self._disproof(proposed) is None:
                return self._with_module(self._without_needless(proposed))
        closest = replace(site, attributes=with_twins(self.alone, likely or ()))
        if given:
            self.handed_on = closest
            picked = tuple(f":{leaf.name}:{cut.axis}/{cut.width}" for leaf, cut in given if not cut.segments)
            # The forward may take the number of features from its input too.
            for rewrites in ((), *self._rewrites()) if self.candidate.scope else ():
                more = (*rewrites, *picked)
                proposed = replace(site, attributes=closest.attributes, rewrites=more, adapter="derived")
                if self._disproof(proposed) is None:
                    return proposed
        named = with_twins(self.alone, [path for path in likely or () if names_heads(path)])
        guesses = (with_twins(self.alone, each) for each in islice(proposals(read, size, lengths), GUESSES))
        for attributes in dict.fromkeys((closest.attributes, named, (), *guesses)) if self.candidate.scope else ():
            for rewrites in self._rewrites():
                proposed = replace(site, attributes=attributes, rewrites=rewrites, adapter="derived")
                if self._disproof(proposed) is None:
                    return self._with_module(proposed)
        return self._reason(closest, [leaf.name for leaf, _ in given])

    def _without_needless(self, site: Site) -> Site:
        """Returns an exact site without the attributes that it is exact without, except numbers of heads.

        An attribute such as a window may be a multiple of the number of units by chance. On short inputs, a wrong value
        of it would not show.
        """
        for path in site.attributes:
            fewer = replace(site, attributes=tuple(other for other in site.attributes if other != path))
            if not names_heads(path) and self._disproof(fewer) is None:
                site = fewer
        return site

    def _rewrites(self) -> Iterator[tuple[str, ...]]:
        """Yields ways to derive a forward: each change alone, then all changes of one method."""
        tried = 0
        for path, module in self.alone.module.named_modules():
            if is_layer(module) or type(module).__module__.startswith("torch."):
                continue
            changes = rewrites_of(type(module))
            by_function: dict[str, list[str]] = {}
            for change in changes:
                by_function.setdefault(change.partition(":")[0], []).append(change)
            whole = ([c for c in group if "@" not in c] for group in by_function.values())
            together = [group for group in whole if len(group) > 1]
            for group in (*together, *([change] for change in changes)):
                if tried == REWRITES:
                    return
                tried += 1
                yield tuple(f"{path}:{change}" for change in group)

    def _site(self, cuts: Sequence[Cut], size: int, layout: str, features: int) -> Site:
        """Returns the site with these cuts, without attributes. Its paths start with "module"."""
        consumer, width = joined("module", self.candidate.consumer), features // size
        groups, inside = (1, width) if layout == "unit-major" else (width, 1)
        own = Cut(f"{consumer}{self.tensor}", self.cut_axis, groups, inside)
        norms = [
            path
            for path in dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in cuts)
            # A norm of each head has a weight with an axis of heads. Its statistics do not change.
            if is_feature_norm(self.alone.get_submodule(path)) and part_at(self.alone, f"{path}.weight").dim() == 1
        ]
        return Site(
            name="module",
            kind=self.candidate.kind,
            size=size,
            width=width,
            consumers=(consumer,),
            axes=(self.axis,),
            layout=layout,
            cuts=(*cuts, own),
            norms=tuple(norms),
            lists=tuple(joined("module", path) for path in self.candidate.lists),
        )

    def _with_followers(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Adds the cuts of tensors that have no gradient, such as the bias of keys, which a softmax ignores.

        A bias is divided like the rows of its layer's weight. A bare tensor is divided like a tensor of the same module
        that has the same length.
        """
        held, found = tensors(self.alone), list(cuts)
        done = {cut.tensor for cut in cuts}
        for cut in cuts:
            owner, _, name = cut.tensor.rpartition(".")
            for other, tensor in held.items():
                same_module = other.rpartition(".")[0] == owner and other not in done
                if not same_module or tensor.dim() != 1 or not tensor.is_floating_point():
                    continue
                is_bias = name == "weight" and other.endswith(".bias") and cut.axis == 0
                is_twin = held[cut.tensor].dim() == 1 and name.endswith("bias") and other.endswith("bias")
                is_statistic = isinstance(self.alone.get_submodule(owner), BATCH_NORMS)
                if (is_bias or is_twin or is_statistic) and len(tensor) == held[cut.tensor].shape[cut.axis]:
                    found.append(replace(cut, tensor=other, axis=0))
                    done.add(other)
        # The bias of the consumer is no bias of units.
        bias = f"{joined('module', self.candidate.consumer)}.bias"
        return [cut for cut in found if cut.tensor != bias]

    def _holds_nothing_else(self, site: Site) -> bool:
        """Returns True if every layer of the scope belongs to the site, else False."""
        holders = {cut.tensor.rpartition(".")[0] for cut in site.cuts}
        if self.candidate.kind == "neuron":
            paths = {joined("module", path) for path, module in self.scope.named_modules() if is_layer(module)}
            return paths <= holders
        # Layers that all heads share, such as that of a latent, belong to the attention too. They come before the
        # consumer. So layers after the consumer show that the scope is a whole block.
        layers = [joined("module", path) for path, module in self.scope.named_modules() if is_layer(module)]
        return bool(layers) and layers[-1] in holders

    @torch.no_grad()
    def _disproof(self, site: Site) -> str | None:
        """Returns the reason why a site is wrong, or None if its cuts are exact and its gates have an effect."""
        called = self.candidate.called
        # All sites that are proposed are compared with the same dense module. A search may change the inputs.
        if self._runs is None or self._runs.example_inputs is not self.inputs:
            self._runs = Runs(self.alone, self.inputs)
        runs = self._runs
        for plan in trial_plans(site):
            try:
                pruned = remove_units(shared_copy(self.alone), plan, ADAPTERS)
                problem = exactness.problem_with(runs, pruned, plan, thorough=False)
                if problem:
                    why = f"with {plan.counts[0]} of {site.size} {called} kept, {problem.splitlines()[0]}"
                # If a gate has no effect, the comparison proves nothing: a cut of any unused features would pass.
                elif len(plan.keeps[0]) == site.size - 1 and not exactness.changes(runs, plan):
                    why = f"a gate on the input of {site.consumers[0].partition('.')[2]} does not change the output"
                else:
                    continue
            except XPruneError as refused:
                why = str(refused).rstrip(".")
            # The forward of an unknown module runs here, and it may raise any error.
            except Exception as problem:
                why = _fails_alone(problem)
            self.problems.append(why)
            return why
        return None

    def _reason(self, closest: Site, given: Sequence[str]) -> str:
        """Returns the reason why no proposed site is exact."""
        called = self.candidate.called
        try:
            random = exactness.randomness(self.alone, self.inputs)
        except Exception as problem:
            return self._cannot_run(problem)
        if random:
            return f"{random}."
        if given:
            return (
                f"its forward gets a tensor with an entry for each of its {closest.size} {called} from another module "
                f"({', '.join(given)} of its call), which would have to shrink too. Compute it inside the module, or "
                "write an adapter with a `pruned` class, see docs/adapters.md."
            )
        line = self._failing_line(closest)
        if line:
            return (
                f"its forward works only with all {closest.size} {called}: with one removed, it fails at {line}. "
                "Change this line, or the numbers and tensors that it uses, so that they follow the number of "
                f"{called}: for example -1 in a reshape, or an attribute of the module. Or write an adapter, see "
                "docs/adapters.md."
            )
        return (
            f"xprune tried {len(self.problems)} ways to cut out its {called}, and none is exact. The result of one of "
            f"them: {self.problems[0].rstrip('.')}. If the forward assumes that all {called} are there, write an "
            "adapter with a `pruned` class, see docs/adapters.md."
        )

    def _cannot_run(self, problem: Exception) -> str:
        """Returns the reason for a module that cannot be called alone."""
        return (
            f"{_fails_alone(problem)}, but xprune has to call a module of an unknown class there. Write an adapter for "
            "the class, see docs/adapters.md."
        )

    @torch.no_grad()
    def _failing_line(self, site: Site) -> str:
        """Returns the line of code at which the forward fails when the first unit is removed, or ""."""
        plan = next(iter(trial_plans(site)))
        try:
            pruned = remove_units(shared_copy(self.alone), plan, ADAPTERS)
        except Exception:
            return ""
        try:
            pruned(*self.inputs)
        except Exception as problem:
            frames = traceback.extract_tb(problem.__traceback__)
            outside = [frame for frame in frames if "torch/" not in frame.filename and "xprune/" not in frame.filename]
            if outside and outside[-1].line:
                frame, file = outside[-1], outside[-1].filename.rpartition("/")[2]
                return f"`{frame.line}` ({file}, line {frame.lineno}: {error_text(problem).splitlines()[0]})"
        return ""

    @torch.no_grad()
    def _with_module(self, site: Site) -> Site:
        """Returns the site with `module` set, if the module can be replaced after it has lost all its units.

        It can be replaced if it returns a single tensor, and if this tensor is the bias of the consumer when all units
        are removed. Otherwise the site is returned unchanged, and a plan has to keep at least one unit.
        """
        if self.candidate.axis is not None:
            return site
        # Before its class changes, the module is replaced. So the replacement needs no adapter.
        whole = replace(site, module="module")
        plan = Plan((whole,), ((),))
        try:
            args, kwargs = copied(self.inputs)
            is_tensor = isinstance(self.alone.module(*args, **kwargs), Tensor)
            pruned = remove_units(shared_copy(self.alone), plan, ADAPTERS)
            exact = exactness.problem(self.alone, pruned, plan, self.inputs) is None
        # `Removed` needs its input as the first positional argument. If there are only keyword arguments, it fails.
        except Exception:
            return site
        return whole if is_tensor and exact else site


def trial_plans(site: Site) -> Iterator[Plan]:
    """Yields the plans that a proposed site is tested with.

    The first one removes the first unit. The second one keeps a random half of the units. The third one keeps one unit
    in the middle.
    """
    chance = torch.Generator().manual_seed(0)
    half = torch.randperm(site.size, generator=chance)[: (site.size + 1) // 2].sort().values.tolist()
    every = tuple(range(site.size))
    for keep in dict.fromkeys((every[1:], tuple(half), (site.size // 2,))):
        if 0 < len(keep) < site.size:
            yield Plan((site,), (keep,))


def _fails_alone(problem: Exception) -> str:
    """Returns the reason for a module whose forward fails outside of the model. It has the first line of the error."""
    return f"its forward fails outside of the model ({error_text(problem).splitlines()[0].removesuffix(': ')})"


def _at_path(site: Site, path: str) -> Site:
    """Returns the site of a single module as a site of the model.

    Args:
        site: A site whose paths start with "module".
        path: The path of the module in the model. It replaces "module". "" if the module is the model itself.
    """

    def at(name: str) -> str:
        """Returns the path in the model: replaces the prefix "module" by the path of the module. "" stays ""."""
        return joined(path, name.removeprefix("module").removeprefix(".")) if name else ""

    consumers = tuple(at(name) for name in site.consumers)
    return replace(
        site,
        # The model itself has no path, so its site is named after the consumer.
        name=path or consumers[0],
        consumers=consumers,
        cuts=tuple(replace(cut, tensor=at(cut.tensor)) for cut in site.cuts),
        module=at(site.module),
        norms=tuple(at(norm) for norm in site.norms),
        attributes=tuple(at(name) for name in site.attributes),
        lists=tuple(at(name) for name in site.lists),
    )
