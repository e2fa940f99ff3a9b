"""VideoMAE in one file: hide most of a clip in tubes, reconstruct its pixels, keep the encoder.

    clip -> cubes -> tube mask -> encoder (visible cubes only) -> decoder (all positions) -> pixels of the hidden cubes

Read it top to bottom; data flows through it in the paper's order. Shapes use one letter each:

    B clips in the batch     T, H, W frames, rows, columns of pixels     C colour channels
    N cubes in a clip, T' x H' x W' of them; N_vis are visible and N_mask masked; M is any number of them
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
- The decoder, thrown away after pretraining, is one module; so is what is kept.
- Uneven masks, 8-bit pixels and swapped axes, which would give wrong numbers in silence, are errors that say so.
"""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; what the published checkpoints were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    head_norm_eps: float = 1e-5  # eps of the norm before a head (decoder norm, fc_norm); the authors' models: 1e-6
    drop_path_rate: float = 0.0  # of the last encoder block; earlier blocks get proportionally less
    position_embedding: str = "sinusoid"  # the published table; "separable" learns faster in small models

    @classmethod
    def preset(cls, name: str, **overrides) -> "VideoMAEConfig":
        """A named size from PRESETS, with any field overridden. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def __post_init__(self):
        def check(name, condition, expected):
            if not condition:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        def is_count(value):
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        size = self.image_size
        is_pair = isinstance(size, tuple | list) and len(size) == 2 and all(is_count(side) for side in size)
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
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

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


def _vit(width, layers, heads, decoder_width, decoder_layers, decoder_heads, **fields):
    """The fields of a ViT whose MLPs are four times as wide as its tokens."""
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                decoder_hidden_size=decoder_width, decoder_num_hidden_layers=decoder_layers,
                decoder_num_attention_heads=decoder_heads, decoder_intermediate_size=4 * decoder_width, **fields)


# small to huge: the sizes in the authors' modeling_pretrain.py, decoder depths from scripts/kinetics/*/pretrain.sh.
# tiny and laptop: train_tiny.py's own. With 64 cubes the separable position table learns much faster, see README.
_SMALL_MODEL = dict(layer_norm_eps=1e-6, head_norm_eps=1e-6, position_embedding="separable")
PRESETS = {
    "small": _vit(384, 12, 6, 192, 4, 3),
    "base": _vit(768, 12, 12, 384, 4, 6),
    "large": _vit(1024, 24, 16, 512, 12, 8),
    "huge": _vit(1280, 32, 16, 640, 12, 8),
    "tiny": _vit(128, 4, 4, 96, 1, 3, image_size=32, patch_size=8, num_frames=8, **_SMALL_MODEL),
    "laptop": _vit(192, 6, 3, 96, 2, 3, image_size=112, **_SMALL_MODEL),
}


# ----------------------------------------------------------------------------------------------------------------------
# Image processor: frames as decoders give them -> pixel_values


class VideoMAEImageProcessor:
    """Resize the short side, crop the centre, scale to [0, 1], normalize. Arguments and defaults are transformers'.

    The default mean and std of 0.5 are the published class's; the published *checkpoints*, and the target of
    `VideoMAEForPreTraining`, use `image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD`.
    Source: transformers, image_processing_pil_videomae.py; equal to Pillow's bilinear resize within one 8-bit level.
    """

    def __init__(self, size=224, crop_size=224, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)):
        self.shortest_edge = size["shortest_edge"] if isinstance(size, dict) else size
        self.crop_hw = (crop_size["height"], crop_size["width"]) if isinstance(crop_size, dict) else (crop_size,) * 2
        self.image_mean, self.image_std = image_mean, image_std

    def __call__(self, videos) -> dict[str, Tensor]:
        """One video (a list of T frames) or a batch of videos (a list of such lists) -> {"pixel_values": tensor}.

        A frame is an 8-bit RGB image: a PIL image, or an array or tensor (H, W, 3). Videos may differ in H and W but
        not in T. Returns float32 (B, T, 3, crop_height, crop_width). Raises ValueError or TypeError naming `videos`.
        """
        if len(videos) == 0:
            raise ValueError("videos: got none")
        is_one_video = np.ndim(videos[0]) == 3 or hasattr(videos[0], "getbands")  # getbands: a PIL image
        batch = [self._frames_to_pixels(video) for video in ([videos] if is_one_video else videos)]
        lengths = [len(pixels) for pixels in batch]
        if len(set(lengths)) > 1:
            raise ValueError(f"videos: got clips of {lengths} frames, expected one length for the whole batch")
        return {"pixel_values": torch.stack(batch)}

    def _frames_to_pixels(self, video) -> Tensor:
        frames = [np.asarray(frame) for frame in video]
        shapes = {frame.shape for frame in frames}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[2] != 3:
            raise ValueError(f"videos: got frames of shapes {sorted({frame.shape for frame in frames})}, expected one "
                             "shape (height, width, 3) in a video")
        frames = np.stack(frames)  # (T, H, W, 3)
        if frames.dtype != np.uint8:
            raise TypeError(f"videos: got frames of {frames.dtype}, expected 8-bit frames (uint8, 0 to 255)")
        frames = resize_short_side(rearrange(torch.from_numpy(frames), "t h w c -> t c h w"), self.shortest_edge)
        return normalize(center_crop(frames, *self.crop_hw), self.image_mean, self.image_std)


def resize_short_side(frames: Tensor, short_side: int) -> Tensor:
    """(T, C, H, W) uint8 -> the same, min(H, W) == short_side; the other side is truncated, as in transformers."""
    height, width = frames.shape[-2:]
    if height <= width:
        size = (short_side, int(short_side * width / height))
    else:
        size = (int(short_side * height / width), short_side)
    if size == (height, width):
        return frames
    # 8-bit frames in channels-last memory take the path that agrees with Pillow; floats do not.
    frames = frames.contiguous(memory_format=torch.channels_last)
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True)


def center_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width) about the centre. Raises ValueError where the frame is smaller."""
    h, w = frames.shape[-2:]
    if h < height or w < width:
        raise ValueError(f"crop_size: {height} x {width} is larger than the resized frame of {h} x {w}")
    top, left = (h - height) // 2, (w - width) // 2
    return frames[..., top : top + height, left : left + width]


