"""VideoMAEImageProcessor: frames as any decoder gives them -> the pixel_values that published
checkpoints expect. Arguments and defaults are transformers'; 8-bit frames come out as from Pillow,
within one level (transformers, image_processing_pil_videomae.py).

Wrong input raises a ValueError or TypeError that names the argument, what came and what was
expected. Reading and writing preprocessor_config.json needs checkpoints.py beside this file.
"""
import os
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from videomae import check_choice, import_checkpoints


class BatchFeature(dict):
    """{"pixel_values": ...}, also as an attribute; the name is transformers'."""

    pixel_values = property(lambda self: self["pixel_values"])

    def to(self, *args, **kwargs) -> "BatchFeature":
        """The tensors on another device or of another dtype."""
        return BatchFeature({name: x.to(*args, **kwargs) for name, x in self.items()})


RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's number -> torch's name


@dataclass
class VideoMAEImageProcessor:
    """Resize, crop the centre, scale to [0, 1], normalize. Arguments and defaults: transformers'.

    The default mean and std, 0.5, are the published class's. The published *checkpoints*, and the
    pretraining target, use `image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD`.
    """

    do_resize: bool = True
    size: int | dict = 224  # the short side, {"shortest_edge": 224} or {"height": .., "width": ..}
    resample: int = 2  # 0 nearest, 2 bilinear, 3 bicubic
    do_center_crop: bool = True
    crop_size: int | dict = 224  # one side of a square, or {"height": 224, "width": 224}
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # one number per channel
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    extra: dict = field(default_factory=dict)  # what else a preprocessor_config.json says

    def __post_init__(self):
        if isinstance(self.size, int):
            self.size = {"shortest_edge": self.size}
        if isinstance(self.crop_size, int):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}
        if set(self.size) != {"shortest_edge"} and set(self.size) != {"height", "width"}:
            raise ValueError(f"size: got {self.size}, expected an int, or a dict with "
                             "shortest_edge, or with height and width")
        if set(self.crop_size) != {"height", "width"}:
            raise ValueError(f"crop_size: got {self.crop_size}, expected height and width")
        check_choice("resample", self.resample, RESAMPLE)

    def __call__(self, videos, return_tensors=None, data_format="channels_first",
                 input_data_format=None, **overrides) -> BatchFeature:
        """One video or a batch of them -> {"pixel_values": float32}, as many frames as came in.

        videos: a list of T frames, an array or tensor of 4 axes, or a list of such, or 5 axes. A
            frame is a PIL image, or (H, W), (H, W, C) or (C, H, W) with C = 1 or 3, in 8-bit
            numbers or floats (with floats in [0, 1], say do_rescale=False).
        return_tensors: "pt": a tensor (B, T, C, H, W); "np": an array; None: a list of arrays.
        data_format: "channels_last" gives (..., H, W, C).
        input_data_format: likewise; needed where either axis could be the channels.
        overrides: any field of the class, for this call.
        """
        check_choice("return_tensors", return_tensors, ("pt", "np", None))
        check_choice("data_format", data_format, ("channels_first", "channels_last"))
        if not hasattr(videos, "__len__") or len(videos) == 0:
            raise ValueError(f"videos: got {type(videos).__name__}, expected one video or several")
        if getattr(videos, "ndim", 4) == 3 and videos.shape[-1] == 3:
            raise ValueError(f"videos: got one image of shape {tuple(videos.shape)}")
        is_one_video = hasattr(videos[0], "getbands") or getattr(videos[0], "ndim", 4) < 4  # PIL's
        clips = [replace(self, **overrides).process(stack_frames(video, input_data_format))
                 for video in ([videos] if is_one_video else videos)]
        if data_format == "channels_last":
            clips = [rearrange(clip, "t c h w -> t h w c") for clip in clips]
        if return_tensors is None:
            return BatchFeature(pixel_values=[clip.numpy() for clip in clips])
        pixel_values = torch.stack(clips)
        return BatchFeature(pixel_values=pixel_values if return_tensors == "pt"
                            else pixel_values.numpy())

    def process(self, frames: Tensor) -> Tensor:
        """(T, C, H, W) uint8 or float -> (T, C, H', W') float32."""
        if self.do_rescale and frames.is_floating_point() and 0 < frames.max() <= 1:
            raise ValueError("do_rescale: got float frames within [0, 1], which are scaled "
                             "already; expected do_rescale=False, or values from 0 to 255")
        if self.do_resize:
            frames = resize(frames, **self.size, resample=self.resample)
        if self.do_center_crop:
            (h, w), crop = frames.shape[-2:], self.crop_size
            height, width = crop["height"], crop["width"]  # a file may have them in either order
            if h < height or w < width:
                raise ValueError(f"crop_size: got {height} x {width} for frames of {h} x {w}, "
                                 "expected one that fits")
            top, left = (h - height) // 2, (w - width) // 2
            frames = frames[..., top : top + height, left : left + width]
        if self.do_rescale:
            frames = frames.contiguous().float() * self.rescale_factor
        if self.do_normalize:
            mean, std = torch.tensor([self.image_mean, self.image_std]).view(2, -1, 1, 1)
            if len(mean) != frames.shape[1]:
                raise ValueError(f"image_mean: got {self.image_mean} for {frames.shape[1]} "
                                 "channels, expected one number for each")
            frames = (frames - mean) / std
        return frames

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **overrides) -> "VideoMAEImageProcessor":
        """Read preprocessor_config.json from a directory or a hub id, "MCG-NJU/videomae-base"."""
        return import_checkpoints().load_processor(cls, source, overrides)

    def save_pretrained(self, directory: str | os.PathLike):
        """Write preprocessor_config.json, for transformers too. Overwrites nothing."""
        import_checkpoints().save_processor(self, directory)


