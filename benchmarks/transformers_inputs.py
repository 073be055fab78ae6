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
    "task_inputs": lambda c: ids(),
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
    """Yields sets of inputs for a model, from the names of the arguments of its forward. The richest comes first."""
    config = model.config
    names = list(inspect.signature(model.forward).parameters)
    needed = [
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]

    def given(*wanted: str, **values: Any) -> dict[str, Any] | None:
        if any(name not in names for name in (*wanted, *values)):
            return None
        made = {
            name: VALUES[name](config) for name in (*wanted, *(n for n in needed if n in VALUES)) if name not in values
        }
        return made | values

    sets: list[dict[str, Any] | None] = []
    shape = torch.Size
    for name in ("hidden_states", "pixel_values"):
        if name in names and "grid_thw" in names:
            patches, grid = packed(config)
            patch = find(config, ("patch_size",), 8, VISION)
            sets.append(given(**{name: patches, "grid_thw": grid}))
            sets.append(given(**{name: patches.repeat(1, 2), "grid_thw": grid}))
            if isinstance(patch, int):
                square = normal(len(patches), _channels(config), patch, patch)
                sets.append(given(**{name: square, "grid_thw": grid}))
                sets.append(given(**{name: square, "grid_thw": grid[:, 1:]}))
    if "input_ids" in names and "pixel_values" in names:
        sets += list(_with_images(model, config, names, given))
    if "input_ids" in names and ("input_features" in names or "input_values" in names):
        sets += list(_with_sounds(model, config, names, given))
    if "input_ids" in names:
        for extra in (
            ("pixel_values",),
            ("bbox",),
            ("visual_feats", "visual_pos"),
            ("input_features",),
            ("input_values",),
        ):
            for text in (("input_ids", "attention_mask"), ("input_ids",)):
                sets.append(given(*text, *extra))
                if "decoder_input_ids" in names:
                    sets.append(given(*text, *extra, "decoder_input_ids"))
        for text in (("input_ids", "attention_mask"), ("input_ids",)):
            if "decoder_input_ids" in names:
                sets.append(given(*text, "decoder_input_ids"))
            sets.append(given(*text))
    if "input_ids" in names and "pixel_values" in names:
        sets.append(given("input_ids", "attention_mask", pixel_values=image(config)[:, None]))
        sets.append(given("input_ids", "attention_mask", "image_attention_mask", pixel_values=image(config)[:, None]))
        if "pixel_values_videos" not in names:
            sets.append(given("input_ids", "attention_mask", pixel_values=video(config)))
    if "past_values" in names:
        more = [n for n in names if n in VALUES and n.startswith(("past", "future"))]
        sets += [given(*more), given("past_values", "past_observed_mask"), given("past_values")]
        if "past_values_mask" in names:
            sets.append(given("past_values"))
        length = past_length(config)
        sets.append(given(past_values=[normal(length, seed=s) for s in range(BATCH)]))
    if "states" in names:
        sets.append(given("states", "actions", "rewards", "returns_to_go", "timesteps"))
    if "pixel_values" in names:
        sets += [given("pixel_values", "input_points"), given("pixel_values", "pixel_mask"), given("pixel_values")]
        sets += [given("pixel_values", "decoder_input_ids"), given("pixel_values", "task_inputs")]
        sets += [given("pixel_values", "prompt_pixel_values", "prompt_masks")]
        sets.append(given(pixel_values=video(config)))
        sets.append(given(pixel_values=video(config).transpose(1, 2)))
        patch = find(config, ("patch_size",), 8, VISION)
        if isinstance(patch, int):
            flat = normal(BATCH, 16, _channels(config) * patch * patch)
            where = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
            sets.append(
                given(
                    pixel_values=flat,
                    spatial_shapes=torch.tensor([[4, 4]] * BATCH),
                    pixel_attention_mask=torch.ones(BATCH, 16, dtype=torch.long),
                )
            )
            sets.append(given(pixel_values=flat, pixel_position_ids=where.expand(BATCH, 16, 2)))
            side = 4 * patch
            sets.append(given(pixel_values=normal(BATCH, _channels(config), side, side)))
        if isinstance(patch, int) and "target_sizes" in names:
            strip = normal(BATCH, _channels(config), patch, 16 * patch)
            whole = strip.transpose(0, 1).transpose(1, 2).reshape(1, _channels(config), patch, -1)
            sizes = torch.tensor([[4, 4]] * BATCH)
            sets += [given(pixel_values=strip, target_sizes=sizes), given(pixel_values=whole, target_sizes=sizes)]
        sets.append(given(pixel_values=normal(BATCH, 2, _channels(config), *_side(config))))
        for side in (32, 48, 64, 128, 224):
            sets.append(given(pixel_values=normal(BATCH, _channels(config), side, side)))
    for name in ("pixel_values_videos", "video", "videos"):
        if name in names:
            sets.append(given(**{name: video(config)}))
    features = [spectrum(config), spectrum(config).transpose(1, 2)]
    width = find(config, ("feature_projection_input_dim", "input_dim", "hidden_size"), 80, AUDIO)
    features += [
        normal(BATCH, 128, 64),
        normal(BATCH, 64, 128),
        normal(BATCH, 64, width),
        normal(BATCH, 1, *features[1].shape[1:]),
    ]
    for name in ("input_features", "input_values", "audio_values", "input_audio", "features"):
        if name not in names:
            continue
        tail = ("decoder_input_ids",) if "decoder_input_ids" in names else ()
        waves = [normal(BATCH, 800), normal(BATCH, 1, 800), normal(BATCH, 1, 4096), normal(BATCH, 4096)]
        length = find(config, ("max_length",), 64)
        waves.append(normal(BATCH, length, find(config, ("num_mel_bins",), 80)))
        for value in (*waves, *features) if name != "input_features" else (*features, *waves):
            sets += [given(*tail, **{name: value})] + ([given(**{name: value})] if tail else [])
            for flag in ("attention_mask", "input_features_mask", "padding_mask", "feature_attention_mask"):
                if flag in names:
                    sets.append(
                        given(*tail, **{name: value, flag: torch.ones(BATCH, value.shape[-1], dtype=torch.long)})
                    )
                    sets.append(
                        given(*tail, **{name: value, flag: torch.ones(BATCH, value.shape[1], dtype=torch.long)})
                    )
    for name in ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds"):
        if name in names:
            width = find(config, ("hidden_size", "d_model", "embed_dim"), 32)
            if isinstance(width, int):
                sets.append(given(**{name: normal(BATCH, LENGTH, width)}))
    if "inputs" in names:
        sets += [given("inputs"), given(inputs=normal(BATCH, LENGTH, find(config, ("d_model",), 32)))]
    if "latents" in names:
        sets += [given(latents=normal(BATCH, 32, 8)), given(latents=normal(BATCH, 8, 32))]
    if "query_embeds" in names:
        width = find(config, ("encoder_hidden_size",), 32)
        sets.append(given(query_embeds=normal(BATCH, 6, 32), encoder_hidden_states=normal(BATCH, 9, width)))
    done: list[Any] = []
    for each in sets:
        if each is None or any(name not in each for name in needed):
            continue
        key = {k: (v.shape if isinstance(v, Tensor) else shape()) for k, v in each.items()}
        if key not in done:
            done.append(key)
            yield each