def normalize(frames: Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> Tensor:
    """(..., 3, H, W) uint8 -> float32, (x / 255 - mean) / std per channel. Raises TypeError for another dtype."""
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames: got {frames.dtype}, expected 8-bit frames (uint8, 0 to 255)")
    mean, std = (torch.tensor(x, device=frames.device).view(3, 1, 1) for x in (mean, std))
    return (frames.float() / 255 - mean) / std


def denormalize(pixels: Tensor) -> Tensor:
    """Undo `normalize` with ImageNet's statistics: (..., C), channels last -> [0, 1].

    Where C is not 3 the pixels come back as they are: those statistics are of RGB.
    """
    if pixels.shape[-1] != 3:
        return pixels
    return pixels * pixels.new_tensor(IMAGENET_STD) + pixels.new_tensor(IMAGENET_MEAN)


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
# how the rest of the scene looks and moves.


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


def split_mask(bool_masked_pos: Tensor, batch_size: int, num_patches: int) -> tuple[Tensor, Tensor]:
    """(B, N) bool -> indices of the visible (B, N_vis) and of the masked cubes (B, N_mask), each in increasing order.

    Raises TypeError or ValueError unless the mask is a bool (B, N) with the same count in every clip and something left
    visible. Clips of different counts could not share a batch: where the total happens to divide, a reshape would move
    tokens from one clip into another in silence.
    """
    if not isinstance(bool_masked_pos, Tensor) or bool_masked_pos.dtype != torch.bool:
        got = bool_masked_pos.dtype if isinstance(bool_masked_pos, Tensor) else type(bool_masked_pos).__name__
        raise TypeError(f"bool_masked_pos: got {got}, expected a bool tensor, True = masked")
    if bool_masked_pos.shape != (batch_size, num_patches):
        raise ValueError(f"bool_masked_pos: got shape {tuple(bool_masked_pos.shape)}, expected (batch, cubes in a clip)"
                         f" = ({batch_size}, {num_patches})")
    counts = bool_masked_pos.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"bool_masked_pos: got {counts} masked cubes per clip, expected the same count in each")
    num_visible = num_patches - counts[0]
    if num_visible == 0:
        raise ValueError("bool_masked_pos: every cube is masked, expected some to be visible")
    visible = (~bool_masked_pos).nonzero()[:, 1].view(batch_size, num_visible)
    masked = bool_masked_pos.nonzero()[:, 1].view(batch_size, num_patches - num_visible)
    return visible, masked


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, D), index (B, M) -> (B, M, D): the indexed tokens of each clip."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


