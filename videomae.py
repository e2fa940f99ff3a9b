"""VideoMAE in one file: hide most of a clip in tubes, reconstruct its pixels, keep the encoder.

    clip -> cubes -> tube mask -> encoder (visible cubes only) -> decoder (all positions) -> pixels of the hidden cubes

Read it top to bottom; data flows through it in the paper's order. The method is the part from "Cubes" to "Classifier";
before it are the config and the image processor, after it reading and writing published checkpoints. Shapes use one
letter each:

    B clips in the batch     T, H, W frames, rows, columns of pixels     C colour channels
    N cubes in a clip, T' x H' x W' of them; N_vis are visible, N_mask masked and to be predicted; M is any number
    D width of the encoder, D_dec width of the decoder, P numbers in one cube (tubelet_size * patch_size^2 * C)

References, and what this file was held against (test_videomae.py shows the equality, gradients included):
1. Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
   Pre-Training", NeurIPS 2022, https://arxiv.org/abs/2203.12602
2. the authors' code, https://github.com/MCG-NJU/VideoMAE: modeling_pretrain.py, modeling_finetune.py,
   masking_generator.py, engine_for_pretraining.py
3. transformers 5.23, models/videomae, whose class, argument and output names are used here

What differs from both, with the same numbers:
- One `patchify` serves the embedding and the target. A Conv3d whose stride is its kernel is a Linear over a cube's
  numbers, so only the visible cubes need to be embedded, and the target is cut from the masked ones alone.
- The mask becomes two lists of indices, visible and masked, once, instead of boolean indexing in several places.
- The encoder, which is kept, is one module; the decoder, thrown away after pretraining, is another.
- Uneven masks, 8-bit pixels and swapped axes, which would give wrong numbers in silence, are errors that say so.
"""
import argparse
import json
import logging
import math
import os
import pickle
import re
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; what the published checkpoints were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)

logger = logging.getLogger("videomae")  # what loading leaves out or makes new is said here, on stderr by default


# ----------------------------------------------------------------------------------------------------------------------
# Config

ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "selu": F.selu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}


@dataclass
class VideoMAEConfig:
    """Every number that shapes the model. Names and defaults are transformers' (ViT-B on 16 x 224 x 224).

    Raises ValueError naming the field. `VideoMAEConfig.preset("small")` gives a named size.
    """

    image_size: int | tuple[int, int] = 224  # one side of a square, or (height, width)
    patch_size: int = 16
    num_channels: int = 3
    num_frames: int = 16
    tubelet_size: int = 2  # frames in one cube
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str | Callable = "gelu"  # gelu, relu, selu, gelu_new, or a function of a tensor
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02  # std of the mask token and of the classifier's weights; see `init_block_weights`
    layer_norm_eps: float = 1e-12  # the authors' models: 1e-6
    qv_bias: bool = True  # a bias for queries and values; keys have none, see `Attention`
    # True: no norm at the end of the encoder; the classifier takes the mean of all tokens and normalizes that.
    # False: the encoder ends in a norm; the classifier takes token 0. Every published pretraining checkpoint: False.
    use_mean_pooling: bool = True
    decoder_num_attention_heads: int = 6
    decoder_hidden_size: int = 384
    decoder_num_hidden_layers: int = 4
    decoder_intermediate_size: int = 1536
    norm_pix_loss: bool = True  # predict each cube normalized by its own mean and std (paper, section 3)
    # Not in transformers' documentation of VideoMAE:
    num_labels: int = 2
    id2label: dict[int, str] | None = None  # the names of the labels; None: LABEL_0, LABEL_1, ...
    head_norm_eps: float = 1e-5  # eps of the norm before a head (decoder norm, fc_norm); the authors' models: 1e-6
    drop_path_rate: float = 0.0  # of the last encoder block; earlier blocks get proportionally less
    position_embedding: str = "sinusoid"  # the published table; "separable" learns faster in small models
    # For clips of another length or size than in pretraining. None: the table is made for this config's grid. The grid
    # (T', H', W') of pretraining: the table is made for that one and interpolated.
    position_grid: tuple[int, int, int] | None = None
    extra: dict = field(default_factory=dict)  # what a config.json says beside these fields; kept for saving

    @classmethod
    def preset(cls, name: str, **overrides) -> "VideoMAEConfig":
        """A named size from PRESETS, with any field overridden. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict) -> "VideoMAEConfig":
        """The contents of a transformers config.json, of any version. Fields not known here are kept in `extra`."""
        values = dict(values)
        if "qkv_bias" in values:  # transformers 4 and every file on the hub; transformers 5: qv_bias
            values.setdefault("qv_bias", values.pop("qkv_bias"))
        if values.get("id2label"):
            values["id2label"] = {int(i): label for i, label in values["id2label"].items()}
            values.setdefault("num_labels", len(values["id2label"]))
        return cls(**with_extra(cls, values))

    def to_dict(self) -> dict:
        """For a config.json that every transformers reads. Raises ValueError for a function as hidden_act."""
        if callable(self.hidden_act):
            raise ValueError(f"hidden_act: got {self.hidden_act!r}, a function cannot be written to a config.json; "
                             f"expected one of {', '.join(ACTIVATIONS)}")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        labels = self.id2label or {i: f"LABEL_{i}" for i in range(self.num_labels)}
        values |= dict(model_type="videomae", qkv_bias=values.pop("qv_bias"), id2label=labels,
                       label2id={label: i for i, label in labels.items()})
        del values["num_labels"]  # as in transformers, the number of names says it
        return {**values.pop("extra"), **values}

    def __post_init__(self):
        def check(name, condition, expected):
            if not condition:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        def is_count(value):
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        for name in ("image_size", "position_grid"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        size = self.image_size
        is_pair = isinstance(size, tuple) and len(size) == 2 and all(is_count(side) for side in size)
        check("image_size", is_count(size) or is_pair, "a positive int or (height, width)")
        for name in ("patch_size", "num_channels", "num_frames", "tubelet_size", "hidden_size", "num_hidden_layers",
                     "num_attention_heads", "intermediate_size", "decoder_num_attention_heads", "decoder_hidden_size",
                     "decoder_num_hidden_layers", "decoder_intermediate_size", "num_labels"):
            check(name, is_count(getattr(self, name)), "a positive int")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            value = getattr(self, name)
            check(name, isinstance(value, int | float) and 0 <= value < 1, "a number from 0 to below 1")
        for name in ("initializer_range", "layer_norm_eps", "head_norm_eps"):
            value = getattr(self, name)
            check(name, isinstance(value, int | float) and value > 0, "a number above 0")
        check("hidden_act", callable(self.hidden_act) or self.hidden_act in ACTIVATIONS,
              f"one of {', '.join(ACTIVATIONS)}, or a function of a tensor")
        check("position_embedding", self.position_embedding in ("sinusoid", "separable"), "'sinusoid' or 'separable'")
        grid, labels = self.position_grid, self.id2label
        check("position_grid", grid is None or len(grid) == 3 and all(map(is_count, grid)), "None or 3 positive ints")
        check("id2label", labels is None or sorted(labels) == list(range(self.num_labels)),
              f"None or a name for each of 0 to {self.num_labels - 1} (num_labels {self.num_labels})")

        check("image_size", not any(side % self.patch_size for side in self.image_hw),
              f"a multiple of patch_size {self.patch_size}")
        check("num_frames", self.num_frames % self.tubelet_size == 0, f"a multiple of tubelet_size {self.tubelet_size}")
        for width, heads in (("hidden_size", "num_attention_heads"),
                             ("decoder_hidden_size", "decoder_num_attention_heads")):
            count = getattr(self, heads)
            check(width, getattr(self, width) % count == 0, f"a multiple of {heads} {count}")
            check(width, self.position_embedding == "sinusoid" or getattr(self, width) >= 6,
                  "6 or more for separable positions")

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cubes along (time, height, width); (8, 14, 14) by default."""
        height, width = self.image_hw
        return self.num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, cubes in a clip; 1568 by default."""
        t, h, w = self.grid
        return t * h * w

    @property
    def cube_size(self) -> int:
        """P, numbers in one cube; 1536 by default."""
        return self.tubelet_size * self.patch_size**2 * self.num_channels


def _vit(width, layers, heads, decoder_width, decoder_layers, decoder_heads, **more):
    """The fields of a ViT whose MLPs are four times as wide as its tokens."""
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                decoder_hidden_size=decoder_width, decoder_num_hidden_layers=decoder_layers,
                decoder_num_attention_heads=decoder_heads, decoder_intermediate_size=4 * decoder_width, **more)


# small to huge: the sizes in the authors' modeling_pretrain.py, decoder depths from scripts/kinetics/*/pretrain.sh.
# giant: VideoMAE V2's, whose other sizes are these; its MLPs are 48 / 11 times as wide as its tokens.
# tiny and laptop: train_tiny.py's own. Small models learn much faster with the separable position table, see README.
_SMALL_MODEL = dict(layer_norm_eps=1e-6, head_norm_eps=1e-6, position_embedding="separable")
PRESETS = {
    "small": _vit(384, 12, 6, 192, 4, 3),
    "base": _vit(768, 12, 12, 384, 4, 6),
    "large": _vit(1024, 24, 16, 512, 12, 8),
    "huge": _vit(1280, 32, 16, 640, 12, 8),
    "giant": {**_vit(1408, 40, 16, 512, 4, 8, patch_size=14), "intermediate_size": 6144},
    "tiny": _vit(128, 4, 4, 96, 1, 3, image_size=32, patch_size=8, num_frames=8, **_SMALL_MODEL),
    "laptop": _vit(192, 6, 3, 96, 2, 3, image_size=112, **_SMALL_MODEL),
}


def with_extra(cls, values: dict) -> dict:
    """The fields of a dataclass that `values` holds, and under "extra" all else in it."""
    known = {f.name for f in fields(cls)} - {"extra"}
    unknown = {name: value for name, value in values.items() if name not in known | {"extra"}}
    return {name: value for name, value in values.items() if name in known} | {
        "extra": values.get("extra", {}) | unknown}


# ----------------------------------------------------------------------------------------------------------------------
# Image processor: frames as decoders give them -> pixel_values


class BatchFeature(dict):
    """{"pixel_values": ...}, which `pixel_values` gives as an attribute too; the name is transformers'."""

    @property
    def pixel_values(self):
        return self["pixel_values"]

    def to(self, *args, **kwargs) -> "BatchFeature":
        """The tensors on another device or in another type."""
        return BatchFeature({name: tensor.to(*args, **kwargs) for name, tensor in self.items()})


RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling -> torch's name


@dataclass
class VideoMAEImageProcessor:
    """Resize, crop the centre, scale to [0, 1], normalize. Arguments and defaults are transformers'.

    The default mean and std of 0.5 are the published class's; the published *checkpoints*, and the target of
    `VideoMAEForPreTraining`, use `image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD`.
    Source: transformers, image_processing_pil_videomae.py; equal to Pillow's resize within one 8-bit level on the CPU.
    Raises ValueError or TypeError naming the argument.
    """

    do_resize: bool = True
    size: int | dict = 224  # the short side, or {"shortest_edge": 224}, or {"height": 224, "width": 224}
    resample: int = 2  # 0 nearest, 2 bilinear, 3 bicubic
    do_center_crop: bool = True
    crop_size: int | dict = 224  # {"height": 224, "width": 224}, or one side of a square
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # one number per channel
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    extra: dict = field(default_factory=dict)  # what a preprocessor_config.json says beside these; kept for saving

    def __post_init__(self):
        if not isinstance(self.size, dict):
            self.size = {"shortest_edge": self.size}
        if not isinstance(self.crop_size, dict):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}
        if set(self.size) not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"size: got {self.size}, expected an int, 'shortest_edge', or 'height' and 'width'")
        if set(self.crop_size) != {"height", "width"}:
            raise ValueError(f"crop_size: got {self.crop_size}, expected an int, or 'height' and 'width'")
        if self.resample not in RESAMPLE:
            raise ValueError(f"resample: got {self.resample}, expected 0 (nearest), 2 (bilinear) or 3 (bicubic)")

    def __call__(self, videos, return_tensors: str | None = None, data_format: str = "channels_first",
                 input_data_format: str | None = None, **overrides) -> BatchFeature:
        """One video or a batch of them -> {"pixel_values": float32, as many frames as came in}.

        videos: a list of T frames, an array or tensor of 4 axes, or a list of such, or one of 5 axes. A frame is a PIL
            image, or an array or tensor (H, W), (H, W, C) or (C, H, W) with C = 1 or 3: 8-bit, or floats (in [0, 1]:
            say do_rescale=False). The frames of a video share a size, the videos of a batch need not.
        return_tensors: "pt": tensor (B, T, C, H, W), on the device of the input; "np": the same as an array; None: a
            list of arrays (T, C, H, W), one per video, which may differ in length and size.
        data_format: of the result; "channels_last" gives (..., H, W, C).
        input_data_format: "channels_first" or "channels_last"; inferred where C can only be one of the two axes.
        overrides: any field of the class, for this call.
        """
        settings = replace(self, **overrides)
        if data_format not in ("channels_first", "channels_last"):
            raise ValueError(f"data_format: got {data_format!r}, expected 'channels_first' or 'channels_last'")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors: got {return_tensors!r}, expected 'pt', 'np' or None")
        if not hasattr(videos, "__len__") or len(videos) == 0:
            raise ValueError(f"videos: got {type(videos).__name__}, expected one video or several, and at least one")
        first = videos[0]
        if getattr(videos, "ndim", 4) == 3 and videos.shape[-1] == 3:
            raise ValueError(f"videos: got one image of shape {tuple(videos.shape)}, expected a list of frames")
        is_one_video = hasattr(first, "getbands") or getattr(first, "ndim", 4) < 4  # getbands: a PIL image
        batch = [settings.process(stack_frames(video, input_data_format))
                 for video in ([videos] if is_one_video else videos)]
        if data_format == "channels_last":
            batch = [rearrange(video, "t c h w -> t h w c") for video in batch]
        if return_tensors is None:
            return BatchFeature(pixel_values=[video.cpu().numpy() for video in batch])
        shapes = {tuple(video.shape) for video in batch}
        if len(shapes) > 1:
            raise ValueError(f"videos: got clips that end as {sorted(shapes)}, expected one shape for the whole batch "
                             "(return_tensors=None gives a list)")
        pixel_values = torch.stack(batch) if len(batch) > 1 else batch[0][None]
        return BatchFeature(pixel_values=pixel_values if return_tensors == "pt" else pixel_values.cpu().numpy())

    def process(self, frames: Tensor) -> Tensor:
        """(T, C, H, W) uint8 or float -> (T, C, H', W') float32, or as it came where nothing is rescaled."""
        if self.do_rescale and frames.is_floating_point() and 0 < frames.max() <= 1:
            raise ValueError("do_rescale: got float frames within [0, 1], which are scaled already; expected "
                             "do_rescale=False with them, or values from 0 to 255")
        if self.do_resize:
            if "shortest_edge" in self.size:
                frames = resize_short_side(frames, self.size["shortest_edge"], self.resample)
            else:
                frames = resize(frames, (self.size["height"], self.size["width"]), self.resample)
        if self.do_center_crop:
            frames = center_crop(frames, self.crop_size["height"], self.crop_size["width"])
        if self.do_rescale or self.do_normalize:
            # Reordered while it is 8 bits a number (a resize leaves channels last); then new memory once, as that is
            # what takes the time, and in place from there.
            frames = frames.contiguous().to(torch.float32, copy=True)
        if self.do_rescale:
            frames.mul_(self.rescale_factor)
        if self.do_normalize:
            for name in ("image_mean", "image_std"):
                if len(getattr(self, name)) != frames.shape[1]:
                    raise ValueError(f"{name}: got {getattr(self, name)} for frames of {frames.shape[1]} channels, "
                                     "expected one number per channel")
            mean, std = (frames.new_tensor(x, dtype=torch.float32).view(-1, 1, 1)
                         for x in (self.image_mean, self.image_std))
            frames.sub_(mean).div_(std)
        return frames

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **overrides) -> "VideoMAEImageProcessor":
        """The preprocessor_config.json of a directory or of a hub id such as "MCG-NJU/videomae-base"."""
        values = read_json(source, "preprocessor_config.json")
        return cls(**with_extra(cls, values) | overrides)

    def save_pretrained(self, directory: str | os.PathLike):
        """Write preprocessor_config.json, for `from_pretrained` here and in transformers. Overwrites nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {"image_processor_type": "VideoMAEImageProcessor", **values.pop("extra"), **values}
        write_new({Path(directory) / "preprocessor_config.json": json.dumps(values, indent=2).encode()})


def stack_frames(video, input_data_format: str | None = None) -> Tensor:
    """One video, see `VideoMAEImageProcessor.__call__` -> (T, C, H, W) uint8 or float, on its device."""
    if not isinstance(video, Tensor | np.ndarray):
        frames = []
        for frame in video:
            if hasattr(frame, "getbands") and frame.mode not in ("RGB", "L"):
                raise ValueError(f"videos: got a PIL image of mode {frame.mode}, expected RGB or L; see its convert()")
            frames.append(frame if isinstance(frame, Tensor) else torch.from_numpy(np.array(frame)))
        shapes = {tuple(frame.shape) for frame in frames}
        if len(shapes) != 1:
            raise ValueError(f"videos: got frames of shapes {sorted(shapes)}, expected one shape in a video")
        video = torch.stack(frames)
    video = torch.as_tensor(video)
    if video.ndim == 3:  # grey frames (H, W)
        video, input_data_format = video[..., None], "channels_last"
    if video.ndim != 4:
        raise ValueError(f"videos: got a video of shape {tuple(video.shape)}, expected frames (H, W), (H, W, C) or "
                         "(C, H, W)")
    could_be = [name for name, size in (("channels_first", video.shape[1]), ("channels_last", video.shape[3]))
                if size in (1, 3)]
    if input_data_format is None and len(could_be) == 2:
        raise ValueError(f"input_data_format: frames of shape {tuple(video.shape[1:])} may be either, expected "
                         "'channels_first' or 'channels_last'")
    if not could_be or input_data_format not in (None, *could_be):
        raise ValueError(f"videos: got frames of shape {tuple(video.shape[1:])}, expected 1 or 3 channels "
                         f"({input_data_format or 'first or last'})")
    if (input_data_format or could_be[0]) == "channels_last":
        video = rearrange(video, "t h w c -> t c h w")
    if video.dtype == torch.bool or video.is_complex():
        raise TypeError(f"videos: got frames of {video.dtype}, expected 8-bit or float frames")
    if video.is_floating_point() or video.dtype == torch.uint8:
        return video
    if video.min() < 0 or video.max() > 255:
        raise ValueError(f"videos: got integers from {video.min()} to {video.max()}, expected 0 to 255")
    return video.to(torch.uint8)


def resize_short_side(frames: Tensor, short_side: int, resample: int = 2) -> Tensor:
    """(T, C, H, W) -> the same, min(H, W) == short_side; the other side is truncated, as in transformers."""
    height, width = frames.shape[-2:]
    if height <= width:
        return resize(frames, (short_side, int(short_side * width / height)), resample)
    return resize(frames, (int(short_side * height / width), short_side), resample)


def resize(frames: Tensor, size: tuple[int, int], resample: int = 2) -> Tensor:
    """(T, C, H, W) -> (T, C, *size), uint8 or else float32; `resample` as in VideoMAEImageProcessor.

    8-bit frames on the CPU come out as from Pillow: where torch's own 8-bit resize agrees with it within one level
    (bilinear, sides in proportion) by that, which is over ten times faster; else by Pillow, which is needed then.
    """
    height, width = frames.shape[-2:]
    if size == (height, width):
        return frames
    if frames.dtype == torch.uint8 and frames.device.type == "cpu":
        if resample == 2 and abs(size[0] * width / (size[1] * height) - 1) < 0.1:
            frames = frames.contiguous(memory_format=torch.channels_last)  # the layout of the path that agrees
            return F.interpolate(frames, size=size, mode="bilinear", antialias=True)
        image = optional_import("PIL.Image", "pillow")
        return torch.stack([
            torch.stack([torch.from_numpy(np.array(image.fromarray(channel.numpy()).resize(size[::-1], resample)))
                         for channel in frame]) for frame in frames])
    pixels = F.interpolate(frames.float(), size=size, mode=RESAMPLE[resample], antialias=resample != 0)
    return pixels if frames.is_floating_point() else (pixels + 0.5).floor().clamp(0, 255).to(torch.uint8)


def center_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width) about the centre. Raises ValueError where the frame is smaller."""
    h, w = frames.shape[-2:]
    if h < height or w < width:
        raise ValueError(f"crop_size: {height} x {width} is larger than the resized frame of {h} x {w}")
    top, left = (h - height) // 2, (w - width) // 2
    return frames[..., top : top + height, left : left + width]