def _with_images(model: Any, config: Any, names: list[str], given: Callable[..., Any]) -> Iterator[Any]:
    """Yields text with placeholders of images, and images.

    How many placeholders an image needs is in the error message that a wrong number causes.
    """
    token = find(config, ("image_token_id", "image_token_index"), None)
    if not isinstance(token, int) or not 0 <= token < TOKENS:
        return
    variants = []
    if "image_grid_thw" in names:
        patches, grid = packed(config)
        variants.append({"pixel_values": patches, "image_grid_thw": grid})
    images = image(config)
    variants.append({"pixel_values": images})
    if "image_sizes" in names:
        variants += [{"pixel_values": images, "image_sizes": torch.tensor([_side(config)] * BATCH)}]
        variants += [
            {
                "pixel_values": images[:, None].repeat(1, 3, 1, 1, 1),
                "image_sizes": torch.tensor([_side(config)] * BATCH),
            }
        ]
    variants.append({"pixel_values": images[:, None]})
    yield from _with_placeholders(model, token, variants, names, given, r"features:? ?(?:torch.Size\(\[)?(\d+)")


def _with_sounds(model: Any, config: Any, names: list[str], given: Callable[..., Any]) -> Iterator[Any]:
    """Yields text with placeholders of sounds, and sounds."""
    token = find(config, ("audio_token_id", "audio_token_index", "speech_token_id"), None)
    if not isinstance(token, int) or not 0 <= token < TOKENS:
        return
    variants = []
    for name in ("input_features", "input_values"):
        if name in names:
            sound = spectrum(config)
            flag = next((n for n in ("feature_attention_mask", "input_features_mask") if n in names), None)
            for each in (sound, sound.transpose(1, 2)):
                time = sound.shape[-1]
                ones = {flag: torch.ones(BATCH, time, dtype=torch.long)} if flag else {}
                variants.append({name: each, **ones})
    yield from _with_placeholders(model, token, variants, names, given, r"features:? ?(?:torch.Size\(\[)?(\d+)")


def _with_placeholders(
    model: Any, token: int, variants: list[Any], names: list[str], given: Callable[..., Any], pattern: str
) -> Iterator[Any]:
    for variant in variants:
        count = 4
        for _ in range(2):
            text = ids()
            text = torch.cat([text[:, :2], torch.full((BATCH, count), token), text[:, 2:]], 1)
            more = {}
            if "attention_mask" in names:
                more["attention_mask"] = torch.ones_like(text)
            for kind in ("mm_token_type_ids", "token_type_ids"):
                if kind in names and kind == "mm_token_type_ids":
                    more[kind] = (text == token).long()
            full = given(input_ids=text, **more, **variant)
            if full is None:
                break
            try:
                with torch.no_grad():
                    model(**full)
            except Exception as error:
                wanted = re.findall(pattern, str(error))
                wanted = int(wanted[-1]) if wanted else 0
                if not wanted or wanted % BATCH or wanted > 2000 or wanted // BATCH == count:
                    break
                count = wanted // BATCH
                continue
            yield full
            break
