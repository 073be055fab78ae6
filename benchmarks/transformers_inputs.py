"""Makes example inputs for models of transformers, from the names of the arguments of their forwards.

`candidates` yields the sets of inputs that `benchmarks.transformers_models` tries. A batch has two samples.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

TOKENS = 96
LENGTH = 12
BATCH = 2
# Ids of placeholder tokens. Random ids of text are below all of them.
FIRST_PLACEHOLDER = 70


def fields_of(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def find(config: Any, names: tuple[str, ...], default: Any, first: tuple[str, ...] = ()) -> Any:
    """Returns the value of the first of these fields in a config or in its nested configs."""
    own = fields_of(config)
    for name in names:
        if own.get(name) is not None:
            return own[name]
    nested = [own[name] for name in first if name in own] + [v for v in own.values() if is_config(v)]
    for each in nested:
        if is_config(each):
            found = find(each, names, None, first)
            if found is not None:
                return found
    return default


VISION = ("vision_config", "image_config", "encoder", "backbone_config")
AUDIO = ("audio_config", "audio_encoder_config", "encoder_config", "speech_config")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(length: int = LENGTH, top: int = FIRST_PLACEHOLDER - 2, seed: int = 0) -> Tensor:
    """Returns random tokens of text, int64 (2, length)."""
    return torch.randint(4, top, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def _side(config: Any) -> tuple[int, int]:
    size = find(config, ("image_size", "img_size"), 64, VISION)
    if isinstance(size, dict):
        return size["height"], size["width"]
    return tuple(size[-2:]) if isinstance(size, (list, tuple)) else (size, size)


def _channels(config: Any) -> int:
    found = find(config, ("num_channels", "in_channels", "in_chans"), 3, VISION)
    return found if isinstance(found, int) else 3


def image(config: Any) -> Tensor:
    """Returns random images, float32 (2, channels, height, width)."""
    return normal(BATCH, _channels(config), *_side(config))


def _frames(config: Any) -> int:
    return find(config, ("num_frames", "frames_per_clip"), 4, VISION)


def video(config: Any) -> Tensor:
    """Returns random videos, float32 (2, frames, channels, height, width)."""
    return normal(BATCH, _frames(config), _channels(config), *_side(config))


def mask(length: int = LENGTH) -> Tensor:
    """Returns a mask, int64 (2, length), in which the second sample is shorter."""
    lengths = torch.tensor([length, max(length * 2 // 3, 1)])
    return (torch.arange(length) < lengths[:, None]).long()


def spectrum(config: Any, names: tuple[str, ...] = ()) -> Tensor:
    """Returns random features of sound, float32 (2, mel bins, time)."""
    bins = find(
        config,
        (*names, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_channels"),
        80,
        AUDIO,
    )
    time = 2 * find(config, ("max_source_positions",), 32, AUDIO)
    return normal(BATCH, bins, time)


def packed(config: Any) -> tuple[Tensor, Tensor]:
    """Returns packed patches of two images, (patches of both, numbers of a patch), and the grid of each, (2, 3)."""
    patch = find(config, ("patch_size",), 8, VISION)
    frames = find(config, ("temporal_patch_size",), 1, VISION)
    merge = find(config, ("spatial_merge_size",), 2, VISION)
    grid = torch.tensor([[1, 2 * merge, 2 * merge]] * BATCH)
    return normal(int(grid.prod(-1).sum()), _channels(config) * frames * patch * patch), grid


def boxes(length: int = LENGTH, points: int = 4) -> Tensor:
    low = torch.randint(0, 20, (BATCH, length, 2), generator=torch.Generator().manual_seed(1))
    return torch.cat([low, low + 5], -1)


Make = Callable[[Any], Any]
# Name of an argument -> a function of the config that returns its value.
VALUES: dict[str, Make] = {
    "input_ids": lambda c: ids(),
    "attention_mask": lambda c: mask(),
    "decoder_input_ids": lambda c: ids(8, seed=1),
    "pixel_values": image,
    "pixel_values_videos": video,
    "input_values": lambda c: normal(BATCH, 800),
    "input_features": spectrum,
    "bbox": lambda c: boxes(),
    "visual_feats": lambda c: normal(BATCH, 5, find(c, ("visual_feat_dim",), 32)),
    "visual_pos": lambda c: normal(BATCH, 5, 4).abs(),
    "visual_embeds": lambda c: normal(BATCH, 5, find(c, ("visual_embedding_dim",), 32)),
    "past_values": lambda c: past(c),
    "past_time_features": lambda c: normal(BATCH, past(c).shape[1], c.num_time_features),
    "past_observed_mask": lambda c: torch.ones_like(past(c)),
    "static_categorical_features": lambda c: torch.zeros(BATCH, c.num_static_categorical_features, dtype=torch.long),
    "static_real_features": lambda c: normal(BATCH, c.num_static_real_features),
    "future_values": lambda c: normal(BATCH, c.prediction_length),
    "future_time_features": lambda c: normal(BATCH, c.prediction_length, c.num_time_features),
    "freq": lambda c: torch.zeros(BATCH, dtype=torch.long),
    "states": lambda c: normal(BATCH, 4, c.state_dim),
    "actions": lambda c: normal(BATCH, 4, c.act_dim),
    "rewards": lambda c: normal(BATCH, 4, 1),
    "returns_to_go": lambda c: normal(BATCH, 4, 1),
    "timesteps": lambda c: torch.arange(4).expand(BATCH, 4),
    "pixel_mask": lambda c: torch.ones(BATCH, *_side(c), dtype=torch.long),
    "prompt_pixel_values": lambda c: image(c),
    "prompt_masks": lambda c: image(c),
    "inputs": lambda c: ids(),
    "input_points": lambda c: normal(BATCH, 1, 2, 2).abs(),
    "task_inputs": lambda c: ids(find(c, ("task_seq_len",), LENGTH)),
    "xpath_tags_seq": lambda c: torch.ones(BATCH, LENGTH, find(c, ("max_depth",), 50), dtype=torch.long),
    "image_grid_thw": lambda c: packed(c)[1],
    "grid_thw": lambda c: packed(c)[1],
    "image_sizes": lambda c: torch.tensor([_side(c)] * BATCH),
    "input_tokens": lambda c: ids(),
    "qformer_input_ids": lambda c: ids(6, seed=2),
    "image_attention_mask": lambda c: torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
    "image": image,
    "images": image,
    "audio_values": lambda c: normal(BATCH, 1, 800),
    "noise": lambda c: None,
}


def past_length(config: Any) -> int:
    lags = max(getattr(config, "lags_sequence", None) or [0])
    return getattr(config, "context_length", None) or find(config, ("prediction_length",), 16) + lags


def past(config: Any) -> Tensor:
    if hasattr(config, "lags_sequence"):
        config_length = config.context_length + max(config.lags_sequence)
        return normal(BATCH, config_length)
    channels = getattr(config, "num_input_channels", None)
    return normal(BATCH, past_length(config), channels) if channels else normal(BATCH, past_length(config))


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Yields sets of inputs for a model, from the names of the arguments of its forward.

    Those with more inputs come first, so that as many parts of the model as possible run.
    """
    forward = _Forward(model)
    done = []
    for make in (_packed, _text_and_images, _text_and_sounds, _text, _series, _images, _sounds, _features):
        for inputs in make(forward):
            shapes = {name: getattr(value, "shape", None) for name, value in inputs.items()}
            if shapes not in done:
                done.append(shapes)
                yield inputs


