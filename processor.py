"""Frames as any decoder gives them -> the pixel_values that published checkpoints expect: within
one 8-bit level of transformers' image_processing_pil_videomae.py. Needs checkpoints.py.
"""
import json
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from checkpoints import fields_from_json, find, read_file, write_new
from videomae import check_choice

FILE = "preprocessor_config.json"
RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's number -> torch's name


class BatchFeature(dict):
    """{"pixel_values": ...}, also as an attribute; the name is transformers'."""

    pixel_values = property(lambda self: self["pixel_values"])

    def to(self, *args, **kwargs):
        """On another device, or of another dtype."""
        return BatchFeature(pixel_values=self.pixel_values.to(*args, **kwargs))


@dataclass
class VideoMAEImageProcessor:
    """Resize, crop the centre, scale to [0, 1], normalize. The published *checkpoints*, and the
    pretraining target, use `image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD`."""

    do_resize: bool = True
    size: int | dict = 224  # the short side, {"shortest_edge": 224} or {"height": .., "width": ..}
    resample: int = 2  # 0 nearest, 2 bilinear, 3 bicubic
    do_center_crop: bool = True
    crop_size: int | dict = 224  # one side of a square, or {"height": 224, "width": 224}
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    # One number per channel:
    image_mean: tuple[float] | tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float] | tuple[float, float, float] = (0.5, 0.5, 0.5)
    extra: dict = field(default_factory=dict)  # what else a file says

    def __post_init__(self):
        if isinstance(self.size, int):
            self.size = {"shortest_edge": self.size}
        if isinstance(self.crop_size, int):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}
        check_choice("resample", self.resample, RESAMPLE)
        check_choice("size", set(self.size), ({"shortest_edge"}, {"height", "width"}))
        check_choice("crop_size", set(self.crop_size), ({"height", "width"},))
        for side in (*self.size.values(), *self.crop_size.values()):
            if type(side) is not int or not 0 < side < 10_000:
                raise ValueError(f"size, crop_size: got {side!r}, expected pixels")
        if len(self.image_mean) != len(self.image_std) or 0 in self.image_std:
            raise ValueError(f"image_std: got {self.image_std} for a mean {self.image_mean}")

    def __call__(self, videos, return_tensors=None, data_format="channels_first",
                 input_data_format=None, **overrides):
        """One video or a batch of them -> {"pixel_values": float32}, as many frames as came in.

        videos: a list of T frames, an array or tensor of 4 axes, or a list of such, or 5 axes. A
            frame is a PIL image, or (H, W), (H, W, C) or (C, H, W) with C = 1 or 3, in 8-bit
            numbers or floats (with floats in [0, 1], say do_rescale=False).
        return_tensors: "pt": a tensor (B, T, C, H, W); "np": an array; None: a list of tensors.
        data_format: "channels_last" gives (..., H, W, C).
        input_data_format: likewise, of the frames, where either could be right.
        overrides: any field of the class, for this call.
        """
        stack = {"pt": torch.stack, "np": np.stack, None: list}
        check_choice("return_tensors", return_tensors, stack)
        check_choice("data_format", data_format, ("channels_first", "channels_last"))
        first = videos[0] if len(videos) else 0
        if not isinstance(first, list) and np.ndim(first) < 4:  # a frame
            videos = [videos]
        processor = replace(self, **overrides)
        clips = [processor.process(stack_frames(x, input_data_format)) for x in videos]
        if data_format == "channels_last":
            clips = [rearrange(clip, "t c h w -> t h w c") for clip in clips]
        return BatchFeature(pixel_values=stack[return_tensors](clips))

    def process(self, frames: Tensor) -> Tensor:
        """(T, C, H, W) uint8 or float -> (T, C, H', W') float32."""
        if self.do_rescale and frames.is_floating_point() and 0 < frames.max() <= 1:
            raise ValueError("do_rescale: got floats within [0, 1], expected False")
        if self.do_resize:
            frames = resize(frames, **self.size, resample=self.resample)
        if self.do_center_crop:
            h, w = frames.shape[-2:]
            height, width = self.crop_size["height"], self.crop_size["width"]
            top, left = (h - height) // 2, (w - width) // 2
            if min(top, left) < 0:
                raise ValueError(f"crop_size: got {self.crop_size}, expected within {h} x {w}")
            frames = frames[..., top : top + height, left : left + width]
        if self.do_rescale:
            frames = frames.contiguous().float() * self.rescale_factor
        if self.do_normalize:
            mean, std = torch.tensor([self.image_mean, self.image_std])[..., None, None]
            if len(mean) != frames.shape[1]:
                raise ValueError(f"image_mean: got {self.image_mean}, expected one per channel")
            frames = (frames - mean) / std
        return frames

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """Read a file of transformers' from a directory or a hub id, "MCG-NJU/videomae-base"."""
        path = find(source) / FILE
        values = read_file(path)
        try:
            return cls(**fields_from_json(cls, values) | overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, directory):
        """Write such a file. Overwrites nothing."""
        values = vars(self) | {"image_processor_type": type(self).__name__}
        values = values.pop("extra") | values
        write_new(directory, {FILE: json.dumps(values, indent=2).encode()})