def stack_frames(video, input_data_format: str | None) -> Tensor:
    """One video, see VideoMAEImageProcessor.__call__ -> (T, C, H, W) uint8 or float."""
    if any(hasattr(frame, "getbands") and frame.mode not in ("RGB", "L") for frame in video):
        raise ValueError(f"videos: got a PIL image of mode {video[0].mode}, expected RGB or L")
    video = torch.from_numpy(np.stack([np.asarray(frame) for frame in video]))
    if video.ndim == 3:  # grey frames (H, W)
        video, input_data_format = video[..., None], "channels_last"
    possible = [name for name, axis in (("channels_first", 1), ("channels_last", -1))
                if video.shape[axis] in (1, 3) and input_data_format in (None, name)]
    if video.ndim != 4 or len(possible) != 1:
        raise ValueError(f"videos, input_data_format: got frames of shape {tuple(video.shape[1:])}"
                         f" and {input_data_format}, expected 1 or 3 channels, first or last "
                         "(input_data_format says which, where they could be either)")
    if possible == ["channels_last"]:
        video = rearrange(video, "t h w c -> t c h w")
    if video.is_floating_point() or video.dtype == torch.uint8:
        return video
    if video.dtype == torch.bool or video.min() < 0 or video.max() > 255:
        raise ValueError(f"videos: got {video.dtype} from {video.min()} to {video.max()}, "
                         "expected numbers from 0 to 255 or floats")
    return video.to(torch.uint8)


def resize(frames: Tensor, height=0, width=0, shortest_edge=0, resample: int = 2) -> Tensor:
    """(T, C, H, W) uint8 or float -> (T, C, height, width), or with min(H, W) = shortest_edge.

    8-bit frames come out as from Pillow, within one level.
    """
    h, w = frames.shape[-2:]
    if shortest_edge:  # the other side is truncated, not rounded, as in transformers
        height, width = (int(shortest_edge * side / min(h, w)) for side in (h, w))
    if (height, width) == (h, w):
        return frames
    if frames.is_floating_point():
        return F.interpolate(frames.float(), (height, width), mode=RESAMPLE[resample],
                             antialias=resample != 0)
    # torch's own 8-bit resize is over ten times faster than Pillow and agrees with it, but only
    # for bilinear, in this memory layout, and where the proportions are kept.
    if resample == 2 and abs(height * w / (width * h) - 1) < 0.1:
        frames = frames.contiguous(memory_format=torch.channels_last)
        return F.interpolate(frames, (height, width), mode="bilinear", antialias=True)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("this kind of resize needs Pillow: pip install pillow") from error
    images = [Image.fromarray(channel.numpy()) for channel in frames.flatten(0, 1)]
    resized = [np.array(image.resize((width, height), resample)) for image in images]
    return torch.from_numpy(np.stack(resized)).view(*frames.shape[:2], height, width)
