"""The kinds of modules and tensors that xprune cannot work with. For each kind: how to recognise it, and what to do.

The public functions call `refuse` before they do any work. So the caller gets the name of the module and an advice, and
not an error from the middle of the work. To refuse another kind, add an entry to `KINDS`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn

from xprune.errors import ModelError
from xprune.modules.copies import tensors_of

CUT, TRAIN, SAVE, RUN = "cut", "train", "save", "run"
"""The kinds of work that a model is checked for.

CUT finds, scores or removes units. TRAIN changes the weights. SAVE writes them to a folder. RUN measures the model.
"""


@dataclass(frozen=True)
class Kind:
    """A kind of module that xprune refuses.

    Args:
        name: The name of the kind, for tests and readers.
        works: The kinds of work for which such a module is refused: CUT, TRAIN, SAVE, RUN.
        find: A function of the path and the module. It returns "" if the module is not of this kind. Otherwise it
            returns a text that says what the module is or holds, such as "the class QuantLinear".
        says: Why it is refused.
        do: What the user can do.
    """

    name: str
    works: frozenset[str]
    find: Callable[[str, nn.Module], str]
    says: str
    do: str

    def message(self, model: nn.Module, path: str, detail: str) -> str:
        """Returns the text of the error for a module.

        Args:
            model: The whole model.
            path: The path of the module. "" is the model itself.
            detail: The text that `find` returned.
        """
        where = f"{path} in {type(model).__name__}" if path else type(model).__name__
        return f"{where} cannot be used, because it {detail}. {self.says} {self.do}"


def refuse(model: nn.Module, work: str) -> None:
    """Raises ModelError if a module of the model is of a kind that xprune cannot do this work with.

    Args:
        model: The model.
        work: CUT, TRAIN, SAVE or RUN.

    Example:
        >>> refuse(nn.Linear(2, 2), CUT)
        >>> with torch.device("meta"):
        ...     empty = nn.Linear(2, 2)
        >>> try:
        ...     refuse(empty, CUT)
        ... except ModelError as error:
        ...     print(str(error).partition(".")[0])
        Linear cannot be used, because it holds the tensor weight on the meta device, where tensors have no values
    """
    kinds = [kind for kind in KINDS if work in kind.works]
    for path, module in model.named_modules():
        for kind in kinds:
            detail = kind.find(path, module)
            if detail:
                raise ModelError(kind.message(model, path, detail))


def refuse_frozen(model: nn.Module) -> None:
    """Raises ModelError if the model has no parameter that can be trained.

    Example:
        >>> refuse_frozen(nn.Linear(2, 2))
        >>> try:
        ...     refuse_frozen(nn.Linear(2, 2).requires_grad_(False))
        ... except ModelError as error:
        ...     print(str(error).partition(":")[0])
        all weights of Linear are frozen
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"all weights of {type(model).__name__} are frozen: no parameter has requires_grad=True, so fine-tuning "
            "cannot change anything. Call model.requires_grad_(True), or on a part of the model, or prune without "
            "fine-tuning: Pruner(..., finetune=None)."
        )


def reparametrised(module: nn.Module) -> tuple[str, str]:
    """Recognises a layer whose weight is not a parameter but is computed from other tensors.

    Args:
        module: The layer.

    Returns:
        (what it is, how to undo it), such as ("weight_norm computes its weight from other tensors",
        "torch.nn.utils.remove_weight_norm(layer, 'weight')"). Both are "" if the layer is an ordinary one.
    """
    held = {name for name, _ in tensors_of(module)}
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict) and len(parametrizations):
        name, rules = next(iter(parametrizations.items()))
        rule = type(next(iter(rules.children()), rules)).__name__.lstrip("_")
        undo = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        return f"the parametrization {rule} computes its {name} from other tensors", undo
    for name in sorted(held):
        # The weight `weight` is computed from `weight_orig`, or from `weight_g` and `weight_v`.
        stem = name.rpartition("_")[0]
        if not stem:
            continue
        if f"{stem}_orig" in held and f"{stem}_mask" in held:
            what = f"torch.nn.utils.prune computes its {stem} from {stem}_orig and a mask"
            return what, f"torch.nn.utils.prune.remove(layer, {stem!r})"
        if f"{stem}_orig" in held and f"{stem}_u" in held:
            what = f"spectral_norm computes its {stem} from other tensors"
            return what, f"torch.nn.utils.remove_spectral_norm(layer, {stem!r})"
        if f"{stem}_g" in held and f"{stem}_v" in held:
            what = f"weight_norm computes its {stem} from other tensors"
            return what, f"torch.nn.utils.remove_weight_norm(layer, {stem!r})"
    return "", ""