def normalize(frames: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float32, (x / 255 - mean) / std with ImageNet's. Raises TypeError for another dtype."""
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames: got {frames.dtype}, expected 8-bit frames (uint8, 0 to 255)")
    mean, std = (torch.tensor(x, device=frames.device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (frames.float() / 255 - mean) / std


def denormalize(pixels: Tensor) -> Tensor:
    """Undo `normalize`: (..., C), channels last -> [0, 1].

    Where C is not 3 the pixels come back as they are: those statistics are of RGB.
    """
    if pixels.shape[-1] != 3:
        return pixels
    return torch.addcmul(pixels.new_tensor(IMAGENET_MEAN), pixels, pixels.new_tensor(IMAGENET_STD))


# ----------------------------------------------------------------------------------------------------------------------
# Cubes: the tokens of a video (paper, section 3: joint space-time cube embedding)


def patchify(video: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """(B, T, C, H, W) -> (B, N, P): cut the clip into cubes of tubelet_size x patch_size x patch_size pixels.

    Cubes are in (time, row, column) order; the numbers of a cube in (frame, row, column, channel) order.
    """
    return rearrange(video, "b (t pt) c (h ph) (w pw) -> b (t h w) (pt ph pw c)",
                     pt=tubelet_size, ph=patch_size, pw=patch_size)


def unpatchify(cubes: Tensor, grid: tuple[int, int, int], tubelet_size: int, patch_size: int) -> Tensor:
    """(B, N, P) -> (B, T, C, H, W), the inverse of `patchify`; `grid` is the cubes along (time, height, width)."""
    t, h, w = grid
    return rearrange(cubes, "b (t h w) (pt ph pw c) -> b (t pt) c (h ph) (w pw)",
                     t=t, h=h, w=w, pt=tubelet_size, ph=patch_size, pw=patch_size)


# ----------------------------------------------------------------------------------------------------------------------
# Masks (paper, section 3)
#
# Consecutive frames are nearly the same picture. If a cube is hidden at one time but visible at the next, the model can
# copy instead of understand. A *tube* hides the same place at every time, so what is behind it has to be inferred from
# how the rest of the scene looks and moves. And most places are hidden, 90 % in the paper: with fewer, a gap is filled
# from what is next to it.


def random_mask(kind: str, batch_size: int, grid: tuple[int, int, int], mask_ratio: float,
                generator: torch.Generator | None = None) -> Tensor:
    """(B, N) bool on the CPU, True = masked, a fresh mask per clip with the same count in every clip.

    kind "tube": the same int(mask_ratio * H'W') places at every time. The method.
         "random": int(mask_ratio * N) cubes anywhere.      | The paper compares both.
         "frame": all cubes of int(mask_ratio * T') times.  |
    Raises ValueError for an unknown kind, or a ratio that masks nothing or everything.
    Source: the authors' masking_generator.py (tube).
    """
    time, space = grid[0], grid[1] * grid[2]
    drawn = {"tube": (1, space), "frame": (time, 1), "random": (time, space)}  # what is drawn; the rest repeats it
    if kind not in drawn:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(drawn)}")
    num_drawn = math.prod(drawn[kind])
    num_masked = int(mask_ratio * num_drawn)
    if not 0 < num_masked < num_drawn:
        raise ValueError(f"mask_ratio: {mask_ratio} masks {num_masked} of {num_drawn} {kind} places, expected to mask "
                         "some and to leave some")
    shuffled = torch.rand(batch_size, num_drawn, generator=generator, device="cpu").argsort(dim=1)
    mask = shuffled < num_masked  # (B, num_drawn)
    return mask.view(batch_size, *drawn[kind]).expand(batch_size, time, space).flatten(1)


def running_cells(batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Tensor:
    """(B, N) bool on the CPU, True = to be predicted: half of the cubes, for `split_mask`. Not in VideoMAE, but in V2.

    V2's *dual masking*: video repeats itself, so half of the masked cubes are worth predicting nearly as well as all of
    them, for a little over half of the decoder's work. Of each 2 x 2 places two are predicted, and which two moves on
    with time, so that each place is at two of any four times: with a tube mask, half of the masked cubes in every clip.
    Raises ValueError unless T' is a multiple of 4. Source: Wang et al., "VideoMAE V2", CVPR 2023, and its
    masking_generator.py; that code gives the decoder mask tokens at visible places too, and no loss for them.
    """
    if grid[0] % 4:
        raise ValueError(f"grid: got {grid[0]} cubes in time, expected a multiple of 4, after which the cells repeat")
    time, row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")  # (T', H', W') each
    start = torch.randint(4, (batch_size, 1, 1, 1), generator=generator)
    return ((2 * (row % 2) + column % 2 + time + start) % 4 >= 2).flatten(1)


def split_mask(bool_masked_pos: Tensor, predicted: Tensor | None = None) -> tuple[Tensor, ...]:
    """(B, N) bool -> indices of the visible (B, N_vis) and of the masked cubes (B, N_mask), each in increasing order.

    predicted: (B, N) bool, see `running_cells`. The masked cubes are then only those to be predicted, and a third list
    has the others, which neither the encoder nor the decoder sees.
    Raises TypeError or ValueError unless the mask is a bool (B, N) with the same count in every clip and something left
    visible. Clips of different counts could not share a batch: where the total happens to divide, a reshape would move
    tokens from one clip into another in silence.
    """
    if not isinstance(bool_masked_pos, Tensor) or bool_masked_pos.dtype != torch.bool:
        got = bool_masked_pos.dtype if isinstance(bool_masked_pos, Tensor) else type(bool_masked_pos).__name__
        raise TypeError(f"bool_masked_pos: got {got}, expected a bool tensor, True = masked")
    if bool_masked_pos.ndim != 2 or len(bool_masked_pos) == 0:
        raise ValueError(f"bool_masked_pos: got shape {tuple(bool_masked_pos.shape)}, expected (batch, cubes)")
    if bool_masked_pos[0].all():
        raise ValueError("bool_masked_pos: every cube is masked, expected some to be visible")
    parts = [~bool_masked_pos, bool_masked_pos]
    if predicted is not None:
        if predicted.dtype != torch.bool or predicted.shape != bool_masked_pos.shape:
            raise ValueError(f"predicted: got {predicted.dtype} of shape {tuple(predicted.shape)}, expected bool of "
                             f"shape {tuple(bool_masked_pos.shape)}, as the mask")
        parts[1:] = bool_masked_pos & predicted, bool_masked_pos & ~predicted
    for part in parts[1:]:
        counts = part.sum(dim=1).tolist()
        if len(set(counts)) > 1:
            name = "bool_masked_pos" if predicted is None else "bool_masked_pos and predicted"
            raise ValueError(f"{name}: got {counts} masked cubes per clip, expected the same count in each")
    return tuple(part.nonzero()[:, 1].view(len(part), -1) for part in parts)


def mask_indices(bool_masked_pos: Tensor | tuple[Tensor, ...], cubes: Tensor) -> tuple[Tensor, Tensor]:
    """A mask, or what `split_mask` made of it -> the indices of visible and masked cubes, on the device of cubes
    (B, N, P).

    Splitting a mask on a GPU waits for the GPU, and splitting one at all breaks a compiled graph; indices made on the
    CPU do neither.
    """
    parts = bool_masked_pos if isinstance(bool_masked_pos, tuple) else split_mask(bool_masked_pos)
    num_cubes = sum(part.shape[1] for part in parts)
    if any((len(part), num_cubes) != cubes.shape[:2] for part in parts):
        raise ValueError(f"bool_masked_pos: got {num_cubes} cubes for {len(parts[0])} clips, expected (batch, cubes in "
                         f"a clip) = {tuple(cubes.shape[:2])}")
    visible, masked = (part.to(cubes.device, non_blocking=cubes.is_cuda) for part in parts[:2])
    return visible, masked


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, D), index (B, M) -> (B, M, D): the indexed tokens of each clip."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]


# ----------------------------------------------------------------------------------------------------------------------
# The transformer block (a plain pre-norm ViT; joint attention over space and time; paper, section 3)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a clip, (B, N, D) -> (B, N, D).

    Queries and values have a bias, as published; keys have none: q . (k + b) adds the same q . b to every score of a
    query, and softmax removes what is common to all of them.
    """

    def __init__(self, dim: int, num_heads: int, config: VideoMAEConfig):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False,
                queries: slice = slice(None)):
        """-> (B, M, D), and where asked for the attention weights (B, heads, M, N), else None.

        head_mask (heads,) multiplies the weights of each head: 0 switches it off. queries: which M tokens to compute,
        all N unless said; they still attend to every token.
        """
        qkv = self.qkv(x)  # (B, N, 3 D)
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv += bias.to(qkv.dtype)  # in place, for it is large; cast, for adding 32 bits to 16 is slow
        q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (heads d) -> b heads n d", heads=self.num_heads) for t in (q[:, queries], k, v))
        dropout = self.attention_dropout if self.training else 0.0
        if head_mask is None and not output_attentions:
            weights = None
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, heads, N, D / heads)
        else:  # the same, written out: the fused kernel above never holds the weights
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, N, N)
            weights = F.dropout(weights, dropout)
            if head_mask is not None:
                weights = weights * head_mask.view(-1, 1, 1)
            x = weights @ v
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)")), weights if output_attentions else None


class MLP(nn.Module):
    """Two linear layers with an activation between, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden_dim: int, config: VideoMAEConfig):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = config.hidden_act if callable(config.hidden_act) else ACTIVATIONS[config.hidden_act]
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D), for the encoder and, at its own width, the decoder."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, config: VideoMAEConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = Attention(dim, num_heads, config)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(dim, hidden_dim, config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = drop_path

    def forward(self, x: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False,
                queries: slice = slice(None)):
        """-> (B, M, D), and the attention weights or None; for `queries` see `Attention`."""
        attended, weights = self.attn(self.norm1(x), head_mask, output_attentions, queries)
        x = x[:, queries] + self.branch(attended)
        return x + self.branch(self.mlp(self.norm2(x))), weights

    def branch(self, x: Tensor) -> Tensor:
        """Dropout, then drop path: in training, skip the whole branch for a random share of the clips."""
        x = self.dropout(x)
        if not self.training or self.drop_path == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.drop_path)
        return x * keep / (1 - self.drop_path)


