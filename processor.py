"""Convert RGB frames in any common form to a model's pixel_values, within one 8-bit level of
transformers' image_processing_pil_videomae.py. Needs checkpoints.py.
"""
import json
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from checkpoints import PROCESSOR_FILE, fields_from_json, find, read_file, sort_options, write_new
from videomae import check_choice, resize


class BatchFeature(dict):
    """A dict {"pixel_values": ...} whose keys are also attributes, named as in transformers."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, *args, **kwargs) -> "BatchFeature":
        """Move tensors and cast float ones, in place, as in transformers."""
        for name, x in self.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                self[name] = x.to(*args, **kwargs)
            elif isinstance(x, Tensor):  # labels and masks keep their dtype
                self[name] = x.to(x.new_empty(0, dtype=torch.float).to(*args, **kwargs).device)
        return self


@dataclass
class VideoMAEImageProcessor:
    """Resize, centre-crop, scale to [0, 1] and normalize. The defaults are transformers'; published
    checkpoints and the pretraining target use image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD."""

    do_resize: bool = True
    size: int | tuple[int, int] | dict = 224  # short side, or (height, width)
    resample: int = 2  # Pillow's number for bilinear, the only one
    do_center_crop: bool = True
    crop_size: int | tuple[int, int] | dict = 224  # side of a square, or (height, width)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    extra: dict = field(default_factory=dict)  # a file's other fields, kept for saving

    def __post_init__(self):
        self.size = read_size("size", self.size, {"shortest_edge"})
        self.crop_size = read_size("crop_size", self.crop_size, {"height", "width"})
        if self.resample != 2:
            raise ValueError(f"resample: got {self.resample!r}, expected 2 (bilinear); for another "
                             "filter, resize the frames before and pass do_resize=False")
        for name in ("image_mean", "image_std"):
            numbers = getattr(self, name)
            if np.shape(numbers) != (3,) or name == "image_std" and 0 in numbers:
                raise ValueError(f"{name}: got {numbers}, expected numbers for red, green and "
                                 "blue, and no std of 0")
            setattr(self, name, list(map(float, numbers)))

    def __call__(self, videos=None, return_tensors=None, images=None, **options) -> BatchFeature:
        """One video or a batch of them -> {"pixel_values": float32}, with every frame kept.

        videos or images: a list or an array of frames, or of videos. A frame is an RGB image of
            PIL, or an array (H, W, 3) or (3, H, W) with numbers from 0 to 255, or from 0 to 1 with
            do_rescale=False.
        return_tensors: "pt" for a tensor (B, T, 3, H, W), "np" for an array, None for a list.
        options: any fields of the class, overridden for this call."""
        stack = {"pt": torch.stack, "np": np.stack, None: list}
        check_choice("return_tensors", return_tensors, stack)
        options = {name: x for name, x in options.items() if x is not None}
        processor = replace(self, **sort_options(type(self), options)[0])
        videos = split_videos(images if videos is None else videos)
        clips = [processor.process(read_frames(video)) for video in videos]
        return BatchFeature(pixel_values=stack[return_tensors](clips))

    preprocess = __call__

    def process(self, x: Tensor) -> Tensor:
        """(T, 3, H, W) uint8 or float32 -> (T, 3, H', W') float32."""
        if self.do_rescale or self.do_normalize:
            check_range(x, 255 if self.do_rescale else 1)
        if self.do_resize:
            x = resize(x, *resized_shape(*x.shape[2:], **self.size))
        if self.do_center_crop:
            x = center_crop(x, **self.crop_size)
        x = x.contiguous().float()
        if self.do_rescale:
            x = x * self.rescale_factor
        if self.do_normalize:
            mean, std = x.new_tensor([self.image_mean, self.image_std])
            x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        return x

    @classmethod
    def from_pretrained(cls, source, **options) -> "VideoMAEImageProcessor":
        """Load a directory, a preprocessor_config.json or a hub id such as "MCG-NJU/videomae-base".
        options: any field of the class, and checkpoints.HUB_OPTIONS."""
        overrides, hub = sort_options(cls, options)
        path = find(source, **hub)
        path = path if path.suffix == ".json" else path / PROCESSOR_FILE
        try:
            fields = fields_from_json(cls, read_file(path))
            for name in ("image_processor_type", "feature_extractor_type"):
                kind = fields["extra"].pop(name, cls.__name__)
                if not str(kind).startswith("VideoMAE"):
                    raise ValueError(f"{name}: got {kind}, expected {cls.__name__}")
            return cls(**fields | overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict:
        values = vars(self) | {"image_processor_type": type(self).__name__}
        return values.pop("extra") | values

    def save_pretrained(self, directory):
        """Write preprocessor_config.json, readable by transformers. Never overwrites."""
        write_new(directory, {PROCESSOR_FILE: json.dumps(self.to_dict(), indent=2).encode()})


# ---- Sizes --------------------------------------------------------------------------------------

def read_size(name: str, size, keys: set[str]) -> dict[str, int]:
    """A dict, (height, width), or one number for all the keys -> a dict."""
    if isinstance(size, int):
        size = dict.fromkeys(keys, size)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    is_fine = isinstance(size, dict) and set(size) in (keys, {"height", "width"})
    if not is_fine or not all(type(x) is int and 0 < x < 10_000 for x in size.values()):
        raise ValueError(f"{name}: got {size}, expected a number of pixels or (height, width)")
    return size


def resized_shape(h: int, w: int, height=0, width=0, shortest_edge=0) -> tuple[int, int]:
    """(height, width), or those with min(height, width) = shortest_edge and the frame's shape."""
    if shortest_edge:  # the other side is truncated, not rounded, as in transformers
        height, width = (int(shortest_edge * side / min(h, w)) for side in (h, w))
    return height, width