# ----------------------------------------------------------------------------------------------------------------------
# The transformer block (a plain pre-norm ViT; joint attention over space and time; paper, section 3)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a clip, (B, N, D) -> (B, N, D).

    Queries and values have a bias, keys have none: q . (k + b) adds the same q . b to every score of a query, and
    softmax removes what is common to all of them.
    """

    def __init__(self, dim: int, num_heads: int, config: VideoMAEConfig):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, D) each
        if self.q_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        q, k, v = (rearrange(t, "b n (heads d) -> b heads n d", heads=self.num_heads) for t in (q, k, v))
        dropout = self.attention_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, heads, N, D / heads)
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))


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

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(self.attn(self.norm1(x)))
        return x + self.branch(self.mlp(self.norm2(x)))

    def branch(self, x: Tensor) -> Tensor:
        """Dropout, then drop path: in training, skip the whole branch for a random share of the clips."""
        x = self.dropout(x)
        if not self.training or self.drop_path == 0:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_path)
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
    """
    if config.position_embedding == "sinusoid":
        return torch.tensor(sinusoid_table(config.num_patches, dim), dtype=torch.float32)
    t, h, w = config.grid
    third = dim // 6 * 2  # even, so that each sin keeps its cos; time takes what is left over
    time = repeat(sinusoid_table(t, dim - 2 * third), "t d -> (t h w) d", h=h, w=w)
    row = repeat(sinusoid_table(h, third), "h d -> (t h w) d", t=t, w=w)
    column = repeat(sinusoid_table(w, third), "w d -> (t h w) d", t=t, h=h)
    return torch.tensor(np.concatenate([time, row, column], axis=1), dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Encoder: what is kept


def check_pixel_values(pixel_values: Tensor, config: VideoMAEConfig):
    """Raise TypeError or ValueError unless pixel_values is a float (B, T, C, H, W) of the config's sizes."""
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values: got {got}, expected a float tensor; 8-bit frames go through "
                        "VideoMAEImageProcessor or normalize() first")
    expected = (config.num_frames, config.num_channels, *config.image_hw)
    if tuple(pixel_values.shape[1:]) != expected or len(pixel_values) == 0:
        raise ValueError(f"pixel_values: got shape {tuple(pixel_values.shape)}, expected (batch, num_frames, "
                         f"num_channels, height, width) = (batch, {', '.join(map(str, expected))})")


@dataclass
class BaseModelOutput:
    """What the encoder gives."""

    last_hidden_state: Tensor  # (B, N_vis, D); N_vis = N without a mask


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
        # The mean-pooled classifier normalizes after the mean instead (`fc_norm`).
        self.norm = nn.Identity() if config.use_mean_pooling else nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> BaseModelOutput:
        """Encode a clip, or its visible cubes.

        pixel_values: (B, T, C, H, W) float, normalized as in pretraining: `normalize`, or VideoMAEImageProcessor with
            IMAGENET_MEAN and IMAGENET_STD.
        bool_masked_pos: (B, N) bool, True = hidden from the encoder, the same count in every clip; None hides nothing.
        Returns last_hidden_state (B, N_vis, D), visible cubes in increasing order.
        Raises TypeError or ValueError naming the argument.
        """
        check_pixel_values(pixel_values, self.config)
        cubes = patchify(pixel_values, self.config.tubelet_size, self.config.patch_size)  # (B, N, P)
        if bool_masked_pos is None:
            return BaseModelOutput(self.encode(cubes, self.positions))
        visible = split_mask(bool_masked_pos, *cubes.shape[:2])[0].to(cubes.device)
        return BaseModelOutput(self.encode(take(cubes, visible), self.positions[visible]))

    def encode(self, cubes: Tensor, positions: Tensor) -> Tensor:
        """cubes (B, N_vis, P) and their positions (N_vis, D) or (B, N_vis, D) -> (B, N_vis, D)."""
        x = self.embed(cubes) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------------------
