"""VideoMAE in one file: mask most of a clip in tubes, reconstruct its pixels, keep the encoder.

    clip -> patches -> tube mask -> encoder (visible patches) -> decoder (all) -> masked pixels

The published model as a worked example. A clip of 16 frames of 224 x 224 pixels is cut into 1,568
patches of 2 x 16 x 16 pixels: 8 time steps of 14 x 14 spatial positions. A tube mask of ratio 0.9
masks 176 of the 196 spatial positions, the same at every time step. So 160 visible patches enter
the encoder, and 1,408 masked ones are predicted: 2 * 16 * 16 * 3 = 1,536 numbers each.

    mask = random_mask("tube", len(clips), config.grid, mask_ratio=0.9)
    VideoMAEForPreTraining(config)(clips, mask).loss.backward()

Read it from top to bottom; data flows through it in the paper's order. Shapes use these letters:

    B            clips in a batch
    T, C, H, W   frames, channels, rows and columns of pixels
    N            patches in a clip, T' x H' x W' of them; N_vis are visible, N_mask are masked
    P            pixels in a patch, tubelet_size * patch_size^2 (the paper calls a patch a cube)
    D, D_dec     width of the encoder and of the decoder

Wrong input raises a ValueError or TypeError that says what came and what was expected.

References (in this file's repository, every output and gradient is tested against 2 and 3):
1. Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for
   Self-Supervised Video Pre-Training", NeurIPS 2022, https://arxiv.org/abs/2203.12602
2. the authors' code, https://github.com/MCG-NJU/VideoMAE
3. transformers 5.23, models/videomae, whose class, argument and output names are used here

Both embed patches with a Conv3d whose stride is its kernel. That is a Linear over a patch's pixels,
initialized alike, so here one `patchify` serves the embedding and the target.

From the project videomae-minimal 0.2, MIT License. Copy this file: it needs torch and einops. For
published weights, copy the project's checkpoints.py too; for their image processor, processor.py.
"""
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; the published checkpoints' statistics
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---- Config -------------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"),
               "relu": F.relu, "selu": F.selu}


def check_choice(name: str, value, allowed):
    """Raise ValueError unless the value is among those allowed."""
    if value not in tuple(allowed):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, allowed))}")