def misfit(model: nn.Module, names: Iterable[str]) -> str:
    """Returns a reason if a cut has left a layer with weight_norm whose two tensors do not fit together, else "".

    torch computes the weight from a length for each row and a direction. It does not compare their shapes, but reads
    and writes outside of the smaller tensor. So such a layer must not run.

    Args:
        model: The model after the cuts.
        names: The paths of the tensors that were cut.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        >>> names = ["parametrizations.weight.original0"]
        >>> misfit(layer, names)
        ''
        >>> weights = layer.parametrizations.weight
        >>> weights.original0 = nn.Parameter(weights.original0[:2].detach())
        >>> misfit(layer, names).partition(":")[0]
        'the tensors of weight_norm do not fit together'
    """
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        try:
            held = dict(tensors_of(model.get_submodule(owner)))
        # A module that lost all its units was replaced.
        except AttributeError:
            continue
        rules = model.get_submodule(owner).children()
        stems = [name.rpartition("_")[0] for name in held]
        pairs = [(f"{stem}_g", f"{stem}_v") for stem in stems if stem]
        if any(type(rule).__name__.endswith("WeightNorm") for rule in rules):
            pairs.append(("original0", "original1"))
        for length, direction in pairs:
            if length not in held or direction not in held:
                continue
            shapes = tuple(held[length].shape), tuple(held[direction].shape)
            if any(a not in (1, b) for a, b in zip(*shapes, strict=False)):
                return (
                    f"the tensors of weight_norm do not fit together: after the cut, {owner}.{length} has the shape "
                    f"{shapes[0]} and {owner}.{direction} {shapes[1]}"
                )
    return ""


def named_reasons(model: nn.Module, left: Mapping[str, str]) -> dict[str, str]:
    """Returns the reasons for modules that were left alone. If a layer is reparametrised, the reason says so.

    The reasons that were found by trying do not know this cause. They only say how the attempt failed.

    Args:
        model: The model.
        left: Path of a module -> reason.
    """
    found = dict(left)
    for path, why in left.items():
        for layer, (what, undo) in _reparametrised_near(model, path):
            # A reason that names the cause already, or that has nothing to do with the layer, is not replaced.
            if what not in why:
                found[path] = (
                    f"{layer} is a layer whose weight cannot be cut: {what}. Call {undo} on this layer, which makes "
                    "the weight an ordinary parameter, and find the sites again."
                )
            break
    return found