class _Forward:
    """The arguments of the forward of a model.

    Attributes:
        model: The model.
        config: Its config.
        names: The names of the arguments.
        needed: The names of the arguments without a default.
        patch: The size of a patch, 8 if the config gives no single number.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        arguments = inspect.signature(model.forward).parameters
        self.names = list(arguments)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.needed = [name for name, p in arguments.items() if p.default is p.empty and p.kind not in kinds]
        patch = find(self.config, ("patch_size",), 8, VISION)
        self.patch = patch if isinstance(patch, int) else 8

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)

    def given(self, *wanted: str, **values: Any) -> Iterator[dict[str, Any]]:
        """Yields one set of inputs, or none if the forward does not take them or needs more.

        Args:
            wanted: Names of arguments whose values come from VALUES.
            values: Values of other arguments.
        """
        if self.has(*wanted, *values):
            names = [*wanted, *(name for name in self.needed if name in VALUES)]
            made = {name: VALUES[name](self.config) for name in names if name not in values} | values
            if all(name in made for name in self.needed):
                yield made


Sets = Iterator[dict[str, Any]]


def _packed(forward: _Forward) -> Sets:
    """Yields packed patches of images, for towers of multimodal models."""
    if not forward.has("grid_thw"):
        return
    patches, grid = packed(forward.config)
    squares = normal(len(patches), _channels(forward.config), forward.patch, forward.patch)
    for name in ("hidden_states", "pixel_values"):
        yield from forward.given(**{name: patches, "grid_thw": grid})
        yield from forward.given(**{name: patches.repeat(1, 2), "grid_thw": grid})
        yield from forward.given(**{name: squares, "grid_thw": grid})
        yield from forward.given(**{name: squares, "grid_thw": grid[:, 1:]})


def _text(forward: _Forward) -> Sets:
    """Yields text, with and without other inputs."""
    extras = (("pixel_values",), ("bbox",), ("visual_feats", "visual_pos"), ("input_features",), ("input_values",), ())
    for extra in extras:
        for text in (("input_ids", "attention_mask"), ("input_ids",)):
            # An encoder-decoder runs without a text for its decoder, but then it often shares one text.
            plain, both = forward.given(*text, *extra), forward.given(*text, *extra, "decoder_input_ids")
            yield from (*both, *plain) if not extra else (*plain, *both)
    images = image(forward.config)[:, None]
    yield from forward.given("input_ids", "attention_mask", pixel_values=images)
    yield from forward.given("input_ids", "attention_mask", "image_attention_mask", pixel_values=images)
    if not forward.has("pixel_values_videos"):
        yield from forward.given("input_ids", "attention_mask", pixel_values=video(forward.config))


def _series(forward: _Forward) -> Sets:
    """Yields time series, and the states and actions of an agent."""
    if forward.has("past_values"):
        more = [name for name in forward.names if name in VALUES and name.startswith(("past", "future"))]
        for names in (more, ["past_values", "past_observed_mask"], ["past_values"]):
            yield from forward.given(*names)
        length = past_length(forward.config)
        yield from forward.given(past_values=[normal(length, seed=seed) for seed in range(BATCH)])
    yield from forward.given("states", "actions", "rewards", "returns_to_go", "timesteps")


def _images(forward: _Forward) -> Sets:
    """Yields images and videos."""
    for more in ("input_points", "pixel_mask", "", "decoder_input_ids", "task_inputs"):
        yield from forward.given("pixel_values", *([more] if more else []))
    if forward.has("pixel_values"):
        config, patch, channels = forward.config, forward.patch, _channels(forward.config)
        videos = video(config)
        yield from forward.given(pixel_values=videos)
        yield from forward.given(pixel_values=videos.transpose(1, 2))
        yield from forward.given(**_flat(forward))
        # Row and column of each patch.
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2)
        yield from forward.given(pixel_values=normal(BATCH, 16, channels * patch * patch), pixel_position_ids=places)
        yield from forward.given(pixel_values=normal(BATCH, channels, 4 * patch, 4 * patch))
        strip = normal(BATCH, channels, patch, 16 * patch)
        whole = strip.permute(1, 2, 0, 3).reshape(1, channels, patch, -1)
        for each in (strip, whole):
            yield from forward.given(pixel_values=each, target_sizes=torch.tensor([[4, 4]] * BATCH))
        # Pairs of images, for models that match them.
        yield from forward.given(pixel_values=normal(BATCH, 2, channels, *_side(config)))
        for side in (32, 48, 64, 128, 224):
            yield from forward.given(pixel_values=normal(BATCH, channels, side, side))
    for name in ("pixel_values_videos", "video", "videos"):
        yield from forward.given(**{name: video(forward.config)})


def _flat(forward: _Forward) -> dict[str, Any]:
    """Returns images as patches in a row, with the number of patches along each side."""
    return {
        "pixel_values": normal(BATCH, 16, _channels(forward.config) * forward.patch**2),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
    }


def _sounds(forward: _Forward) -> Sets:
    """Yields sounds, as waves and as spectra."""
    config = forward.config
    bins, length = find(config, ("num_mel_bins",), 80), find(config, ("max_length",), 64)
    width = find(config, ("feature_projection_input_dim", "input_dim", "hidden_size"), 80, AUDIO)
    shapes = [(800,), (1, 800), (1, 4096), (4096,), (length, bins)]
    waves = [normal(BATCH, *shape) for shape in shapes]
    spectra = [spectrum(config), spectrum(config).transpose(1, 2)]
    spectra += [normal(BATCH, *shape) for shape in ((128, 64), (64, 128), (64, width), (1, *spectra[1].shape[1:]))]
    tails = [("decoder_input_ids",), ()] if forward.has("decoder_input_ids") else [()]
    for name in ("input_features", "input_values", "audio_values", "input_audio", "features"):
        for value in (*spectra, *waves) if name == "input_features" else (*waves, *spectra):
            for tail in tails:
                yield from forward.given(*tail, **{name: value})
            for flag in ("attention_mask", "input_features_mask", "padding_mask", "feature_attention_mask"):
                for time in (value.shape[-1], value.shape[1]):
                    ones = torch.ones(BATCH, time, dtype=torch.long)
                    yield from forward.given(*tails[0], **{name: value, flag: ones})


def _features(forward: _Forward) -> Sets:
    """Yields features that other models would have made."""
    width = find(forward.config, ("hidden_size", "d_model", "embed_dim"), 32)
    for name in ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds"):
        if isinstance(width, int):
            yield from forward.given(**{name: normal(BATCH, LENGTH, width)})
    yield from forward.given("inputs")
    yield from forward.given(inputs=normal(BATCH, LENGTH, find(forward.config, ("d_model",), 32)))
    for shape in ((32, 8), (8, 32)):
        yield from forward.given(latents=normal(BATCH, *shape))
    encoded = normal(BATCH, 9, find(forward.config, ("encoder_hidden_size",), 32))
    yield from forward.given(query_embeds=normal(BATCH, 6, 32), encoder_hidden_states=encoded)


def _text_and_images(forward: _Forward) -> Sets:
    """Yields text with placeholders of images, and images."""
    if not forward.has("input_ids", "pixel_values"):
        return
    config, variants = forward.config, []
    if forward.has("image_grid_thw"):
        patches, grid = packed(config)
        squares = normal(len(patches), _channels(config), forward.patch, forward.patch)
        variants += [{"pixel_values": each, "image_grid_thw": grid} for each in (patches, squares)]
    images = image(config)
    variants.append({"pixel_values": images})
    sizes = torch.tensor([_side(config)] * BATCH)
    crops = [images[:, None].repeat(1, count, 1, 1, 1) for count in (1, 2, 3)]
    variants += [{"pixel_values": each, "image_sizes": sizes} for each in (images, *crops[1:])]
    variants += [{"pixel_values": crops[0]}, _flat(forward)]
    token = find(config, ("image_token_id", "image_token_index"), None)
    yield from _with_placeholders(forward, token, variants)


def _text_and_sounds(forward: _Forward) -> Sets:
    """Yields text with placeholders of sounds, and sounds."""
    sound = spectrum(forward.config)
    flag = next((name for name in ("feature_attention_mask", "input_features_mask") if forward.has(name)), None)
    ones = {flag: torch.ones(BATCH, sound.shape[-1], dtype=torch.long)} if flag else {}
    values = [(name, each) for name in ("input_features", "input_values") for each in (sound, sound.transpose(1, 2))]
    token = find(forward.config, ("audio_token_id", "audio_token_index", "speech_token_id"), None)
    yield from _with_placeholders(forward, token, [{name: each, **ones} for name, each in values])


def _with_placeholders(forward: _Forward, token: Any, variants: list[dict[str, Any]]) -> Sets:
    """Yields those variants that run with the right number of placeholders in the text.

    The error message that a wrong number causes says how many features there are, or how many numbers they have.
    """
    if not isinstance(token, int) or not 0 <= token < TOKENS:
        return
    width = find(forward.config, ("hidden_size",), 32, ("text_config",))
    for variant in variants:
        counts, tried = [4], set()
        while counts:
            count = counts.pop(0)
            tried.add(count)
            text = ids()
            text = torch.cat([text[:, :2], torch.full((BATCH, count), token), text[:, 2:]], 1)
            more = {"attention_mask": torch.ones_like(text), "mm_token_type_ids": (text == token).long()}
            more = {name: value for name, value in more.items() if forward.has(name)}
            for inputs in forward.given(input_ids=text, **more, **variant):
                try:
                    with torch.no_grad():
                        forward.model(**inputs)
                except Exception as error:
                    found = [int(each) for each in re.findall(r"features:? ?(?:torch.Size\(\[)?(\d+)", str(error))]
                    wanted = [
                        each // part for each in found[-1:] for part in (BATCH, BATCH * width) if each % part == 0
                    ]
                    counts += [each for each in wanted if 0 < each <= 1000 and each not in tried]
                else:
                    yield inputs
                    counts = []