# Decoder and loss: what is thrown away after pretraining


class VideoMAEDecoder(nn.Module):
    """Predict the masked cubes from the encoded visible ones. Narrow and shallow: most of the work is the encoder's."""

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
                       self.mask_token + self.positions[masked]], dim=1)  # (B, N, D_dec)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, visible.shape[1] :]))


@dataclass
class VideoMAEForPreTrainingOutput:
    """What a pretraining step gives."""

    loss: Tensor  # () mean squared error over the masked cubes
    logits: Tensor  # (B, N_mask, P) predicted cubes, in increasing order of position


@dataclass
class Reconstruction:
    """Three videos to look at, see `VideoMAEForPreTraining.reconstruct`."""

    original: Tensor  # (B, T, C, H, W) in [0, 1]
    masked: Tensor  # (B, T, C, H, W): the original, masked cubes grey
    reconstruction: Tensor  # (B, T, C, H, W): visible cubes as they are, masked cubes as predicted
    borrows_truth: bool  # True with norm_pix_loss: each predicted cube took its mean and std from the original


def cube_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, pixels, C) -> mean and std of each cube and channel, both (B, M, 1, C)."""
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)  # unbiased, as published
    return mean, variance.sqrt() + 1e-6


class VideoMAEForPreTraining(nn.Module):
    """Masked autoencoder: encoder -> decoder -> loss on the masked cubes (paper, section 3).

    As the published checkpoints, give it a config with `use_mean_pooling=False`: the encoder then ends in a norm.
    """

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config
        self.videomae = VideoMAEModel(config)
        self.decoder = VideoMAEDecoder(config)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> VideoMAEForPreTrainingOutput:
        """Predict the masked cubes of a clip and compare them with the truth.

        pixel_values: (B, T, C, H, W) float, normalized with ImageNet's mean and std.
        bool_masked_pos: (B, N) bool, True = masked, the same count in every clip; see `random_mask`.
        Raises TypeError or ValueError naming the argument.
        """
        check_pixel_values(pixel_values, self.config)
        cubes = patchify(pixel_values, self.config.tubelet_size, self.config.patch_size)  # (B, N, P)
        # A mask made on the CPU is split there, so that a GPU is never waited for.
        visible, masked = (x.to(cubes.device) for x in split_mask(bool_masked_pos, *cubes.shape[:2]))
        if masked.shape[1] == 0:
            raise ValueError("bool_masked_pos: no cube is masked, so there is nothing to predict")

        # `encode` and not `forward`: the clip is cut and the mask split only once, here.
        encoded = self.videomae.encode(take(cubes, visible), self.videomae.positions[visible])  # (B, N_vis, D)
        logits = self.decoder(encoded, visible, masked)  # (B, N_mask, P)
        loss = F.mse_loss(logits.float(), self.target(take(cubes, masked)))
        return VideoMAEForPreTrainingOutput(loss, logits)

    def target(self, cubes: Tensor) -> Tensor:
        """What to predict for some cubes, (B, M, P) -> (B, M, P): their pixels, with `norm_pix_loss` normalized.

        Normalizing each cube by its own mean and std, per channel, takes the brightness out of the task and leaves the
        structure: the paper and MAE both find it learns better features. Source: engine_for_pretraining.py.
        """
        pixels = self.to_pixels(cubes)
        if self.config.norm_pix_loss:
            mean, std = cube_statistics(pixels)
            pixels = (pixels - mean) / std
        return rearrange(pixels, "b m pixels c -> b m (pixels c)")

    def to_pixels(self, cubes: Tensor) -> Tensor:
        """Cubes of ImageNet-normalized pixels (B, M, P) -> (B, M, P / C, C) float32 in [0, 1]; see `denormalize`."""
        return denormalize(rearrange(cubes.float(), "b m (pixels c) -> b m pixels c", c=self.config.num_channels))

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> Reconstruction:
        """The pictures of a forward pass, for the arguments of `forward`; call `eval()` first. Not clamped to [0, 1].

        A `norm_pix_loss` model predicts no brightness and no contrast. To draw its cubes, each borrows the mean and std
        of the true one, and `borrows_truth` is set: say so under the picture.
        """
        logits = self(pixel_values, bool_masked_pos).logits  # (B, N_mask, P)
        bool_masked_pos = bool_masked_pos.to(pixel_values.device)
        pixels = self.to_pixels(patchify(pixel_values, self.config.tubelet_size, self.config.patch_size))
        predicted = rearrange(logits, "b m (pixels c) -> b m pixels c", c=self.config.num_channels).to(pixels.dtype)
        if self.config.norm_pix_loss:
            mean, std = cube_statistics(pixels[bool_masked_pos].view(len(pixels), -1, *pixels.shape[2:]))
            predicted = predicted * std + mean
        grey, filled = pixels.clone(), pixels.clone()
        grey[bool_masked_pos] = 0.5
        filled[bool_masked_pos] = predicted.flatten(0, 1)

        def to_video(pixels):  # (B, N, P / C, C) -> (B, T, C, H, W)
            return unpatchify(pixels.flatten(2), self.config.grid, self.config.tubelet_size, self.config.patch_size)

        return Reconstruction(to_video(pixels), to_video(grey), to_video(filled), self.config.norm_pix_loss)


# ----------------------------------------------------------------------------------------------------------------------
# Classifier: the encoder and one linear layer


@dataclass
class ImageClassifierOutput:
    """What the classifier gives; the name is transformers'."""

    loss: Tensor | None  # () cross-entropy, where labels were given
    logits: Tensor  # (B, num_labels)