def _reparametrised_near(model: nn.Module, path: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields (path, what `reparametrised` returns) for reparametrised layers in the module at `path` and next to it."""
    # The path of a site is that of a module, or that of the last layer of an MLP. In the second case, the first layer
    # of the MLP is a child of the same parent.
    try:
        here = model.get_submodule(path)
    except AttributeError:
        return
    has_children = any(True for _ in here.children())
    start = path if has_children else path.rpartition(".")[0]
    for name, module in model.get_submodule(start).named_modules():
        what = reparametrised(module)
        # A layer that lies deeper inside is most likely not the reason why this module was left alone.
        if what[0] and name.count(".") <= 1:
            yield ".".join(part for part in (start, name) if part), what


def missing_tensors(model: nn.Module, names: list[str]) -> str:
    """Returns a reason if the model lacks a parameter or buffer that a site would cut, else "".

    Args:
        model: The model.
        names: The paths of the tensors.
    """
    for name in names:
        owner, _, attribute = name.rpartition(".")
        try:
            layer = model.get_submodule(owner)
        except AttributeError:
            return f"the model has no module {owner}, whose tensor {attribute} would have to be cut"
        if attribute not in {own for own, _ in tensors_of(layer)}:
            what, undo = reparametrised(layer)
            if what:
                return (
                    f"{owner} is a layer whose weight cannot be cut: {what}. Call {undo} on this layer, which makes "
                    "the weight an ordinary parameter, and find the sites again."
                )
            return f"{owner} is a {type(layer).__name__} without a parameter or buffer {attribute} that could be cut"
    return ""


def _in_tensors(found: Callable[[str, Tensor], str]) -> Callable[[str, nn.Module], str]:
    """Returns a `Kind.find` that asks `found` about the name of each tensor of a module and the tensor."""

    def find(_path: str, module: nn.Module) -> str:
        return next((text for name, tensor in tensors_of(module) if (text := found(name, tensor))), "")

    return find


def _lazy(name: str, tensor: Tensor) -> str:
    """Recognises tensors of lazy layers, whose shape is not known before the first forward pass."""
    lazy = isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
    return f"holds the tensor {name}, which is not initialised" if lazy else ""


def _on_meta(name: str, tensor: Tensor) -> str:
    """Recognises tensors on the meta device."""
    meta = not _lazy(name, tensor) and tensor.device.type == "meta"
    return f"holds the tensor {name} on the meta device, where tensors have no values" if meta else ""


def _with_other_layout(name: str, tensor: Tensor) -> str:
    """Recognises sparse tensors and tensors in a format of a library such as MKL-DNN."""
    other = not _lazy(name, tensor) and tensor.layout is not torch.strided
    return f"holds the tensor {name} in the layout {tensor.layout}" if other else ""


_OWN_CLASSES = ("xprune.", "torch.nn.parameter")


def _is_subclass(tensor: Tensor) -> bool:
    """Returns True if the tensor computes its operations itself, with `__torch_dispatch__`, else False."""
    kind = type(tensor)
    known = kind in (Tensor, nn.Parameter) or kind.__module__.startswith(_OWN_CLASSES)
    return not known and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _distributed(name: str, tensor: Tensor) -> str:
    """Recognises DTensor, whose values are spread over processes."""
    spread = _is_subclass(tensor) and type(tensor).__module__.startswith("torch.distributed")
    return f"holds the tensor {name} as a {type(tensor).__name__}, which is spread over processes" if spread else ""


def _of_own_class(name: str, tensor: Tensor) -> str:
    """Recognises tensors of a class that computes operations itself, such as those of torchao."""
    return f"holds the tensor {name} of the class {type(tensor).__name__}" if _is_subclass(tensor) else ""


def _integer_weight(name: str, tensor: Tensor) -> str:
    """Recognises weights that are stored as integers or in 8 bits, as quantisation libraries do."""
    if "weight" not in name.lower() or _lazy(name, tensor) or not tensor.dim():
        return ""
    integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return f"holds the quantised weight {name} of {tensor.dtype}" if integer or narrow else ""


QUANTISERS = frozenset(
    ("aqlm", "auto_gptq", "auto_round", "awq", "bitsandbytes", "compressed_tensors", "eetq", "gptqmodel", "hqq")
) | frozenset(("optimum.quanto", "quanto", "torchao", "transformer_engine"))
"""The packages whose layers hold weights in a form of their own, also before they are quantised."""


def _quantised(path: str, module: nn.Module) -> str:
    """Recognises layers with quantised weights: by their tensors, or by the package that their class belongs to."""
    package = type(module).__module__
    library = next((name for name in sorted(QUANTISERS) if package == name or package.startswith(f"{name}.")), "")
    if library:
        return f"is a {type(module).__name__} of the library {library}"
    return _in_tensors(_integer_weight)(path, module)


def _packed(_path: str, module: nn.Module) -> str:
    """Recognises the quantised layers of torch.ao, which hold their weights in an object and not in tensors."""
    named = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic"))
    # The weight of such a layer is a method that unpacks it. Layers for quantisation-aware training have ordinary
    # weights.
    packed = named and callable(getattr(module, "weight", None))
    return f"is a quantised layer of the class {type(module).__name__}" if packed else ""


def _script(_path: str, module: nn.Module) -> str:
    """Recognises modules that torch.jit compiled."""
    return f"is a {type(module).__name__} of torch.jit" if isinstance(module, torch.jit.ScriptModule) else ""


def _inner_parallel(path: str, module: nn.Module) -> str:
    """Recognises DistributedDataParallel and DataParallel around a part of the model."""
    parallel = path and isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    return f"is a {type(module).__name__} around a part of the model" if parallel else ""


def _offloaded(_path: str, module: nn.Module) -> str:
    """Recognises modules whose weights Accelerate loads at each call, with a hook."""
    hooked = _hook_of_accelerate(module) and any(tensor.device.type == "meta" for tensor in module.parameters())
    return "has weights that Accelerate has offloaded" if hooked else ""


def _dispatched(_path: str, module: nn.Module) -> str:
    """Recognises modules whose forward Accelerate has replaced, to move the inputs between devices."""
    hook = _hook_of_accelerate(module)
    return f"has a hook of Accelerate ({hook}) in place of its forward" if hook else ""


def _hook_of_accelerate(module: nn.Module) -> str:
    """Returns the class name of the hook that Accelerate has put on a module, or "" if there is none."""
    # Accelerate keeps the hook as an attribute of the module.
    return next((type(value).__name__ for value in vars(module).values() if isinstance(value, ModelHook)), "")


# Names of parts such as lora_A, lora_down, q_lora or loraB. A longer word that only contains these letters is no match.
_LORA_NAME = re.compile(r"(^|_)lora($|_|[A-Z])", re.IGNORECASE)
_LORA_CLASS = re.compile(r"LoRA|L[oO]ra(?![a-z])|Lo[RK]A|DoRA|VeRA")


def _adapted(_path: str, module: nn.Module) -> str:
    """Recognises layers with an adapter of low rank beside the weight, such as those of PEFT."""
    kind = type(module)
    parts = [name for name, _ in (*module.named_children(), *tensors_of(module))]
    named = min((name for name in parts if _LORA_NAME.search(name)), default="")
    if named:
        return f"has the LoRA adapter {named}"
    # PEFT has adapters of other kinds too, such as IA3.
    other = kind.__module__.startswith("peft.") or _LORA_CLASS.search(kind.__name__)
    return f"is the adapter layer {kind.__name__}" if other else ""


_ALL = frozenset({CUT, TRAIN, SAVE, RUN})

KINDS: tuple[Kind, ...] = (
    Kind(
        "lazy",
        _ALL,
        _in_tensors(_lazy),
        "A lazy layer gets its shape in the first forward pass.",
        "Run one forward pass of the model first.",
    ),
    Kind(
        "offloaded",
        _ALL,
        _offloaded,
        "xprune has to read the values of all weights.",
        "Load the model without device_map, so that all its weights are on one device.",
    ),
    Kind(
        "dispatched",
        frozenset({CUT, TRAIN}),
        _dispatched,
        "xprune moves the model itself, and replaces the forward of some modules.",
        "Load the model without device_map, or call accelerate.hooks.remove_hook_from_submodules(model).",
    ),
    Kind(
        "meta",
        _ALL,
        _in_tensors(_on_meta),
        "The model is on the meta device, or a part of it is.",
        "Load its weights first, for example model.to_empty(device='cpu') and then model.load_state_dict(...).",
    ),
    Kind(
        "distributed tensors",
        frozenset({CUT, TRAIN, SAVE}),
        _in_tensors(_distributed),
        "xprune works on the whole weights.",
        "Prune the model in one process, before you distribute its weights.",
    ),
    Kind(
        "script",
        frozenset({CUT, TRAIN}),
        _script,
        "A module of torch.jit has a fixed code and allows no hooks.",
        "Prune the original module, and compile the pruned model with torch.jit afterwards.",
    ),
    Kind(
        "wrapped part",
        frozenset({CUT}),
        _inner_parallel,
        "xprune only knows such a wrapper around the whole model.",
        "Replace the wrapper by its attribute `module`, and wrap the pruned model afterwards.",
    ),
    Kind(
        "quantised layer",
        frozenset({CUT, TRAIN, SAVE}),
        _packed,
        "Its weights are packed in an object that xprune can neither cut nor save, and no gradient passes through it.",
        "Prune the model before you quantise it, save the pruned model, and quantise it then.",
    ),
    Kind(
        "adapter",
        frozenset({CUT}),
        _adapted,
        "xprune would have to cut the weight and the adapter together, and the rank of the adapter has no units.",
        "Merge first: call merge_and_unload() of the PEFT model. If you have put the adapters in yourself, add the "
        "product of their two weights to the large weight, and put the large layer back in their place. "
        "To train with adapters, add them to the pruned model.",
    ),
    Kind(
        "quantised weight",
        frozenset({CUT}),
        _quantised,
        "The scales of its weights belong to the dense shape.",
        "Prune the model before you quantise it, and quantise the pruned model.",
    ),
    Kind(
        "tensor class",
        frozenset({CUT, TRAIN, SAVE}),
        _in_tensors(_of_own_class),
        "Such a tensor computes its operations itself. xprune cuts, trains and saves ordinary tensors only.",
        "Prune the model before you convert its weights, and convert those of the pruned model.",
    ),
    Kind(
        "layout",
        frozenset({CUT, TRAIN, SAVE}),
        _in_tensors(_with_other_layout),
        "xprune works on dense tensors only.",
        "Convert the weights with to_dense() first.",
    ),
)
"""All kinds that are refused. The first one that fits gives the message."""
