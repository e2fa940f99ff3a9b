"""Convert frames in any common form to a model's pixel_values, within one 8-bit level of
transformers' image_processing_pil_videomae.py. Needs checkpoints.py.
"""
import json
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from checkpoints import PROCESSOR_FILE, fields_from_json, find, read_file, sort_options, write_new
from videomae import check_choice, resize

# One number for all channels, or one per channel:
PerChannel = float | tuple[float] | tuple[(float,) * 2] | tuple[(float,) * 3] | tuple[(float,) * 4]


class BatchFeature(dict):
    """A dict {"pixel_values": ...} whose keys are also attributes, named as in transformers."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, *args, **kwargs) -> "BatchFeature":
        """Move all tensors and cast float ones, in place, as in transformers."""

        def move(x):
            if isinstance(x, (list, tuple)):
                return type(x)(map(move, x))
            if isinstance(x, Tensor) and not x.is_floating_point():
                return x.to(x.new_empty(0, dtype=torch.float).to(*args, **kwargs).device)
            return x.to(*args, **kwargs) if isinstance(x, Tensor) else x

        self.update({name: move(x) for name, x in self.items()})
        return self


@dataclass
class VideoMAEImageProcessor:
    """Resize, centre-crop, scale to [0, 1] and normalize. The defaults are transformers'; published
    checkpoints and the pretraining target use image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD."""

    do_resize: bool = True
    size: int | tuple[int, int] | dict = 224  # short side, or (height, width)
    resample: int = 2  # Pillow's filter: 0 nearest, 2 bilinear, 3 bicubic ...
    do_center_crop: bool = True
    crop_size: int | tuple[int, int] | dict = 224  # side of a square, or (height, width)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: PerChannel = (0.5, 0.5, 0.5)
    image_std: PerChannel = (0.5, 0.5, 0.5)
    extra: dict = field(default_factory=dict)  # a file's other fields, kept for saving

    def __post_init__(self):
        self.size = read_size("size", self.size, {"shortest_edge"})
        self.crop_size = read_size("crop_size", self.crop_size, {"height", "width"})
        check_choice("resample", self.resample, range(6))
        self.extra.pop("image_processor_type", None)
        self.image_mean, self.image_std = (list(x) if isinstance(x, tuple) else x
                                           for x in (self.image_mean, self.image_std))
        mean, std = self.image_mean, self.image_std
        if 0 in np.ravel(std) or np.ndim(mean) and np.ndim(std) and len(mean) != len(std):
            raise ValueError(f"image_std: got {std} for mean {mean}, expected equal lengths and no "
                             "zero")

    def __call__(self, videos=None, return_tensors=None, data_format="channels_first",
                 input_data_format=None, images=None, **options) -> BatchFeature:
        """One video or a batch of them -> {"pixel_values": float32}, with every frame kept.

        videos or images: a list or an array of frames, or of videos, or a single image. A frame is
            a PIL image, or an array (H, W), (H, W, C) or (C, H, W) with numbers from 0 to 255, or
            from 0 to 1 with do_rescale=False.
        return_tensors: "pt" for a tensor (B, T, C, H, W), "np" for an array, None for a list.
        data_format: "channels_last" returns (..., H, W, C). input_data_format: that of the frames,
            if ambiguous. options: any fields of the class, overridden for this call."""
        stack = {"pt": torch.stack, "np": np.stack, None: list}
        check_choice("return_tensors", return_tensors, stack)
        check_choice("data_format", data_format, ("channels_first", "channels_last"))
        options = {name: x for name, x in options.items() if x is not None}
        processor = replace(self, **sort_options(type(self), options)[0])
        clips = [processor.process([read_frame(frame, input_data_format) for frame in video])
                 for video in split_videos(images if videos is None else videos)]
        if data_format == "channels_last":
            clips = [rearrange(clip, "t c h w -> t h w c") for clip in clips]
        return BatchFeature(pixel_values=stack[return_tensors](clips))

    preprocess = __call__

    def process(self, frames: list[Tensor]) -> Tensor:
        """Frames (H, W, C), uint8 or float32, of any sizes -> (T, C, H', W') float32."""
        mean, std = self.image_mean, self.image_std
        if not frames:
            raise ValueError("videos: got no frames")
        if self.do_rescale or self.do_normalize:
            check_range(frames, 255 if self.do_rescale or np.max(mean) > 1 else 1)
        alike = len({(frame.shape, frame.dtype) for frame in frames}) == 1
        parts = [torch.stack(frames)] if alike else [frame[None] for frame in frames]
        parts = [rearrange(part, "t h w c -> t c h w") for part in parts]
        if self.do_resize:
            parts = [resize_as(part, self.resample, **self.size) for part in parts]
        if self.do_center_crop:
            parts = [center_crop(part, **self.crop_size) for part in parts]

        x = torch.cat(parts).contiguous().float()  # (T, C, H', W')
        if self.do_rescale:
            x = x * self.rescale_factor
        if self.do_normalize:
            if any(np.ndim(numbers) and len(numbers) != x.shape[1] for numbers in (mean, std)):
                raise ValueError("image_mean, image_std: expected one number, or one for each of "
                                 f"{x.shape[1]} channels")
            x = (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)
        return x

    @classmethod
    def from_pretrained(cls, source, **options) -> "VideoMAEImageProcessor":
        """Load a directory, a preprocessor_config.json or a hub id such as "MCG-NJU/videomae-base".
        options: any field of the class, and checkpoints.HUB_OPTIONS."""
        overrides, hub = sort_options(cls, options)
        path = find(source, **hub)
        path = path if path.suffix == ".json" else path / PROCESSOR_FILE
        values = read_file(path)
        try:
            return cls(**fields_from_json(cls, values) | overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict:
        values = vars(self) | {"image_processor_type": type(self).__name__}
        return values.pop("extra") | values

    def save_pretrained(self, directory):
        """Write preprocessor_config.json, readable by transformers. Never overwrites."""
        write_new(directory, {PROCESSOR_FILE: json.dumps(self.to_dict(), indent=2).encode()})


# ---- Parsing settings and frames ----------------------------------------------------------------

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


def split_videos(videos) -> list:
    """One image, one video or several -> a list of videos, each a list or an array of frames."""
    if isinstance(videos, (list, tuple)):
        is_batch = all(isinstance(x, (list, tuple)) or np.ndim(x) == 4 for x in videos)
        return list(videos) if videos and is_batch else [videos]
    shape = np.shape(videos)
    is_image = len(shape) < 3 or len(shape) == 3 and {shape[0], shape[2]} & {1, 3, 4}
    return list(videos) if len(shape) == 5 else [[videos]] if is_image else [videos]


def read_frame(frame, input_data_format: str | None) -> Tensor:
    """A PIL image, an array or a tensor, of any dtype -> (H, W, C) uint8 or float32."""
    if isinstance(frame, Tensor):
        frame = (frame.float() if frame.is_floating_point() else frame).detach().cpu().numpy()
    elif getattr(frame, "mode", "L") not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"videos: got a PIL image of mode {frame.mode}, expected RGB(A) or L(A)")
    frame = np.asarray(frame)
    if frame.dtype.kind == "f":
        frame = frame.astype(np.float32)
    elif frame.dtype.kind in "iu" and (
            frame.dtype == np.uint8 or frame.min() >= 0 and frame.max() <= 255):
        frame = frame.astype(np.uint8)
    else:
        got = f"{frame.dtype} up to {frame.max()}" if frame.ndim else repr(frame.item())
        raise ValueError(f"videos: got {got} for a frame, expected numbers from 0 to 255")

    frame = torch.from_numpy(frame[..., None] if frame.ndim == 2 else frame)
    counts = (1, 3, 4) if input_data_format is None else (1, 2, 3, 4)
    first, last = (frame.ndim == 3 and frame.shape[axis] in counts
                   and input_data_format in (None, name)
                   for axis, name in ((0, "channels_first"), (2, "channels_last")))
    if first == last or 0 in frame.shape:
        raise ValueError(f"videos: got a frame of shape {tuple(frame.shape)}, expected 1, 3 or 4 "
                         "channels, first or last; pass input_data_format if ambiguous")
    return rearrange(frame, "c h w -> h w c") if first else frame


def check_range(frames: list[Tensor], top: int):
    """Raise unless the numbers plausibly range from 0 to `top`, which is 255 or 1."""
    if top == 255 and all(frame.dtype == torch.uint8 for frame in frames):
        return
    low, high = min(x.min().item() for x in frames), max(x.max().item() for x in frames)
    # Numbers in [0, 1] are not on a 0 to 255 scale, unless all are whole, as in a dark clip.
    is_scaled = top == 255 and high <= 1.01 and any((x != x.round()).any() for x in frames)
    if is_scaled or not (-0.01 <= low and high <= top + 0.01):
        raise ValueError(f"videos: got numbers from {low:g} to {high:g}, expected 0 to {top}; pass "
                         "do_rescale=False for 0 to 1, and do_normalize=False if normalized")


def resize_as(frames: Tensor, resample: int, height=0, width=0, shortest_edge=0) -> Tensor:
    """(T, C, H, W) -> (T, C, height, width), or with min(H, W) = shortest_edge."""
    h, w = frames.shape[2:]
    if shortest_edge:  # the other side is truncated, not rounded, as in transformers
        height, width = (int(shortest_edge * side / min(h, w)) for side in (h, w))
    if (height, width) == (h, w):
        return frames
    if resample == 2:  # matches Pillow and is over ten times faster
        return resize(frames, height, width)
    from PIL import Image

    images = [Image.fromarray(image.numpy()) for image in frames.flatten(0, 1)]
    images = [np.array(image.resize((width, height), resample)) for image in images]
    return torch.from_numpy(np.stack(images)).unflatten(0, frames.shape[:2])


def center_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """(T, C, H, W) -> (T, C, height, width)."""
    h, w = frames.shape[2:]
    top, left = (h - height) // 2, (w - width) // 2
    if min(top, left) < 0:
        raise ValueError(f"crop_size: got {height} x {width}, expected at most {h} x {w}")
    return frames[..., top : top + height, left : left + width]