@dataclass
class VideoMAEConfig:
    """The numbers that shape a model; names and defaults are transformers' (ViT-B, 16 x 224 x 224).
    `VideoMAEConfig.preset("small")` gives a named size, for pretraining."""

    image_size: int | tuple[int, int] = 224  # a square, or (height, width)
    patch_size: int = 16
    num_channels: int = 3
    num_frames: int = 16
    tubelet_size: int = 2  # frames in a patch (not a mask's tube)
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str | Callable = "gelu"  # one of ACTIVATIONS, or a function of a tensor
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02  # std, before truncation, of mask token and new classifier
    layer_norm_eps: float = 1e-12  # the authors' models: 1e-6
    qv_bias: bool = True  # a bias for queries and values; keys have none, see Attention
    use_mean_pooling: bool = True  # False to pretrain as published; see VideoMAEModel's table
    decoder_num_attention_heads: int = 6
    decoder_hidden_size: int = 384
    decoder_num_hidden_layers: int = 4
    decoder_intermediate_size: int = 1536
    norm_pix_loss: bool = True  # normalize each target patch by its own mean and std
    # Not documented by transformers for VideoMAE:
    num_labels: int = 2
    id2label: dict[int, str] | None = None  # names of the labels
    head_norm_eps: float = 1e-5  # the norm before a head (fc_norm, decoder); the authors': 1e-6
    drop_path_rate: float = 0.0  # of the last block; earlier blocks have proportionally less
    position_embedding: str = "sinusoid"  # as published; "separable" suits small models better
    position_grid: tuple[int, int, int] | None = None  # interpolate positions made for this grid
    extra: dict = field(default_factory=dict)  # what else a config.json says; kept for saving

    @classmethod
    def preset(cls, name: str, **overrides) -> "VideoMAEConfig":
        """A size from PRESETS, with any field overridden."""
        check_choice("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})

    def __post_init__(self):
        height, width = self.image_hw
        for name, size, divisor in (
            ("image_size", height, "patch_size"),
            ("image_size", width, "patch_size"),
            ("num_frames", self.num_frames, "tubelet_size"),
            ("hidden_size", self.hidden_size, "num_attention_heads"),
            ("decoder_hidden_size", self.decoder_hidden_size, "decoder_num_attention_heads"),
        ):
            by = getattr(self, divisor)
            if min(size, by) < 1 or size % by:
                raise ValueError(f"{name}: got {size}, expected a multiple of {divisor} {by}")
        check_choice("position_embedding", self.position_embedding, ("sinusoid", "separable"))
        if not callable(self.hidden_act):
            check_choice("hidden_act", self.hidden_act, ACTIVATIONS)

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T', H', W'): patches along time, height and width; (8, 14, 14) by default."""
        height, width = (side // self.patch_size for side in self.image_hw)
        return self.num_frames // self.tubelet_size, height, width

    @property
    def num_patches(self) -> int:
        """N; 1,568 by default."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch, P * C; 1,536 by default."""
        return self.tubelet_size * self.patch_size**2 * self.num_channels


def _vit(width, layers, heads, decoder_width, decoder_layers, decoder_heads, **more) -> dict:
    """A ViT for pretraining, whose MLPs are four times as wide as its tokens."""
    return dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, use_mean_pooling=False,
        decoder_hidden_size=decoder_width, decoder_num_hidden_layers=decoder_layers,
        decoder_num_attention_heads=decoder_heads, decoder_intermediate_size=4 * decoder_width,
    ) | more


# small to huge: the authors' modeling_pretrain.py, decoder depths from scripts/kinetics. giant:
# VideoMAE V2's, whose MLPs are 48 / 11 times as wide. tiny and laptop are this project's own.
_OWN = dict(layer_norm_eps=1e-6, head_norm_eps=1e-6, position_embedding="separable")
PRESETS = {
    "small": _vit(384, 12, 6, 192, 4, 3),
    "base": _vit(768, 12, 12, 384, 4, 6),
    "large": _vit(1024, 24, 16, 512, 12, 8),
    "huge": _vit(1280, 32, 16, 640, 12, 8),
    "giant": _vit(1408, 40, 16, 512, 4, 8, patch_size=14, intermediate_size=6144),
    "tiny": _vit(128, 4, 4, 96, 1, 3, image_size=32, patch_size=8, num_frames=8, **_OWN),
    "laptop": _vit(192, 6, 3, 96, 2, 3, image_size=112, **_OWN),
}


# ---- Preprocessing: 8-bit frames of the model's size -> pixel_values, and back ------------------

def normalize(frames: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float32: (x / 255 - mean) / std, with ImageNet's statistics."""
    if frames.dtype != torch.uint8 or frames.shape[-3] != 3:
        raise TypeError(f"frames: got {frames.dtype} {frames.shape}, expected uint8 (..., 3, H, W)")
    mean, std = frames.new_tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float32)
    return (frames.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def denormalize(pixels: Tensor) -> Tensor:
    """Undo `normalize`: (..., C), channels last -> [0, 1]. Unchanged where C is not 3."""
    mean, std = pixels.new_tensor(IMAGENET_MEAN), pixels.new_tensor(IMAGENET_STD)
    return torch.addcmul(mean, pixels, std) if pixels.shape[-1] == 3 else pixels


# ---- Patches: the tokens of a video (paper, section 3: joint space-time cube embedding) ---------

def patchify(video: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """(B, T, C, H, W) -> (B, N, P, C): tubelet_size x patch_size x patch_size pixels a patch.

    Patches are in (time step, row, column) order, as are the pixels of each."""
    return rearrange(video, "b (t pt) c (h ph) (w pw) -> b (t h w) (pt ph pw) c",
                     pt=tubelet_size, ph=patch_size, pw=patch_size)


def unpatchify(patches: Tensor, grid: tuple, tubelet_size: int, patch_size: int) -> Tensor:
    """(B, N, P, C) -> (B, T, C, H, W), the inverse of `patchify`; grid is (T', H', W')."""
    t, h, w = grid
    return rearrange(patches, "b (t h w) (pt ph pw) c -> b (t pt) c (h ph) (w pw)",
                     t=t, h=h, w=w, pt=tubelet_size, ph=patch_size, pw=patch_size)


# ---- Masks (paper, section 3) -------------------------------------------------------------------
# Neighbouring frames are nearly the same picture, so a patch that is masked at only one time step
# can be copied from the next, and little is learned. A tube masks the same spatial positions at
# every time step: its content must be inferred from how the rest looks and moves. And the ratio is
# high, 0.9 in the paper: at a lower one, gaps can be filled in from their neighbours.

def random_mask(kind: str, batch_size: int, grid: tuple[int, int, int], mask_ratio: float,
                generator: torch.Generator | None = None) -> Tensor:
    """(B, N) bool on the CPU, True = masked: a new mask for each clip, the same count in all.

    kind "tube": int(mask_ratio * H'W') spatial positions at every time step; "random": int(
    mask_ratio * N) patches anywhere; "frame": int(mask_ratio * T') whole time steps. Source: the
    authors' masking_generator.py; the paper compares the three."""
    time, space = grid[0], grid[1] * grid[2]
    drawn = {"tube": (1, space), "frame": (time, 1), "random": (time, space)}  # expanded
    check_choice("kind", kind, drawn)
    num_drawn = math.prod(drawn[kind])
    num_masked = int(mask_ratio * num_drawn)
    if not 0 < num_masked < num_drawn:
        raise ValueError(f"mask_ratio: {mask_ratio} masks {num_masked} of {num_drawn} ({kind} mask)"
                         ", expected to mask some and to leave some")
    scores = torch.rand(batch_size, num_drawn, generator=generator, device="cpu")
    mask = mask_highest(scores, num_masked).view(batch_size, *drawn[kind])
    return mask.expand(batch_size, time, space).flatten(1)


def mask_highest(scores: Tensor, num_masked: int) -> Tensor:
    """scores (B, M) -> (B, M) bool, True for the num_masked highest of each row."""
    highest = scores.topk(num_masked, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, highest, True)


def split_mask(bool_masked_pos: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, N) bool -> indices (B, N_vis) of visible and (B, N_mask) of masked patches, increasing.

    A pair that is split already is returned as it is. Split on the CPU: counting on a GPU waits for
    it, and breaks torch.compile's graph.
    """
    if isinstance(bool_masked_pos, tuple):
        return bool_masked_pos
    dtype = getattr(bool_masked_pos, "dtype", None)
    if dtype is not torch.bool:
        raise TypeError(f"bool_masked_pos: got {dtype or bool_masked_pos}, expected a bool tensor")
    shape = tuple(bool_masked_pos.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"bool_masked_pos: got shape {shape}, expected (batch, patches)")
    counts = bool_masked_pos.sum(dim=1).tolist()
    # With uneven counts whose total divides, a reshape would move tokens from one clip to another.
    if len(set(counts)) > 1 or counts[0] in (0, shape[1]):
        raise ValueError(f"bool_masked_pos: got {counts} masked patches per clip, expected the "
                         f"same count in each, more than 0 and less than {shape[1]}")
    return tuple(x.nonzero()[:, 1].view(shape[0], -1) for x in (~bool_masked_pos, bool_masked_pos))


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, ...), index (B, M) -> (B, M, ...): the indexed tokens of each clip."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]


# ---- The transformer block: a plain pre-norm ViT with joint attention over space and time -------

class Attention(nn.Module):
    """Multi-head self-attention. Queries and values have a bias, as published. Keys have none:
    q . (k + b) adds the same q . b to every score of a query, which softmax then removes."""

    def __init__(self, dim: int, num_heads: int, config: VideoMAEConfig):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, queries: slice = slice(None)) -> Tensor:
        """(B, N, D) -> (B, M, D): what the queried tokens, all by default, gather from all N."""
        qkv = self.qkv(x)  # (B, N, 3 D)
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv += bias.to(qkv.dtype)  # under autocast, adding 32 bits to 16 is slow
        q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads)
                   for x in (q[:, queries], k, v))
        x = self.attend(q, k, v)  # (B, heads, M, D / heads)
        return self.proj(rearrange(x, "b heads m d -> b m (heads d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class MLP(nn.Module):
    """(B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden_dim: int, config: VideoMAEConfig):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = ACTIVATIONS.get(config.hidden_act, config.hidden_act)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention, then MLP, for the encoder and, at its own width, for the decoder."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, config, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = Attention(dim, num_heads, config)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(dim, hidden_dim, config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = drop_path

    def forward(self, x: Tensor, queries: slice = slice(None)) -> Tensor:
        """(B, N, D) -> (B, M, D): all tokens, or only those that are queried."""
        x = x[:, queries] + self.drop(self.attn(self.norm1(x), queries))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, then drop path: in training, skip the branch for a random share of clips."""
        x = self.dropout(x)
        if not self.training or self.drop_path == 0:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_path)
        return x * keep / (1 - self.drop_path)


def init_block_weights(module: nn.Module):
    """Xavier-uniform weights, zero biases, as in the authors' code. transformers uses
    normal(0, 0.02), which suits widths near 768; small models need one that follows the width."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- Positions: fixed, not learned, not in the checkpoints --------------------------------------

def sinusoid(num_positions: int, dim: int) -> Tensor:
    """(num_positions, dim) float64: sin and cos interleaved, at dim / 2 frequencies."""
    position, j = torch.arange(num_positions)[:, None], torch.arange(dim)
    angle = position / 10000 ** ((j - j % 2).double() / dim)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos())


def position_table(config: VideoMAEConfig, dim: int) -> Tensor:
    """(N, dim) float32, a vector for each patch.

    "sinusoid", as published: one sinusoid over the flattened (time step, row, column) index, where
    the same spatial position one step later is H'W' further on. "separable": time, row and column
    get a third of the width each, so neighbours along one share the code of the other two."""
    t, h, w = config.position_grid or config.grid
    if config.position_embedding == "sinusoid":
        table = sinusoid(t * h * w, dim)
    else:
        third = dim // 6 * 2  # even, so that each sin keeps its cos; time takes the rest
        time = repeat(sinusoid(t, dim - 2 * third), "t d -> (t h w) d", h=h, w=w)
        row = repeat(sinusoid(h, third), "h d -> (t h w) d", t=t, w=w)
        column = repeat(sinusoid(w, third), "w d -> (t h w) d", t=t, h=h)
        table = torch.cat([time, row, column], dim=1)
    if (t, h, w) != config.grid:
        table = rearrange(table, "(t h w) d -> 1 d t h w", t=t, h=h)
        table = F.interpolate(table, size=config.grid, mode="trilinear")
        table = rearrange(table, "1 d t h w -> (t h w) d")
    return table.float()


# ---- Loading and saving -------------------------------------------------------------------------

def import_checkpoints():
    """checkpoints.py, from this file's directory or package."""
    try:
        package = f"{__package__}." if __package__ else ""
        return importlib.import_module(f"{package}checkpoints")
    except ModuleNotFoundError as error:
        if not error.name.endswith("checkpoints"):
            raise
        raise ImportError("to load and save, put checkpoints.py beside videomae.py") from error


class VideoMAEPreTrainedModel(nn.Module):
    """Loading and saving, for the three models."""

    config_class = VideoMAEConfig

    @classmethod
    def from_pretrained(cls, source, strict: bool = True, **config_overrides):
        """A published checkpoint -> a model in evaluation mode.

        source: a directory as transformers writes it, a hub id such as "MCG-NJU/videomae-base", or
            a file of the authors or of VideoMAE V2, whose config is inferred from its shapes.
        strict: a weight that does not fit is an error (new heads and an unneeded decoder are only
            logged). False loads what fits and logs the rest.
        config_overrides: fields of VideoMAEConfig. Another num_labels gives a new head. For clips
            of another size pass position_grid: the old grid to interpolate, None for a new table.
        """
        return import_checkpoints().load_model(cls, source, strict, config_overrides)

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors, for transformers too. Overwrites nothing."""
        import_checkpoints().save_model(self, directory)


# ---- Encoder: what is kept ----------------------------------------------------------------------

class BaseModelOutput(NamedTuple):
    """What the encoder gives."""
    last_hidden_state: Tensor  # (B, N_vis, D); N_vis = N without a mask
    hidden_states: tuple[Tensor, ...] | None = None  # the embedding, then each block's output
    attentions: tuple[Tensor, ...] | None = None  # each block's weights (B, heads, N_vis, N_vis)


class VideoMAEModel(VideoMAEPreTrainedModel):
    """The encoder. With a mask it sees the visible patches only: a tenth, at a ratio of 0.9.
    `use_mean_pooling` says where the last norm is:

                                        norm at the end   what is read        norm after that
        published pretraining (False)   yes               all, by the decoder no
        first-token classifier (False)  yes               token 0             no
        mean-pooled classifier (True)   dropped           mean of all tokens  `fc_norm`, new
    """

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config
        dim, depth = config.hidden_size, config.num_hidden_layers
        self.patch_embed = nn.Linear(config.patch_dim, dim)
        self.register_buffer("positions", position_table(config, dim), persistent=False)  # (N, D)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_attention_heads, config.intermediate_size, config,
                  drop_path=config.drop_path_rate * i / max(depth - 1, 1))
            for i in range(depth)
        ).apply(init_block_weights)
        norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.norm = nn.Identity() if config.use_mean_pooling else norm

    def forward(self, pixel_values: Tensor, bool_masked_pos=None, head_mask=None,
                output_attentions=False, output_hidden_states=False,
                return_dict=None) -> BaseModelOutput:
        """Encode a clip, or its visible patches, which come out in increasing order.

        pixel_values: (B, T, C, H, W) float, normalized as in pretraining: by `normalize`, or by a
            VideoMAEImageProcessor with IMAGENET_MEAN and IMAGENET_STD.
        bool_masked_pos: (B, N) bool, True = masked, the same count in each clip, or what
            `split_mask` made of it. None masks nothing.
        head_mask: (heads,) or (layers, heads); 1 keeps a head, 0 switches it off.
        output_attentions, output_hidden_states: keep them. return_dict=False: a plain tuple.
        """
        visible, _ = check_inputs(pixel_values, bool_masked_pos, self.config)
        patches = patchify(pixel_values, self.config.tubelet_size, self.config.patch_size)
        if bool_masked_pos is not None:
            patches = take(patches, visible)  # (B, N_vis, P, C)
        if head_mask is None and not output_attentions and not output_hidden_states:
            output = BaseModelOutput(self.encode(patches, visible))
        else:
            output = look_inside(self, patches, visible, head_mask, output_attentions,
                                 output_hidden_states)
        return as_tuple(output, return_dict)

    def encode(self, patches: Tensor, index: Tensor) -> Tensor:
        """patches (B, N_vis, P, C), their index in the clip (B or 1, N_vis) -> (B, N_vis, D)."""
        x = self.embed(patches, index)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, patches: Tensor, index: Tensor) -> Tensor:
        """patches (B, N_vis, P, C), their index in the clip (B or 1, N_vis) -> (B, N_vis, D)."""
        return self.patch_embed(patches.flatten(2)) + self.positions[index]


def check_inputs(pixel_values: Tensor, bool_masked_pos, config: VideoMAEConfig):
    """Check clips and mask -> indices of visible and masked patches, on the clips' device."""
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        dtype = getattr(pixel_values, "dtype", type(pixel_values).__name__)
        raise TypeError(f"pixel_values: got {dtype}, expected a float tensor, see `normalize`")
    shape = (config.num_frames, config.num_channels, *config.image_hw)
    if tuple(pixel_values.shape[1:]) != shape or pixel_values.shape[0] == 0:
        raise ValueError(f"pixel_values: got shape {tuple(pixel_values.shape)}, expected (batch, "
                         f"num_frames, num_channels, height, width) = (batch, *{shape})")
    if bool_masked_pos is None:
        return torch.arange(config.num_patches, device=pixel_values.device)[None], None  # (1, N)
    visible, masked = split_mask(bool_masked_pos)
    got, expected = torch.cat([visible, masked], dim=1), (len(pixel_values), config.num_patches)
    if got.shape != expected:
        raise ValueError(f"bool_masked_pos: got shape {tuple(got.shape)}, expected {expected}")
    return tuple(x.to(pixel_values.device, non_blocking=True) for x in (visible, masked))


def as_tuple(output: tuple, return_dict: bool | None) -> tuple:
    """With return_dict=False, a plain tuple of the fields that are not None."""
    return tuple(x for x in output if x is not None) if return_dict is False else output


# ---- Decoder and loss: what is thrown away after pretraining ------------------------------------

class VideoMAEDecoder(nn.Module):
    """Predicts masked patches from visible ones. Narrow and shallow: it processes all N tokens.
    Tokens are not put back in order: each carries its position, and attention ignores the order."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        dim, std = config.decoder_hidden_size, config.initializer_range
        self.encoder_to_decoder = nn.Linear(config.hidden_size, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # learned; stands at masked patches
        nn.init.trunc_normal_(self.mask_token, std=std, a=-std, b=std)  # as the authors
        self.register_buffer("positions", position_table(config, dim), persistent=False)
        heads, hidden_dim = config.decoder_num_attention_heads, config.decoder_intermediate_size
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden_dim, config) for _ in range(config.decoder_num_hidden_layers)
        ).apply(init_block_weights)
        self.norm = nn.LayerNorm(dim, eps=config.head_norm_eps)
        self.head = nn.Linear(dim, config.patch_dim).apply(init_block_weights)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """encoded (B, N_vis, D), indices (B, N_vis) and (B, N_mask) -> (B, N_mask, P * C)."""
        num_masked = masked.shape[1]
        mask_tokens = self.mask_token.expand(len(encoded), num_masked, -1)
        x = torch.cat([self.encoder_to_decoder(encoded), mask_tokens], dim=1)  # (B, N, D_dec)
        positions = self.positions[torch.cat([visible, masked], dim=1)]
        # Tokens that a changed encoder puts in front of its patches, as a [CLS], get no position.
        x = x + F.pad(positions, (0, 0, x.shape[1] - positions.shape[1], 0))
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = last(x, queries=slice(-num_masked, None))  # (B, N_mask, D_dec), all that is used
        return self.head(self.norm(x))


class VideoMAEForPreTrainingOutput(NamedTuple):
    """What pretraining gives."""
    loss: Tensor  # () mean squared error over the masked patches
    logits: Tensor  # (B, N_mask, P * C) predicted patches, in increasing order of position
    hidden_states: tuple[Tensor, ...] | None = None  # the encoder's, see BaseModelOutput
    attentions: tuple[Tensor, ...] | None = None


class VideoMAEForPreTraining(VideoMAEPreTrainedModel):
    """Masked autoencoder: encoder -> decoder -> loss on the masked patches (paper, section 3)."""

    def __init__(self, config: VideoMAEConfig, encoder_class=VideoMAEModel,
                 decoder_class=VideoMAEDecoder):
        super().__init__()
        self.config = config
        self.videomae, self.decoder = encoder_class(config), decoder_class(config)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | tuple[Tensor, Tensor],
                return_dict: bool | None = None, **options) -> VideoMAEForPreTrainingOutput:
        """pixel_values: (B, T, C, H, W) float, normalized with ImageNet's mean and std.
        bool_masked_pos: (B, N) bool, True = masked, see `random_mask`, or what `split_mask` made
            of it, which torch.compile(fullgraph=True) needs. options: see VideoMAEModel."""
        # Split here too, because None, all visible, is not allowed.
        visible, masked = check_inputs(pixel_values, split_mask(bool_masked_pos), self.config)
        # Computed first, so that its temporaries are freed before the encoder runs.
        with torch.no_grad():
            target = self.target(pixel_values, masked)  # (B, N_mask, P * C)
        encoded, *seen = self.videomae(pixel_values, (visible, masked), **options)
        logits = self.decoder(encoded, visible, masked)  # (B, N_mask, P * C)
        loss = self.loss(logits, target)
        return as_tuple(VideoMAEForPreTrainingOutput(loss, logits, *seen), return_dict)

    def target(self, pixel_values: Tensor, masked: Tensor) -> Tensor:
        """What to predict: pixel_values (B, T, C, H, W), masked (B, N_mask) -> (B, N_mask, P * C).

        With `norm_pix_loss`, each patch is normalized by its own mean and std: it is structure that
        is predicted, not brightness (the paper, after MAE). Else the pixels in [0, 1].
        """
        patches = patchify(pixel_values, self.config.tubelet_size, self.config.patch_size)
        patches = take(patches, masked).float()  # (B, N_mask, P, C)
        normalized = self.config.norm_pix_loss
        return (normalize_patches(patches)[0] if normalized else denormalize(patches)).flatten(2)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, both (B, N_mask, P * C) -> ()."""
        if logits.shape != target.shape:
            raise ValueError(f"target: got {tuple(target.shape)}, expected {tuple(logits.shape)}")
        return F.mse_loss(logits.float(), target)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> tuple[Tensor, ...]:
        """-> three videos (B, T, C, H, W): original, masked (grey), reconstruction, scaled to
        [0, 1] where C is 3, but not clamped. Call `eval()` first.

        A `norm_pix_loss` model predicts neither brightness nor contrast: its patches borrow the
        mean and std of the true ones. Say so under the picture.
        """
        visible, masked = check_inputs(pixel_values, split_mask(bool_masked_pos), self.config)
        sizes = self.config.tubelet_size, self.config.patch_size
        patches = patchify(pixel_values.float(), *sizes)  # (B, N, P, C)
        predicted = self(pixel_values, (visible, masked)).logits.float()
        predicted = predicted.view(*masked.shape, *patches.shape[2:])  # (B, N_mask, P, C)
        if self.config.norm_pix_loss:
            _, mean, std = normalize_patches(take(patches, masked))
            predicted = denormalize(predicted * std + mean)
        original = denormalize(patches)
        index = masked[..., None, None].expand_as(predicted)
        grey, filled = original.scatter(1, index, 0.5), original.scatter(1, index, predicted)
        return tuple(unpatchify(x, self.config.grid, *sizes) for x in (original, grey, filled))


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """patches (B, M, P, C) -> each patch and channel normalized over its pixels, and their mean and
    std (B, M, 1, C). Source: the authors' engine_for_pretraining.py."""
    # The authors add 1e-6 to the std of pixels in [0, 1]; here both are divided by IMAGENET_STD.
    eps = 1e-6 / patches.new_tensor(IMAGENET_STD) if patches.shape[-1] == 3 else 1e-6
    mean = patches.mean(dim=2, keepdim=True)
    centred = patches - mean
    # Unbiased, as published; torch.var_mean is several times slower along such a dimension.
    std = (centred.square().sum(dim=2, keepdim=True) / (patches.shape[2] - 1)).sqrt() + eps
    return centred / std, mean, std


# ---- Classifier: the encoder and one linear layer -----------------------------------------------

class ImageClassifierOutput(NamedTuple):
    """What a classifier gives."""
    loss: Tensor | None  # (), where labels were given
    logits: Tensor  # (B, num_labels)
    hidden_states: tuple[Tensor, ...] | None = None  # the encoder's, see BaseModelOutput
    attentions: tuple[Tensor, ...] | None = None


class VideoMAEForVideoClassification(VideoMAEPreTrainedModel):
    """All patches through the encoder, then one linear layer; see the table beside VideoMAEModel.
    From a pretraining checkpoint the decoder is dropped and the head is new. The authors fine-tune
    with `use_mean_pooling=True`. Pass it: a pretraining checkpoint's config has False."""

    def __init__(self, config: VideoMAEConfig, encoder_class=VideoMAEModel):
        super().__init__()
        self.config = config
        self.videomae = encoder_class(config)
        dim, has_norm = config.hidden_size, config.use_mean_pooling
        self.fc_norm = nn.LayerNorm(dim, eps=config.head_norm_eps) if has_norm else None
        self.classifier = nn.Linear(dim, config.num_labels)
        nn.init.trunc_normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None,
                return_dict: bool | None = None, **options) -> ImageClassifierOutput:
        """pixel_values: (B, T, C, H, W) float, normalized.
        labels: (B,) class indices for a cross-entropy loss; where num_labels is 1, (B,) floats for
            a mean squared error. options: see VideoMAEModel."""
        x, *seen = self.videomae(pixel_values, **options)  # (B, N, D)
        if self.fc_norm is not None:
            x = self.fc_norm(x.mean(dim=1))  # (B, D)
        else:
            x = x[:, 0]  # VideoMAE has no [CLS] token: this is the first patch's, as published
        logits = self.classifier(x)
        loss = None if labels is None else self.loss(logits, labels)
        return as_tuple(ImageClassifierOutput(loss, logits, *seen), return_dict)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, num_labels), labels (B,) -> ()."""
        is_regression = self.config.num_labels == 1
        if labels.is_floating_point() != is_regression or labels.shape != logits.shape[:1]:
            kind = "floats (num_labels is 1: regression)" if is_regression else "class indices"
            raise ValueError(f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, expected "
                             f"{kind} of shape ({len(logits)},)")
        if is_regression:
            return F.mse_loss(logits[:, 0], labels)
        return F.cross_entropy(logits, labels.long())


# ---- Looking inside: transformers' options that keep or change what the encoder computes --------

def look_inside(encoder: VideoMAEModel, patches: Tensor, index: Tensor, head_mask: Tensor | None,
                output_attentions: bool, output_hidden_states: bool) -> BaseModelOutput:
    """`encoder.encode`, with attention written out: the fused kernel never holds the weights."""
    blocks, heads = encoder.blocks, encoder.config.num_attention_heads
    if any(type(block.attn).attend is not Attention.attend for block in blocks):
        raise TypeError("head_mask, output_*: got an attention of another kind, which they ignore")
    head_mask = torch.ones(heads) if head_mask is None else head_mask
    if head_mask.shape not in ((heads,), (len(blocks), heads)):
        raise ValueError(f"head_mask: got shape {tuple(head_mask.shape)}, expected (heads,) or "
                         f"(layers, heads) = ({len(blocks)}, {heads})")
    head_mask = head_mask.to(patches).expand(len(blocks), heads)
    hidden_states, attentions = [], []

    def attend(attention, mask, q, k, v):
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        weights = F.dropout(weights, attention.dropout, attention.training)  # (B, heads, N, N)
        weights = weights * mask.view(-1, 1, 1)
        attentions.append(weights)
        return weights @ v

    hooks = [b.register_forward_pre_hook(lambda _, x: hidden_states.append(x[0])) for b in blocks]
    for block, mask in zip(blocks, head_mask, strict=True):
        block.attn.attend = partial(attend, block.attn, mask)
    hooks.append(blocks[-1].register_forward_hook(lambda _, __, x: hidden_states.append(x)))
    try:
        x = encoder.encode(patches, index)
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            del block.attn.attend  # back to the method
    return BaseModelOutput(x, tuple(hidden_states) if output_hidden_states else None,
                           tuple(attentions) if output_attentions else None)