def init_block_weights(module: nn.Module):
    """Xavier-uniform weights and zero biases, as in the authors' modeling_pretrain.py, for `blocks.apply(...)`.

    transformers draws every weight from normal(0, initializer_range = 0.02) instead, a scale chosen for widths near
    768; Xavier's follows the width, which the small models here need.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Positions: fixed, not learned, not in the checkpoints


def sinusoid_table(num_positions: int, dim: int) -> np.ndarray:
    """(num_positions, dim) float64: sin and cos interleaved, angle position / 10000^(2 floor(j / 2) / dim)."""
    position, j = np.arange(num_positions)[:, None], np.arange(dim)
    angle = position / 10000 ** (2 * (j // 2) / dim)
    return np.where(j % 2 == 0, np.sin(angle), np.cos(angle))


def position_table(config: VideoMAEConfig, dim: int) -> Tensor:
    """(N, dim) float32, one row per cube.

    "sinusoid", the published one: a single sinusoid over the index of the flattened (time, row, column) grid. The same
    place one step later is H'W' further on, and the model has to learn that the two are neighbours.
    "separable": time, row and column each get a sinusoid in a third of the width, so neighbours along any of the three
    share the code of the other two. README compares them on small models.
    With `position_grid` the table is made for that grid and interpolated, linearly along each of the three axes.
    """
    t, h, w = config.position_grid or config.grid
    if config.position_embedding == "sinusoid":
        table = sinusoid_table(t * h * w, dim)
    else:
        third = dim // 6 * 2  # even, so that each sin keeps its cos; time takes what is left over
        time = repeat(sinusoid_table(t, dim - 2 * third), "t d -> (t h w) d", h=h, w=w)
        row = repeat(sinusoid_table(h, third), "h d -> (t h w) d", t=t, w=w)
        column = repeat(sinusoid_table(w, third), "w d -> (t h w) d", t=t, h=h)
        table = np.concatenate([time, row, column], axis=1)
    table = torch.from_numpy(table)  # float64
    if (t, h, w) != config.grid:
        table = rearrange(table, "(t h w) d -> 1 d t h w", t=t, h=h)
        table = F.interpolate(table, size=config.grid, mode="trilinear")
        table = rearrange(table, "1 d t h w -> (t h w) d")
    return table.float()


# ----------------------------------------------------------------------------------------------------------------------
# Encoder: what is kept (its last norm apart, see `use_mean_pooling`)


def check_pixel_values(pixel_values: Tensor, config: VideoMAEConfig):
    """Raise TypeError or ValueError unless pixel_values is a float (B, T, C, H, W) of the config's sizes."""
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values: got {got}, expected a float tensor; 8-bit frames go through "
                        "VideoMAEImageProcessor or normalize() first")
    expected = (config.num_frames, config.num_channels, *config.image_hw)
    if tuple(pixel_values.shape[1:]) != expected or pixel_values.shape[0] == 0:
        raise ValueError(f"pixel_values: got shape {tuple(pixel_values.shape)}, expected (batch, num_frames, "
                         f"num_channels, height, width) = (batch, {', '.join(map(str, expected))})")


class BaseModelOutput(NamedTuple):
    """What the encoder gives."""

    last_hidden_state: Tensor  # (B, N_vis, D); N_vis = N without a mask
    hidden_states: tuple[Tensor, ...] | None = None  # the embedding and every block's output, (B, N_vis, D) each
    attentions: tuple[Tensor, ...] | None = None  # every block's weights after the head mask, (B, heads, N_vis, N_vis)