def center_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """(T, 3, H, W) -> (T, 3, height, width)."""
    h, w = frames.shape[2:]
    top, left = (h - height) // 2, (w - width) // 2
    if min(top, left) < 0:
        raise ValueError(f"crop_size: got {height} x {width}, expected at most {h} x {w}")
    return frames[..., top : top + height, left : left + width]


# ---- Frames -------------------------------------------------------------------------------------

def split_videos(videos) -> list:
    """One video or several -> a list of videos, each a list or an array of frames."""
    if isinstance(videos, (list, tuple)):
        is_batch = all(isinstance(x, (list, tuple)) or np.ndim(x) == 4 for x in videos)
        return list(videos) if videos and is_batch else [videos]
    return list(videos) if np.ndim(videos) == 5 else [videos]


def read_frames(video) -> Tensor:
    """Frames of PIL, arrays or tensors, or one array of all -> (T, 3, H, W) uint8 or float32."""
    frames = list(video) if isinstance(video, (list, tuple, np.ndarray, Tensor)) else []
    for frame in frames:
        if hasattr(frame, "getbands") and frame.mode != "RGB":  # PIL's; LAB has 3 channels, too
            raise ValueError(f"videos: got an image of mode {frame.mode}, expected RGB")
    frames = [np.asarray(frame) for frame in frames]
    shapes = {frame.shape for frame in frames}
    if len(shapes) != 1:
        raise ValueError(f"videos: got {type(video).__name__} with frames of shapes "
                         f"{sorted(shapes)}, expected frames of one shape")
    x = np.stack(frames)
    channels_last = x.shape[-1] == 3
    if x.ndim != 4 or channels_last == (x.shape[1] == 3) or 0 in x.shape:
        raise ValueError(f"videos: got frames of shape {x.shape[1:]}, expected either (H, W, 3) or "
                         "(3, H, W)")
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
    elif x.dtype.kind in "iu" and x.min() >= 0 and x.max() <= 255:
        x = x.astype(np.uint8)
    else:
        raise ValueError(f"videos: got {x.dtype} up to {x.max()}, expected numbers from 0 to 255")
    x = torch.from_numpy(x)
    return x.movedim(-1, 1) if channels_last else x


def check_range(x: Tensor, top: int):
    """Raise unless the numbers plausibly range from 0 to `top`, which is 255 or 1."""
    if top == 255 and x.dtype == torch.uint8:
        return
    low, high = x.min().item(), x.max().item()
    # Numbers in [0, 1] are not on a 0 to 255 scale, unless all are whole, as in a dark clip.
    is_scaled = top == 255 and high <= 1.01 and (x != x.round()).any()
    if is_scaled or not (-0.01 <= low and high <= top + 0.01):
        raise ValueError(f"videos: got numbers from {low:g} to {high:g}, expected 0 to {top}; pass "
                         "do_rescale=False for 0 to 1, and do_normalize=False if normalized")