class VideoMAEForVideoClassification(nn.Module):
    """All cubes through the encoder, mean over the tokens, norm, linear."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config
        self.videomae = VideoMAEModel(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.head_norm_eps) if config.use_mean_pooling else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.trunc_normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify clips.

        pixel_values: (B, T, C, H, W) float, normalized. labels: (B,) int64 class indices, for the loss.
        Raises TypeError or ValueError naming the argument.
        """
        x = self.videomae(pixel_values).last_hidden_state  # (B, N, D)
        # VideoMAE has no [CLS] token: without mean pooling the first cube's token stands for the clip, as published.
        x = self.fc_norm(x.mean(dim=1)) if self.fc_norm is not None else x[:, 0]  # (B, D)
        logits = self.classifier(x)
        if labels is None:
            return ImageClassifierOutput(None, logits)
        if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
            raise ValueError(f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, expected int64 class indices "
                             f"of shape ({len(logits)},)")
        return ImageClassifierOutput(F.cross_entropy(logits, labels), logits)


# ----------------------------------------------------------------------------------------------------------------------
# Published weights

# (theirs, ours), all applied to every name in this order; one list reads both layouts.
RENAMES = [
    # transformers
    (r"embeddings\.patch_embeddings\.projection", "embed"),
    (r"encoder\.layer\.", "blocks."),
    (r"decoder\.decoder_layers\.", "decoder.blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.attention\.", "attn."),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"query\.bias", "q_bias"),
    (r"value\.bias", "v_bias"),
    (r"videomae\.layernorm|^layernorm", "videomae.norm"),
    # both
    (r"^(encoder_to_decoder|mask_token)", r"decoder.\1"),
    # the authors
    (r"^encoder\.", "videomae."),
    (r"^(patch_embed|embed|blocks|norm)\.", r"videomae.\1."),
    (r"patch_embed\.proj", "embed"),
    (r"^head\.", "classifier."),
]


def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' code or of transformers -> the names and shapes of the classes here.

    Two things differ beside names: transformers keeps query, key and value apart, here they are one matrix as in the
    authors' files; a Conv3d weight (D, C, pt, ph, pw) becomes a Linear's over a cube, (D, pt ph pw C). The authors'
    files keep the state dict under "model" or "module". Names of an encoder alone come back with "videomae." in front.
    Raises ValueError where there is no cube embedding.
    """
    out = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    for name in [name for name in out if name.endswith("attn.query.weight")]:
        parts = [out.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        out[name.replace("query", "qkv")] = torch.cat(parts)
    name = "videomae.embed.weight"
    if name not in out:
        raise ValueError(f"state_dict: no cube embedding among its {len(state_dict)} names {list(state_dict)[:3]} ..., "
                         "expected the state dict of a VideoMAE")
    if out[name].ndim == 5:
        out[name] = rearrange(out[name], "d c pt ph pw -> d (pt ph pw c)")
    return out