def as_tuple(output: tuple, return_dict: bool | None) -> tuple:
    """`return_dict=False`, as published: a plain tuple of the fields that are not None."""
    return tuple(value for value in output if value is not None) if return_dict is False else output


class VideoMAEModel(nn.Module):
    """The encoder. With a mask it sees the visible cubes only: at a ratio of 0.9, a tenth of the tokens."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config
        dim, num_layers = config.hidden_size, config.num_hidden_layers
        # nn.Linear's own initialization is that of the authors' Conv3d, which this layer equals.
        self.embed = nn.Linear(config.cube_size, dim)
        self.register_buffer("positions", position_table(config, dim), persistent=False)  # (N, D)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_attention_heads, config.intermediate_size, config,
                  drop_path=config.drop_path_rate * i / max(num_layers - 1, 1))
            for i in range(num_layers)
        ).apply(init_block_weights)
        # The mean-pooled classifier drops this norm and has one after the mean instead (`fc_norm`).
        self.norm = nn.Identity() if config.use_mean_pooling else nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | tuple[Tensor, ...] | None = None,
                head_mask: Tensor | None = None, output_attentions: bool = False,
                output_hidden_states: bool = False, return_dict: bool | None = None) -> BaseModelOutput | tuple:
        """Encode a clip, or its visible cubes.

        pixel_values: (B, T, C, H, W) float, normalized as in pretraining: `normalize`, or VideoMAEImageProcessor with
            IMAGENET_MEAN and IMAGENET_STD.
        bool_masked_pos: (B, N) bool, True = hidden from the encoder, the same count in every clip; or what `split_mask`
            made of it; None hides nothing.
        head_mask: (heads,) or (layers, heads), 1 keeps a head and 0 switches it off.
        output_attentions, output_hidden_states: keep them; attention weights need memory for N_vis^2 numbers a head.
        Returns last_hidden_state (B, N_vis, D), visible cubes in increasing order.
        Raises TypeError or ValueError naming the argument.
        """
        check_pixel_values(pixel_values, self.config)
        cubes, positions = patchify(pixel_values, self.config.tubelet_size, self.config.patch_size), self.positions
        if bool_masked_pos is not None:
            visible, _ = mask_indices(bool_masked_pos, cubes)
            cubes, positions = take(cubes, visible), positions[visible]
        return as_tuple(self.encode(cubes, positions, head_mask, output_attentions, output_hidden_states), return_dict)

    def encode(self, cubes: Tensor, positions: Tensor, head_mask: Tensor | None = None,
               output_attentions: bool = False, output_hidden_states: bool = False) -> BaseModelOutput:
        """cubes (B, N_vis, P), their positions (N_vis, D) or (B, N_vis, D), and `forward`'s options."""
        num_layers, num_heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if head_mask is not None:
            if head_mask.shape not in ((num_heads,), (num_layers, num_heads)):
                raise ValueError(f"head_mask: got shape {tuple(head_mask.shape)}, expected (num_attention_heads,) or "
                                 f"(num_hidden_layers, num_attention_heads) = ({num_layers}, {num_heads})")
            head_mask = head_mask.to(cubes).expand(num_layers, num_heads)
        x = self.embed(cubes) + positions
        hidden_states, attentions = [x], []
        for i, block in enumerate(self.blocks):
            x, weights = block(x, None if head_mask is None else head_mask[i], output_attentions)
            if output_hidden_states:
                hidden_states.append(x)
            attentions.append(weights)
        return BaseModelOutput(self.norm(x), tuple(hidden_states) if output_hidden_states else None,
                               tuple(attentions) if output_attentions else None)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **config_overrides) -> "VideoMAEModel":
        """The encoder of any published checkpoint; see `load_pretrained`."""
        return load_pretrained(cls, source, config_overrides)

    def save_pretrained(self, directory: str | os.PathLike):
        """Write config.json and model.safetensors; see `save_pretrained`."""
        save_pretrained(self, directory)


# ----------------------------------------------------------------------------------------------------------------------
# Decoder and loss: what is thrown away after pretraining


class VideoMAEDecoder(nn.Module):
    """Predict the masked cubes from the encoded visible ones. Narrow and shallow, because it works on all N tokens."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        dim = config.decoder_hidden_size
        self.encoder_to_decoder = nn.Linear(config.hidden_size, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # the same learned vector wherever a cube is hidden
        std = config.initializer_range
        nn.init.trunc_normal_(self.mask_token, std=std, a=-std, b=std)  # the authors', cut at one std
        self.register_buffer("positions", position_table(config, dim), persistent=False)  # (N, D_dec)
        self.blocks = nn.ModuleList(
            Block(dim, config.decoder_num_attention_heads, config.decoder_intermediate_size, config)
            for _ in range(config.decoder_num_hidden_layers)
        ).apply(init_block_weights)
        self.norm = nn.LayerNorm(dim, eps=config.head_norm_eps)
        self.head = nn.Linear(dim, config.cube_size).apply(init_block_weights)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """encoded (B, N_vis, D), visible (B, N_vis), masked (B, N_mask) -> predictions (B, N_mask, P)."""
        # Tokens need not go back to their places: each carries its position, and attention does not care for order.
        x = torch.cat([self.encoder_to_decoder(encoded) + self.positions[visible],
                       self.mask_token + self.positions[masked]], dim=1)  # (B, N_vis + N_mask, D_dec)
        *blocks, last = self.blocks
        for block in blocks:
            x, _ = block(x)
        x, _ = last(x, queries=slice(visible.shape[1], None))  # (B, N_mask, D_dec): only these are predicted
        return self.head(self.norm(x))


class VideoMAEForPreTrainingOutput(NamedTuple):
    """What a pretraining step gives."""

    loss: Tensor  # () mean squared error over the masked cubes
    logits: Tensor  # (B, N_mask, P) predicted cubes, in increasing order of position
    hidden_states: tuple[Tensor, ...] | None = None  # the encoder's, see BaseModelOutput
    attentions: tuple[Tensor, ...] | None = None


class Reconstruction(NamedTuple):
    """Three videos to look at, see `VideoMAEForPreTraining.reconstruct`."""

    original: Tensor  # (B, T, C, H, W) in [0, 1]; where C is not 3, as it came
    masked: Tensor  # (B, T, C, H, W): the original, masked cubes grey
    reconstruction: Tensor  # (B, T, C, H, W): visible cubes as they are, masked cubes as predicted
    borrows_truth: bool  # True with norm_pix_loss: each predicted cube took its mean and std from the original


def normalize_cubes(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ImageNet-normalized pixels (B, M, pixels, C) -> each cube and channel normalized by its own mean and std, and
    these two, (B, M, 1, C). Source: engine_for_pretraining.py."""
    # Published code first goes back to [0, 1] and there adds 1e-6 to the std; the rest of going back cancels out.
    eps = 1e-6 / pixels.new_tensor(IMAGENET_STD) if pixels.shape[-1] == 3 else 1e-6
    mean = pixels.mean(dim=2, keepdim=True)
    centred = pixels - mean
    # Unbiased, as published. torch.var_mean is several times slower along such a dimension.
    std = (centred.square().sum(dim=2, keepdim=True) / (pixels.shape[2] - 1)).sqrt() + eps
    return centred / std, mean, std


