"""An input for one forward pass of any model: candidates, the richest first."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.zoo.configs import FIRST_SPECIAL, VOCAB

TEXT_LENGTH = 12
# Patches of an image given as rows, in a grid of one frame, four rows and four columns.
GRID = (1, 4, 4)
MEDIA = ("pixel_values", "input_features", "input_values", "images")
GRIDS = ("image_grid_thw", "grid_thw", "image_grids", "spatial_shapes", "grid_hw", "grid_hws", "target_sizes")


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that is set in the configuration or, depth first, in one of its parts."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found = find(value, *names)
            if found is not None:
                return found
    return default


def part(config: Any, *names: str) -> Any:
    """The sub-config of one of these names, or the configuration itself."""
    return next((getattr(config, n) for n in names if hasattr(getattr(config, n, None), "to_dict")), config)


def vision(config: Any) -> Any:
    return part(config, "vision_config", "backbone_config", "image_model_config", "encoder", "image_config")


def size(config: Any, *names: str, default: int = 0) -> int:
    """A field that is one number, also where the configuration has a list of equal ones."""
    value = find(config, *names, default=default)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) else default


def token_ids(length: int = TEXT_LENGTH, vocab: int = VOCAB) -> torch.Tensor:
    """Ids that are no special tokens. Shape [1, length], int64."""
    low = min(10, vocab // 4)
    return torch.randint(low, max(low + 1, min(vocab, FIRST_SPECIAL)), (1, length))


def ids(config: Any) -> list[torch.Tensor]:
    vocab = size(part(config, "text_config", "text_encoder"), "vocab_size", "text_vocab_size", default=VOCAB)
    books = size(config, "num_codebooks", "n_codebooks") or size(config, "num_channels")
    values = [token_ids(vocab=vocab), token_ids(32, vocab=vocab), token_ids(64, vocab=vocab)]
    if books > 3:  # num_channels: codebooks of Dia, colours of others
        values += [
            token_ids(TEXT_LENGTH * books, 8).view(1, TEXT_LENGTH, books),
            token_ids(TEXT_LENGTH * books, 8).view(books, TEXT_LENGTH),
            token_ids(TEXT_LENGTH * books, 8).view(1, books, TEXT_LENGTH),
        ]
    return values


def _sides(config: Any) -> tuple[int, int]:
    value = find(vision(config), "image_size", "img_size") or find(config, "image_size", default=64)
    return (int(value[0]), int(value[-1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def _channels(config: Any) -> int:
    return size(vision(config), "num_channels", "in_channels", "in_chans", "num_image_channels", default=3)


def pixels(config: Any) -> list[torch.Tensor]:
    """An image, a clip of frames, several images of one sample, and larger or patched ones."""
    channels, sides = _channels(config), _sides(config)
    frames = size(config, "num_frames", "frames_per_clip", default=2)
    patch = size(vision(config), "patch_size", default=16)
    image = torch.rand(1, channels, *sides)
    return [
        image,
        image[:, None],
        torch.rand(1, frames, channels, *sides),
        torch.rand(1, channels, frames, *sides),
        torch.rand(1, 2, channels, *sides),
        torch.rand(1, 4, channels * patch * patch),
        torch.rand(1, channels, 64, 64),
        torch.rand(1, channels, 128, 128),
        torch.rand(1, 2, channels, 64, 64),
    ]


def patches(config: Any) -> list[torch.Tensor]:
    """An image as rows of flattened patches (some models want [rows, values], some [1, rows, values], some pixels)."""
    seen = vision(config)
    patch, frames = (
        size(seen, "patch_size", default=16),
        size(seen, "temporal_patch_size", "patch_temporal", default=1),
    )
    rows, channels = GRID[0] * GRID[1] * GRID[2], _channels(config)
    flat = torch.rand(rows, channels * frames * patch * patch)
    single = torch.rand(rows, channels * patch * patch)
    return [
        flat,
        flat[None],
        single,
        single[None],
        single.view(rows, channels, patch, patch),
        single.view(1, rows, channels, patch, patch),
    ]


def features(config: Any) -> list[torch.Tensor]:
    """Spectrograms: [1, mel bins, frames] as Whisper reads them, and [1, frames, mel bins]."""
    audio = part(config, "audio_config", "encoder_config", "audio_encoder_config", "encoder")
    bins = size(
        audio,
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        "n_mels",
        "feat_dim",
        "input_feat_size",
        "feature_size",
        "input_size",
        "n_mel_bins",
        default=80,
    )
    frames = 2 * size(audio, "max_source_positions", default=32)
    shapes = [(bins, frames), (frames, bins), (bins, 100), (100, bins), (bins, 400), (400, bins)]
    return [torch.rand(1, *shape) for shape in shapes] + [torch.rand(1, 1, 64, bins), torch.rand(bins, 100)]


def waves(config: Any) -> list[torch.Tensor]:
    channels = size(config, "audio_channels", "channels", default=1)
    bins, frames = size(config, "num_mel_bins", default=64), size(config, "max_length", default=128)
    return [
        torch.randn(1, 4800),
        torch.randn(1, channels, 4800),
        torch.randn(1, 7680),
        torch.randn(1, channels, 19200),
        torch.rand(1, frames, bins),
        torch.rand(1, bins, frames),
    ]


def hidden(config: Any) -> list[torch.Tensor]:
    width = size(config, "hidden_size", "d_model", "n_embd", "embed_dim", default=64)
    rows = torch.randn(1, TEXT_LENGTH, width)
    return [rows, rows[0], rows.transpose(1, 2), torch.randn(1, width, 8, 8), torch.randn(1, 16, width)]


def series(config: Any) -> list[torch.Tensor]:
    length = size(config, "context_length", "prediction_length", default=32)
    lags = find(config, "lags_sequence", default=[0])
    inputs = size(config, "num_input_channels", "input_size", default=1)
    return [torch.rand(1, length + max(lags)), torch.rand(1, length, inputs), torch.rand(1, length)]


def boxes(config: Any) -> list[torch.Tensor]:
    box = torch.tensor([10, 10, 50, 60]).repeat(1, TEXT_LENGTH, 1)
    return [box, box / 100.0]


# Argument of forward -> values to try.
VALUES: dict[str, Callable[[Any], list[Any]]] = {
    **dict.fromkeys(
        ("input_ids", "decoder_input_ids", "text_input_ids", "qformer_input_ids", "context_input_ids"), ids
    ),
    **dict.fromkeys(("pixel_values", "images", "image", "prompt_pixel_values"), pixels),
    **dict.fromkeys(("pixel_values_videos", "videos", "pixel_values_video"), pixels),
    **dict.fromkeys(("input_features", "audio_features"), features),
    **dict.fromkeys(("input_values", "audio_values", "waveform", "audio"), waves),
    **dict.fromkeys(
        (
            "hidden_states",
            "inputs_embeds",
            "encoder_hidden_states",
            "input_embeds",
            "query_embeds",
            "vision_features",
        ),
        hidden,
    ),
    "past_values": series,
    "past_observed_mask": lambda config: [torch.ones_like(value) for value in series(config)],
    "past_time_features": lambda config: [
        torch.rand(*value.shape[:2], size(config, "num_time_features")) for value in series(config)
    ],
    "future_time_features": lambda config: [
        torch.rand(1, size(config, "prediction_length", default=8), size(config, "num_time_features"))
    ],
    **dict.fromkeys(GRIDS, lambda config: [torch.tensor([GRID]), torch.tensor([GRID[1:]])]),
    "pixel_attention_mask": lambda config: [torch.ones(1, GRID[1] * GRID[2], dtype=torch.long)],
    "pixel_position_ids": lambda config: [
        torch.cartesian_prod(torch.arange(GRID[1]), torch.arange(GRID[2]))[None]
    ],
    "input_features_mask": lambda config: [
        torch.ones(value.shape[0], value.shape[-1], dtype=torch.long) for value in features(config)
    ],
    "image_attention_mask": lambda config: [torch.ones(1, TEXT_LENGTH, 1, dtype=torch.long)],
    "image_embeds_position_mask": lambda config: [
        torch.arange(TEXT_LENGTH)[None] < size(config, "latent_query_num")
    ],
    "task_inputs": lambda config: [token_ids(77)],
    "merge_sizes": lambda config: [torch.tensor([1])],
    "image_sizes": lambda config: [torch.tensor([_sides(config)])],
    "bbox": boxes,
    "attention_mask": lambda config: [torch.ones(1, TEXT_LENGTH, dtype=torch.long)],
    "position_ids": lambda config: [torch.arange(TEXT_LENGTH)[None]],
    "mm_token_type_ids": lambda config: [torch.zeros(1, TEXT_LENGTH, dtype=torch.long)],
    "token_type_ids": lambda config: [torch.zeros(1, TEXT_LENGTH, dtype=torch.long)],
    "visual_feats": lambda config: [torch.randn(1, 4, size(config, "visual_feat_dim", default=64))],
    "visual_pos": lambda config: [torch.rand(1, 4, size(config, "visual_pos_dim", default=4))],
    "audio_codes": lambda config: [
        torch.randint(0, 8, (1, size(config, "num_quantizers", "n_codebooks", default=1), TEXT_LENGTH)),
        torch.randint(0, 8, (1, 1, TEXT_LENGTH)),
    ],
    "spectrogram": lambda config: [
        torch.rand(1, 16, size(config, "model_in_dim", "num_mel_bins", default=80))
    ],
    "input_points": lambda config: [torch.tensor([[[[8.0, 8.0]]]])],
    "aspect_ratio_ids": lambda config: [torch.ones(1, 1, dtype=torch.long)],
    "aspect_ratio_mask": lambda config: [
        torch.ones(1, 1, size(config, "max_num_tiles", default=4), dtype=torch.long)
    ],
    "states": lambda config: [torch.randn(1, 4, size(config, "state_dim", default=17))],
    "actions": lambda config: [torch.randn(1, 4, size(config, "act_dim", default=4))],
    "rewards": lambda config: [torch.randn(1, 4, 1)],
    "returns_to_go": lambda config: [torch.randn(1, 4, 1)],
    "timesteps": lambda config: [torch.arange(4)[None]],
    "flattened_patches": lambda config: [
        torch.rand(1, 16, 2 + size(config, "patch_embed_hidden_size", default=768))
    ],
    "state": lambda config: [torch.randn(1, size(config, "max_state_dim", default=32))],
    "prompt_masks": lambda config: pixels(config)[:1],
    "image_embeds": hidden,
}


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, in order: with an image or sound and text, with what is required, with text alone."""
    torch.manual_seed(1)
    signature = inspect.signature(model.forward).parameters
    required = [
        name
        for name, p in signature.items()
        if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    text = ["input_ids"] if "input_ids" in signature else []
    media = [name for name in MEDIA if name in signature]
    grids = [name for name in GRIDS if name in signature]
    kinds = [name for name in ("mm_token_type_ids",) if name in signature]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in signature else []
    named = model.main_input_name if isinstance(model.main_input_name, list) else [model.main_input_name]
    main = [name for name in named if name in signature]
    groups = [
        [*required, *text, *media[:1], *grids[:1], *kinds] if grids and media else [],
        [*required, *text, *media[:1], *kinds] if media else [],
        [*required, "input_features", "input_features_mask"] if "input_features_mask" in signature else [],
        [*required, *main, *decoder],
        [*required, *main],
        *(
            [*required, *text, *media[:1], name]
            for name in ("image_attention_mask", "image_embeds_position_mask")
            if name in signature
        ),
        [*required, *text, "bbox", *decoder] if "bbox" in signature else [],
        [*required, *text, "bbox"] if "bbox" in signature else [],
        [*required, *text, *media[:1], "bbox"] if "bbox" in signature else [],
        [*required, *text, *media[:1], "image_sizes"] if "image_sizes" in signature else [],
        [*required, *media[:1], "input_points"] if "input_points" in signature else [],
        [*required, *text, "visual_feats", "visual_pos"] if "visual_feats" in signature else [],
        [*required, *text, *decoder],
        [*required, *text],
        *([*required, name] for name in media),
        *([*required, name, *decoder] for name in media),
        [*required, "past_values", "past_time_features", "past_observed_mask"]
        if "past_time_features" in signature
        else [],
        [*required, "states", "actions", "rewards", "returns_to_go", "timesteps"]
        if "states" in signature
        else [],
        [*required, "hidden_states"] if "hidden_states" in signature else [],
        [*required, "inputs_embeds"] if "inputs_embeds" in signature else [],
    ]
    seen: set[frozenset[str]] = set()
    for group in groups:
        names = list(dict.fromkeys(group))
        if names and frozenset(names) not in seen:
            seen.add(frozenset(names))
            yield from _values(names, model.config)


def _values(names: list[str], config: Any) -> Iterator[dict[str, Any]]:
    """Every argument at its first value, then one or all at their later ones."""
    options = {name: VALUES[name](config) if name in VALUES else [] for name in names}
    if any(name in (*GRIDS, "pixel_position_ids") for name in names):
        options |= {name: patches(config) for name in names if name in (*MEDIA, "hidden_states")}
    if not all(options.values()):
        return
    for index in range(max(map(len, options.values()))):
        yield {name: values[min(index, len(values) - 1)] for name, values in options.items()}
    for name, values in options.items():
        for value in values[1:]:
            yield {other: v[0] for other, v in options.items()} | {name: value}


def with_placeholders(inputs: dict[str, Any], error: str, config: Any) -> dict[str, Any] | None:
    """The inputs with as many placeholder tokens as the model said that there are features."""
    found = re.search(r"(\w+) features and .*tokens: \S+?,? features:? (\d+)", error)
    if not found or "input_ids" not in inputs:
        return None
    kind = found[1].lower() if found[1].lower() in ("image", "video", "audio") else "image"
    token = find(config, f"{kind}_token_id", f"{kind}_token_index")
    count = int(found[2])
    if (
        token is None
        or (inputs["input_ids"] == token).any()
        or inputs["input_ids"].dim() != 2
        or not 0 < count <= 600
    ):
        return None
    row = torch.cat(
        [inputs["input_ids"][:, :4], torch.full((1, count), token), inputs["input_ids"][:, 4:]], 1
    )
    return (
        inputs
        | {"input_ids": row}
        | ({"mm_token_type_ids": (row == token).long()} if "mm_token_type_ids" in inputs else {})
    )


def cast(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Floating inputs in the model's dtype."""
    dtype = model.dtype
    return {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def outputs(value: Any) -> list[torch.Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in outputs(item)]
    return []


def run(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """One forward pass, with the same random numbers each time for models that draw some."""
    torch.manual_seed(2)
    with torch.no_grad():
        return outputs(model(**cast(inputs, model)))