def stack_frames(video, input_data_format: str | None) -> Tensor:
    """One video, see VideoMAEImageProcessor.__call__ -> (T, C, H, W) uint8 or float32."""
    modes = {frame.mode for frame in video if hasattr(frame, "getbands")}  # PIL's
    if modes - {"RGB", "L"}:
        raise ValueError(f"videos: got PIL images of mode {modes}, expected RGB or L")
    video = torch.from_numpy(np.stack([np.asarray(frame) for frame in video]))
    if video.ndim == 3 and video.shape[-1] > 3:  # grey frames (H, W), not one image (H, W, C)
        video, input_data_format = video[..., None], "channels_last"
    possible = [name for name, axis in (("channels_first", 1), ("channels_last", -1))
                if video.shape[axis] in (1, 3) and input_data_format in (None, name)]
    if video.ndim != 4 or len(possible) != 1:
        raise ValueError(f"videos: got frames of shape {tuple(video.shape[1:])}, expected 1 or 3 "
                         "channels, first or last, or input_data_format if it is either")
    if possible == ["channels_last"]:
        video = rearrange(video, "t h w c -> t c h w")
    is_fine = video.is_floating_point() or video.dtype == torch.uint8
    if not is_fine and (video.dtype == torch.bool or video.min() < 0 or video.max() > 255):
        raise ValueError(f"videos: got {video.dtype} up to {video.max()}, expected 0 to 255")
    return video.float() if video.is_floating_point() else video.to(torch.uint8)


def resize(frames: Tensor, height=0, width=0, shortest_edge=0, resample: int = 2) -> Tensor:
    """(T, C, H, W) uint8 or float -> (T, C, height, width), or with min(H, W) = shortest_edge."""
    h, w = frames.shape[-2:]
    if shortest_edge:  # the other side is truncated, not rounded, as in transformers
        height, width = (int(shortest_edge * side / min(h, w)) for side in (h, w))
    if (height, width) == (h, w):
        return frames
    # torch's own 8-bit resize is over ten times faster than Pillow and agrees with it, but only
    # for bilinear, in this memory layout, and where the proportions are kept.
    is_like_pillow = resample == 2 and abs(height * w / (width * h) - 1) < 0.1
    if is_like_pillow or frames.is_floating_point():
        frames = frames.contiguous(memory_format=torch.channels_last)
        mode, antialias = RESAMPLE[resample], resample != 0
        return F.interpolate(frames, (height, width), mode=mode, antialias=antialias)
    from PIL import Image

    images = [Image.fromarray(x.numpy()) for x in frames.flatten(0, 1)]
    images = [np.array(x.resize((width, height), resample)) for x in images]
    return torch.from_numpy(np.stack(images)).view(*frames.shape[:2], height, width)