class VideoMAEForPreTraining(nn.Module):
    """Masked autoencoder: encoder -> decoder -> loss on the masked cubes (paper, section 3).

    As the published checkpoints, give it a config with `use_mean_pooling=False`: the encoder then ends in a norm.
    """

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config
        self.videomae = VideoMAEModel(config)
        self.decoder = VideoMAEDecoder(config)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | tuple[Tensor, ...],
                head_mask: Tensor | None = None, output_attentions: bool = False,
                output_hidden_states: bool = False,
                return_dict: bool | None = None) -> VideoMAEForPreTrainingOutput | tuple:
        """Predict the masked cubes of a clip and compare them with the truth.

        pixel_values: (B, T, C, H, W) float, normalized with ImageNet's mean and std.
        bool_masked_pos: (B, N) bool, True = masked, the same count in every clip, see `random_mask`; or what
            `split_mask` made of it, which is what torch.compile(fullgraph=True) takes.
        The other arguments are the encoder's; see `VideoMAEModel`. Raises TypeError or ValueError naming the argument.
        """
        check_pixel_values(pixel_values, self.config)
        cubes = patchify(pixel_values, self.config.tubelet_size, self.config.patch_size)  # (B, N, P)
        visible, masked = mask_indices(bool_masked_pos, cubes)
        if masked.shape[1] == 0:
            raise ValueError("bool_masked_pos: no cube is masked, so there is nothing to predict")

        # The clip falls into what is seen and what is to be predicted. The target comes first: what it takes on the way
        # is gone from memory before the activations fill it.
        seen, target = take(cubes, visible), self.target(take(cubes, masked))  # (B, N_vis, P), (B, N_mask, P)
        del cubes
        # `encode` and not `forward`: the clip is cut and the mask split only once, above.
        encoded, hidden_states, attentions = self.videomae.encode(
            seen, self.videomae.positions[visible], head_mask, output_attentions, output_hidden_states)
        logits = self.decoder(encoded, visible, masked)  # (B, N_mask, P)
        loss = F.mse_loss(logits.float(), target)
        return as_tuple(VideoMAEForPreTrainingOutput(loss, logits, hidden_states, attentions), return_dict)

    def target(self, cubes: Tensor) -> Tensor:
        """What to predict for some cubes, (B, M, P) -> (B, M, P): their pixels, with `norm_pix_loss` normalized.

        Normalizing each cube by its own mean and std, per channel, takes the brightness out of the task and leaves the
        structure: the paper, and MAE (He et al., the same idea on images), find it learns better features. Else the
        pixels are those in [0, 1].
        """
        pixels = self.to_pixels(cubes)
        pixels = normalize_cubes(pixels)[0] if self.config.norm_pix_loss else denormalize(pixels)
        return rearrange(pixels, "b m pixels c -> b m (pixels c)")

    def to_pixels(self, cubes: Tensor) -> Tensor:
        """(B, M, P) -> (B, M, P / C, C) float32."""
        return rearrange(cubes.float(), "b m (pixels c) -> b m pixels c", c=self.config.num_channels)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> Reconstruction:
        """The pictures of a forward pass, for a clip and a mask (B, N); call `eval()` first. Not clamped to [0, 1].

        A `norm_pix_loss` model predicts no brightness and no contrast. To draw its cubes, each borrows the mean and std
        of the true one, and `borrows_truth` is set: say so under the picture.
        """
        logits = self(pixel_values, bool_masked_pos).logits  # (B, N_mask, P)
        bool_masked_pos = bool_masked_pos.to(pixel_values.device)
        pixels = self.to_pixels(patchify(pixel_values, self.config.tubelet_size, self.config.patch_size))
        predicted = self.to_pixels(logits)
        if self.config.norm_pix_loss:
            _, mean, std = normalize_cubes(pixels[bool_masked_pos].view(len(pixels), -1, *pixels.shape[2:]))
            predicted = denormalize(predicted * std + mean)
        pixels = denormalize(pixels)
        grey, filled = pixels.clone(), pixels.clone()
        grey[bool_masked_pos] = 0.5
        filled[bool_masked_pos] = predicted.flatten(0, 1)

        def to_video(pixels):  # (B, N, P / C, C) -> (B, T, C, H, W)
            return unpatchify(pixels.flatten(2), self.config.grid, self.config.tubelet_size, self.config.patch_size)

        return Reconstruction(to_video(pixels), to_video(grey), to_video(filled), self.config.norm_pix_loss)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **config_overrides) -> "VideoMAEForPreTraining":
        """A published pretraining checkpoint; see `load_pretrained`."""
        return load_pretrained(cls, source, config_overrides)

    def save_pretrained(self, directory: str | os.PathLike):
        """Write config.json and model.safetensors; see `save_pretrained`."""
        save_pretrained(self, directory)


# ----------------------------------------------------------------------------------------------------------------------
# Classifier: the encoder and one linear layer


class ImageClassifierOutput(NamedTuple):
    """What the classifier gives; the name is transformers'."""

    loss: Tensor | None  # () where labels were given
    logits: Tensor  # (B, num_labels)
    hidden_states: tuple[Tensor, ...] | None = None  # the encoder's, see BaseModelOutput
    attentions: tuple[Tensor, ...] | None = None


class VideoMAEForVideoClassification(nn.Module):
    """All cubes through the encoder, mean over the tokens, norm, linear; with `use_mean_pooling=False` the norm is the
    encoder's and the first token stands for all."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config
        self.videomae = VideoMAEModel(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.head_norm_eps) if config.use_mean_pooling else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.trunc_normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor, head_mask: Tensor | None = None, labels: Tensor | None = None,
                output_attentions: bool = False, output_hidden_states: bool = False,
                return_dict: bool | None = None) -> ImageClassifierOutput | tuple:
        """Classify clips.

        pixel_values: (B, T, C, H, W) float, normalized.
        labels: (B,) int64 class indices for a cross-entropy loss; with num_labels == 1, (B,) floats for a mean squared
            error.
        The other arguments are the encoder's; see `VideoMAEModel`. Raises TypeError or ValueError naming the argument.
        """
        x, hidden_states, attentions = self.videomae(
            pixel_values, None, head_mask, output_attentions, output_hidden_states)  # (B, N, D)
        # VideoMAE has no [CLS] token: without mean pooling the first cube's token stands for the clip, as published.
        x = self.fc_norm(x.mean(dim=1)) if self.fc_norm is not None else x[:, 0]  # (B, D)
        logits = self.classifier(x)
        loss = None if labels is None else self.loss(logits, labels)
        return as_tuple(ImageClassifierOutput(loss, logits, hidden_states, attentions), return_dict)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, num_labels), labels (B,) -> (); cross-entropy, or with num_labels == 1 regression."""
        is_regression = self.config.num_labels == 1
        if labels.is_floating_point() != is_regression or labels.shape != logits.shape[:1]:
            expected = "floats (num_labels is 1: regression)" if is_regression else "integer class indices"
            raise ValueError(f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, expected {expected} of shape "
                             f"({len(logits)},)")
        return F.mse_loss(logits[:, 0], labels) if is_regression else F.cross_entropy(logits, labels.long())

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **config_overrides) -> "VideoMAEForVideoClassification":
        """A published classifier, or the encoder of a pretraining checkpoint and a new head; see `load_pretrained`.

        The config of a pretraining checkpoint says `use_mean_pooling=False`: the classifier then takes the first token,
        as in transformers. The authors fine-tune with `use_mean_pooling=True`, which can be given here.
        """
        return load_pretrained(cls, source, config_overrides)

    def save_pretrained(self, directory: str | os.PathLike):
        """Write config.json and model.safetensors; see `save_pretrained`."""
        save_pretrained(self, directory)


# ----------------------------------------------------------------------------------------------------------------------
# Published weights: every format in, transformers' out

# (transformers' name, ours), replaced in this order when loading and backwards when saving.
TRANSFORMERS_NAMES = [
    ("embeddings.patch_embeddings.projection.", "embed."),
    ("encoder.layer.", "blocks."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.attention.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
]
# (pattern, ours), replaced after those: the authors' names, also VideoMAE V2's, and what else there is. Loading only.
OTHER_NAMES = [
    (r"query\.bias", "q_bias"),  # a model built in transformers 5; every file on the hub has q_bias
    (r"value\.bias", "v_bias"),
    (r"layernorm\.", "norm."),
    (r"^encoder\.", "videomae."),
    (r"^(patch_embed|embed|blocks|norm)\.", r"videomae.\1."),  # an encoder alone, or a classifier of the authors
    (r"patch_embed\.proj", "embed"),
    (r"^head\.", "classifier."),
    (r"^(encoder_to_decoder|mask_token)", r"decoder.\1"),
]
# Heads by width where they are not 64 wide: huge, giant and huge's decoder.
PUBLISHED_HEADS = {1280: 16, 1408: 16, 640: 8}


def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the authors' code, of VideoMAE V2 or of transformers -> the names and shapes of the classes here.

    Two things differ beside names: transformers keeps query, key and value apart, here they are one matrix as in the
    authors' files; a Conv3d weight (D, C, pt, ph, pw) becomes a Linear's over a cube, (D, pt ph pw C). Names of an
    encoder alone come back with "videomae." in front. Names that are not known come back as they are.
    Raises ValueError where there is no cube embedding, and for cosine attention (some VideoMAE V2 models).
    """
    out = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"^(model|module)\.", "", name)  # wrappers the weights were saved in
        for theirs, ours in TRANSFORMERS_NAMES:
            name = name.replace(theirs, ours)
        for pattern, replacement in OTHER_NAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    cosine = [name for name in out if name.endswith(("attn.scale", "attn.logit_scale"))]
    if cosine:
        raise ValueError(f"state_dict: {cosine[0]} belongs to a model with cosine attention, another architecture that "
                         "is not supported; expected plain attention")
    for name in [name for name in out if name.endswith("attn.query.weight")]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in out for part in parts):
            out[name.replace("query", "qkv")] = torch.cat([out.pop(part) for part in parts])
    name = "videomae.embed.weight"
    if name not in out:
        raise ValueError(f"state_dict: no cube embedding among its {len(state_dict)} names {list(state_dict)[:3]} ..., "
                         "expected the state dict of a VideoMAE")
    if out[name].ndim == 5:
        out[name] = rearrange(out[name], "d c pt ph pw -> d (pt ph pw c)")
    return out


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of one of the three models, in transformers' names and shapes: `convert_state_dict` undone."""
    config, out = model.config, {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^decoder\.(encoder_to_decoder|mask_token)", r"\1", name)
        if name.endswith("embed.weight"):
            tensor = rearrange(tensor, "d (pt ph pw c) -> d c pt ph pw", pt=config.tubelet_size, ph=config.patch_size,
                               pw=config.patch_size)
        parts = {name: tensor}
        if name.endswith("attn.qkv.weight"):
            parts = {name.replace("qkv", part): rows
                     for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True)}
        for name, tensor in parts.items():
            for theirs, ours in TRANSFORMERS_NAMES[::-1]:
                name = name.replace(ours, theirs)
            out[re.sub(r"^(videomae\.)?norm\.", r"\1layernorm.", name)] = tensor.contiguous()
    return out


def read_weights(path: Path) -> dict[str, Tensor]:
    """A .safetensors file, or a .bin, .pth or .pt of torch.save -> its state dict. Nothing in the file is executed.

    A state dict may be under "model", "module" or "state_dict", as in the authors' files. Raises ValueError naming a
    file that is truncated or damaged, is no checkpoint, or holds code.
    """
    if path.suffix == ".safetensors":
        load_file = optional_import("safetensors.torch", "safetensors").load_file
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} in it does not match its checksum")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors save their command line beside
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = re.split(r"\n|\. ", str(error))[0] or "it ends early"
        if isinstance(error, pickle.UnpicklingError):  # torch's own message proposes to run what is in the file
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {code[1]}, which is not executed" if code else "it is no pickle of tensors"
        raise ValueError(f"{path}: not a checkpoint that can be read ({reason})") from error
    while isinstance(content, dict) and (inner := {"model", "module", "state_dict"} & content.keys()):
        content = content[sorted(inner)[0]]
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{path}: holds no state dict, expected names and tensors, as they are or under 'model', "
                         "'module' or 'state_dict'")
    return content


def optional_import(module: str, package: str):
    """Import a module that only some users need. Raises ImportError saying what to install."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{package} is needed here and is not installed: pip install {package}") from error


def fetch(source: str | os.PathLike, filename: str) -> Path | None:
    """A file of a directory, or of a hub repository (downloaded once); None where there is no such file.

    Raises ValueError where `source` is neither, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        path = Path(source) / filename
        return path if path.is_file() else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"source: {source} is not a file, a directory or a hub id such as MCG-NJU/videomae-base")
    hub = optional_import("huggingface_hub", "huggingface_hub")
    try:
        return Path(hub.hf_hub_download(str(source), filename))
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        # Without a network a repository is known by its config.json; what is not in the cache with it is not there.
        if "EntryNotFoundError" in kinds and not ("LocalEntryNotFoundError" in kinds and filename == "config.json"):
            return None
        raise ValueError(f"source: {source} is no file or directory here, and {filename} could not be fetched from the "
                         f"hub ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def read_json(source: str | os.PathLike, filename: str) -> dict:
    """The JSON file of a directory or a hub repository. Raises ValueError naming it."""
    path = fetch(source, filename)
    if path is None:
        raise ValueError(f"source: there is no {filename} in {source}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def read_checkpoint(source: str | os.PathLike) -> tuple[dict[str, Tensor], dict | None]:
    """A file, a directory or a hub id -> the state dict as it was saved, and config.json's fields if there are any."""
    path = Path(source)
    if path.is_file():
        has_config = path.name in ("model.safetensors", "pytorch_model.bin") and (path.parent / "config.json").is_file()
        return read_weights(path), read_json(path.parent, "config.json") if has_config else None
    values = read_json(source, "config.json")
    for filename in ("model.safetensors", "pytorch_model.bin"):
        if path := fetch(source, filename):
            return read_weights(path), values
        if index := fetch(source, f"{filename}.index.json"):
            shard_of = read_json(source, index.name)["weight_map"]  # name -> file
            state_dict = {}
            for shard in sorted(set(shard_of.values())):
                if (path := fetch(source, shard)) is None:
                    raise ValueError(f"source: {shard}, which {index} names, is missing")
                state_dict |= read_weights(path)
            if missing := shard_of.keys() - state_dict.keys():
                raise ValueError(f"source: {index} names weights that its files do not hold: {sorted(missing)}")
            return state_dict, values
    raise ValueError(f"source: no model.safetensors and no pytorch_model.bin in {source}")


def infer_config(state_dict: dict[str, Tensor], **overrides) -> VideoMAEConfig:
    """The config of weights that come without one, from their shapes; `overrides` are fields of VideoMAEConfig.

    Shapes do not tell the length and size of the clips: the published 16 frames of 224 x 224 are assumed. They do not
    tell the number of heads either: the published models have heads 64 wide, but for `PUBLISHED_HEADS`. What is assumed
    is logged. Raises ValueError where the weights are not a VideoMAE's.
    """
    weights = convert_state_dict(state_dict)
    embed = next((x for x in state_dict.values() if x.ndim == 5), None)  # (D, C, pt, ph, pw)
    if embed is None or "videomae.blocks.0.mlp.fc1.weight" not in weights:
        raise ValueError("source: no Conv3d or no block among the weights, expected a published VideoMAE; a model of "
                         "this file is saved by save_pretrained, with its config")
    values = dict(layer_norm_eps=1e-6, head_norm_eps=1e-6, num_channels=embed.shape[1], tubelet_size=embed.shape[2],
                  patch_size=embed.shape[3], qv_bias="videomae.blocks.0.attn.q_bias" in weights,
                  use_mean_pooling="videomae.norm.weight" not in weights)
    if "classifier.weight" in weights:
        values["num_labels"] = len(weights["classifier.weight"])
    for part, prefix in (("videomae", ""), ("decoder", "decoder_")):
        if f"{part}.blocks.0.mlp.fc1.weight" not in weights:
            continue
        intermediate, width = weights[f"{part}.blocks.0.mlp.fc1.weight"].shape
        depth = len({name.split(".")[2] for name in weights if name.startswith(f"{part}.blocks.")})
        heads = f"{prefix}num_attention_heads"
        if heads not in overrides and width not in PUBLISHED_HEADS and width % 64:
            raise ValueError(f"{heads}: a width of {width} does not tell it (published heads are 64 wide); expected "
                             f"{heads}=... to be given")
        values |= {f"{prefix}hidden_size": width, f"{prefix}num_hidden_layers": depth,
                   f"{prefix}intermediate_size": intermediate, heads: PUBLISHED_HEADS.get(width, width // 64)}
    config = VideoMAEConfig(**values | overrides)
    heads = [name for name in values if name.endswith("attention_heads")]
    assumed = [name for name in ("num_frames", "image_size", *heads) if name not in overrides]
    if assumed:
        logger.warning("the weights do not tell, assumed: "
                       + ", ".join(f"{name}={getattr(config, name)}" for name in assumed))
    return config


def make_config(state_dict: dict[str, Tensor], values: dict | None, overrides: dict) -> VideoMAEConfig:
    """The config of a checkpoint: its config.json, else the shapes of its weights, with the caller's `overrides`."""
    if unknown := overrides.keys() - {f.name for f in fields(VideoMAEConfig)}:
        raise TypeError(f"config_overrides: {', '.join(sorted(unknown))} is no field of VideoMAEConfig")
    if "id2label" in overrides:
        overrides = {"num_labels": len(overrides["id2label"])} | overrides
    if values is None:
        return infer_config(state_dict, **overrides)
    if "model_config" in values:  # the hub's VideoMAE V2 has its own kind of config.json
        names = {"img_size": "image_size", "num_frames": "num_frames", "num_heads": "num_attention_heads"}
        known = {names[name]: x for name, x in values["model_config"].items() if name in names}
        old, config = infer_config(state_dict, **known), infer_config(state_dict, **known | overrides)
    else:
        if values.get("model_type", "videomae") != "videomae":
            raise ValueError(f"source: config.json says model_type {values['model_type']!r}, expected 'videomae'")
        old = VideoMAEConfig.from_dict(values)
        if overrides.get("num_labels", old.num_labels) != old.num_labels:  # the names are not those of the new labels
            values = {name: x for name, x in values.items() if name not in ("id2label", "label2id")}
        config = VideoMAEConfig.from_dict(values | overrides)
    if config.grid != old.grid and "position_grid" not in overrides:
        grid = old.position_grid or old.grid
        raise ValueError(f"position_grid: the clips' grid changes from {old.grid} to {config.grid}, expected "
                         f"position_grid={grid} to interpolate the positions, or position_grid=None to make new ones")
    return config


def load_pretrained(cls, source: str | os.PathLike, config_overrides: dict):
    """A checkpoint -> a model of class `cls` in evaluation mode.

    source: a directory as transformers writes it (model.safetensors or pytorch_model.bin, in shards too); a hub id such
        as "MCG-NJU/videomae-base"; a file of the authors or of VideoMAE V2 (.pth, .pt, .bin, .safetensors), whose
        config is inferred from the shapes, see `infer_config`.
    config_overrides: fields of VideoMAEConfig. `num_labels` gives a new head where it differs. Another length or size
        of clips than a config.json says wants `position_grid` too: None or the old grid, see there.
    Every weight is used, or named: a new head, a decoder that `cls` does not have, a head that the encoder does not
    have and the encoder's last norm where `fc_norm` replaces it are logged in one line. All other missing, unexpected
    or mis-shaped weights raise one ValueError that lists them.
    """
    return build_pretrained(cls, source, *read_checkpoint(source), config_overrides)


def build_pretrained(cls, source: str | os.PathLike, state_dict: dict[str, Tensor], values: dict | None,
                     config_overrides: dict):
    """`load_pretrained`, after `read_checkpoint` gave the state dict and the config's fields; `source` names them."""
    config = make_config(state_dict, values, config_overrides)
    weights, model = convert_state_dict(state_dict), cls(config)
    prefix = "videomae." if issubclass(cls, VideoMAEModel) else ""
    expected = {prefix + name: tensor for name, tensor in model.state_dict().items()}

    droppable = ()
    if issubclass(cls, VideoMAEModel):
        droppable = ("decoder.", "classifier.", "fc_norm.")
    elif issubclass(cls, VideoMAEForVideoClassification):
        droppable = ("decoder.", "videomae.norm.") if config.use_mean_pooling else ("decoder.",)
    dropped = {name for name in weights.keys() - expected.keys() if name.startswith(droppable)}
    if {"num_labels", "id2label"} & config_overrides.keys() and "classifier.weight" in expected:
        old = weights.get("classifier.weight")
        if old is not None and old.shape != expected["classifier.weight"].shape:
            dropped |= {"classifier.weight", "classifier.bias"} & weights.keys()
    weights = {name: tensor for name, tensor in weights.items() if name not in dropped}
    new = {name for name in expected.keys() - weights.keys()
           if (layer := name.split(".")[0] + ".") in ("classifier.", "fc_norm.")
           and not any(other.startswith(layer) for other in weights)}

    shapes = [f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
              for name in sorted(weights.keys() & expected.keys()) if weights[name].shape != expected[name].shape]
    problems = {"missing": sorted(expected.keys() - weights.keys() - new),
                "unexpected": sorted(weights.keys() - expected.keys()), "of another shape": shapes}
    if any(problems.values()):
        raise ValueError(f"source: {source} does not fit {cls.__name__}: " + "; ".join(
            f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names))
    for what, names in (("new, to be trained", new), ("not used", dropped)):
        if names:
            parts = sorted({name.rsplit(".", 1)[0] if "blocks" not in name else "decoder.blocks" for name in names})
            logger.warning(f"{cls.__name__} from {source}: {what}: {', '.join(parts)}")
    model.load_state_dict({name.removeprefix(prefix): weights.get(name, tensor) for name, tensor in expected.items()})
    return model.eval()


def save_pretrained(model: nn.Module, directory: str | os.PathLike):
    """Write config.json and model.safetensors as transformers does, for it and for `from_pretrained`.

    Overwrites nothing: raises ValueError where either file exists. Needs safetensors. What transformers has no field
    for, and would compute otherwise, is logged in one line.
    """
    save = optional_import("safetensors.torch", "safetensors").save
    config = model.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    values = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype}
    values.pop("torch_dtype", None)  # the older name, which may say what the file was once read from
    published = VideoMAEConfig()
    unknown = [name for name in ("position_embedding", "position_grid", "head_norm_eps")
               if getattr(config, name) != getattr(published, name)]
    if unknown:
        logger.warning(f"{directory}: transformers does not know "
                       f"{', '.join(f'{name}={getattr(config, name)}' for name in unknown)} and will compute without")
    weights = {name: tensor.cpu() for name, tensor in published_state_dict(model).items()}
    write_new({Path(directory) / "model.safetensors": save(weights, metadata={"format": "pt"}),
               Path(directory) / "config.json": json.dumps(values, indent=2).encode()})


def write_new(contents: dict[Path, bytes]):
    """Write files that must not exist yet, each whole or not at all. Raises ValueError naming one that exists."""
    for path in contents:
        if path.exists():
            raise ValueError(f"directory: {path} exists already, expected a directory without it")
    for path, content in contents.items():
        write_whole(path, lambda file, content=content: file.write(content))


def write_whole(path: Path, write):
    """Call write(a binary file) for a temporary file beside `path`, then rename: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# python videomae.py inspect SOURCE; python videomae.py convert SOURCE TARGET


def model_class(state_dict: dict[str, Tensor]):
    """The class of the three that a checkpoint was saved from."""
    weights = convert_state_dict(state_dict)
    if "decoder.mask_token" in weights:
        return VideoMAEForPreTraining
    return VideoMAEForVideoClassification if "classifier.weight" in weights else VideoMAEModel


def inspect_checkpoint(source: str, overrides: dict):
    """Print what a checkpoint is and whether it is sound. Raises ValueError as `load_pretrained` does."""
    state_dict, values = read_checkpoint(source)
    cls = model_class(state_dict)
    model = build_pretrained(cls, source, state_dict, values, overrides)
    config = model.config
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    presets = [name for name in PRESETS
               if all(getattr(VideoMAEConfig.preset(name), size) == getattr(config, size) for size in sizes)]
    biases = [p for name, p in model.named_parameters() if name.endswith(("q_bias", "v_bias"))]
    zero = sum(not bias.any() for bias in biases)
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    layout = "transformers" if any("embeddings.patch_embeddings" in name for name in state_dict) else "the authors'"
    print(f"source      {source}")
    print(f"layout      {layout}; {'the config is in config.json' if values else 'the config is inferred'}")
    print(f"kind        {cls.__name__}")
    print(f"preset      {presets[0] if presets else 'none of ' + ', '.join(PRESETS)}")
    print(f"parameters  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M in {len(state_dict)} tensors")
    defaults = VideoMAEConfig()
    changed = {f.name: getattr(config, f.name) for f in fields(config)
               if f.name != "extra" and getattr(config, f.name) != getattr(defaults, f.name)}
    print(f"config      {', '.join(f'{name}={value}' for name, value in changed.items()) or 'the defaults'}")
    print("checks      every weight is used, or named above as not used")
    print(f"            numbers: {'all finite' if not broken else 'NOT FINITE in ' + ', '.join(broken)}")
    print(f"            query and value biases: {len(biases)}, " + (f"ALL ZERO in {zero}" if zero else "none all zero"))
    if broken:
        raise ValueError(f"{source}: {len(broken)} of its weights are not finite")


def convert_checkpoint(source: str, target: str, overrides: dict):
    """Any checkpoint -> a directory that transformers reads, with the processor's config."""
    if Path(target).exists():
        raise ValueError(f"target: {target} exists already, expected a new directory")
    state_dict, values = read_checkpoint(source)
    model = build_pretrained(model_class(state_dict), source, state_dict, values, overrides)
    if values is not None and fetch(source, "preprocessor_config.json"):
        processor = VideoMAEImageProcessor.from_pretrained(source)
    else:  # as the authors prepare their clips
        height, width = model.config.image_hw
        processor = VideoMAEImageProcessor(size=min(height, width), crop_size=dict(height=height, width=width),
                                           image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    print(f"{target}: {type(model).__name__}, config.json, model.safetensors, preprocessor_config.json")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Look at a VideoMAE checkpoint, or convert it for transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("inspect", "kind, preset, parameters, config, checks"),
                          ("convert", "write a directory that transformers reads")):
        sub = commands.add_parser(command, help=text)
        sub.add_argument("source", help="a file, a directory, or a hub id such as MCG-NJU/videomae-base")
        if command == "convert":
            sub.add_argument("target", help="the new directory")
        sub.add_argument("settings", nargs="*", metavar="field=value",
                          help="what the file does not say: num_attention_heads=3 num_frames=8")
    args = parser.parse_args()
    try:
        pairs = [setting.split("=", 1) for setting in args.settings]
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError(f"field=value: got {' '.join(args.settings)}")
        overrides = {name: json.loads(value) if re.match(r"[\d\[{tfn]", value) else value for name, value in pairs}
        if args.command == "inspect":
            inspect_checkpoint(args.source, overrides)
        else:
            convert_checkpoint(args.source, args.target, overrides)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"videomae.py: {error}")


if __name__ == "__main__":
    main()
