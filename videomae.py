"""VideoMAE in one file: mask most of a clip in tubes, reconstruct its pixels, keep the encoder.

    clip -> patches -> tube mask -> encoder (visible patches) -> decoder (all) -> masked pixels

For example, in the published ViT-B, a clip of 16 frames of 224 x 224 pixels is cut into 1,568
patches of 2 x 16 x 16 pixels: 8 time steps of 14 x 14 spatial positions. A tube mask of ratio 0.9
masks 176 of the 196 spatial positions, the same at every time step. The 160 visible patches enter
the encoder, and the 1,408 masked ones are predicted, each 2 * 16 * 16 * 3 = 1,536 values.

    config = VideoMAEConfig.preset("base")
    mask = random_mask("tube", 2, config.grid, mask_ratio=0.9)  # (2, 1568), True = masked
    loss = VideoMAEForPreTraining(config)(torch.randn(2, 16, 3, 224, 224), mask).loss

Part one is the method, in the order in which data flows. Part two is everything else; the names
that part one takes from it (such as `check_inputs`) are details. To change the method, edit
`random_mask` for the mask, `autoencode` for the loss, `Attention.attend` for attention, and
`VideoMAEForPreTraining.target` for a prediction target that depends on each patch alone (and the
decoder's `head` if the target's width changes). Shapes use these letters; () is a scalar:

    B            clips in a batch
    T, C, H, W   frames, channels, rows and columns of pixels
    N            patches in a clip, T' x H' x W' of them; N_vis are visible, N_mask are masked
    M            any number of patches
    P            pixels in a patch, tubelet_size * patch_size^2 (the paper calls a patch a cube)
    D, D_dec     width of the encoder and of the decoder

References (this file's repository tests outputs against 2 and 3, and gradients against 3):
1. Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for
   Self-Supervised Video Pre-Training", NeurIPS 2022, https://arxiv.org/abs/2203.12602
2. the authors' code, https://github.com/MCG-NJU/VideoMAE
3. transformers 5.23, models/videomae, whose class, argument and output names this file uses

Part of videomae-minimal 0.3, MIT License. You can copy this file on its own; it needs only torch,
numpy and einops. To load published weights, copy checkpoints.py as well.
"""
import copy
import math
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CHECKPOINTS = f"{__package__ or ''}.checkpoints".lstrip(".")  # beside this file

# ==== Part one: the method =======================================================================

# ---- Config -------------------------------------------------------------------------------------

@dataclass
class VideoMAEConfig:
    """Model hyperparameters, with the names and defaults of transformers (ViT-B, 16 x 224 x 224).
    `VideoMAEConfig.preset("small")` gives a named size; see PRESETS."""

    image_size: int | tuple[int, int] = 224  # a square, or (height, width)
    patch_size: int = 16
    num_channels: int = 3
    num_frames: int = 16
    tubelet_size: int = 2  # frames in a patch (a mask's tube spans all frames)
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    decoder_hidden_size: int = 384
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 6
    decoder_intermediate_size: int = 1536
    norm_pix_loss: bool = True  # normalize target patches; see VideoMAEForPreTraining.target
    use_mean_pooling: bool = True  # classify the tokens' mean; False to pretrain, see the encoder
    num_labels: int | None = None  # by default len(id2label), or 2 without it
    id2label: dict[int, str] | None = None  # LABEL_0, LABEL_1, ... by default

    # Details to skip on a first reading:
    hidden_act: str | Callable = "gelu"  # a name in ACTIVATIONS, or a function on tensors
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0  # of the last block; rises linearly from 0
    initializer_range: float = 0.02  # std of mask token (truncated at one std) and classifier
    layer_norm_eps: float = 1e-12  # transformers' default; the authors and the presets use 1e-6
    head_norm_eps: float = 1e-5  # of fc_norm and the decoder's norm, as in transformers
    qv_bias: bool = True  # queries and values have a bias
    position_embedding: str = "sinusoid"  # as published; "separable" suits small models better
    position_grid: tuple[int, int, int] | None = None  # interpolate positions from this grid
    extra: dict = field(default_factory=dict)  # a config.json's other fields, kept for saving

    def __post_init__(self):
        check_config(self)

    @classmethod
    def preset(cls, name: str, **overrides) -> "VideoMAEConfig":
        """A size from PRESETS; keyword arguments override its fields."""
        check_choice("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})

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
        """Values in a patch, P * C; 1,536 by default."""
        return self.tubelet_size * self.patch_size**2 * self.num_channels


class VideoMAEPreTrainedModel(nn.Module):
    """Loads and saves as transformers' models do, by way of checkpoints.py beside this file."""

    accepts_loss_kwargs = False  # otherwise Trainer would pass num_items_in_batch to `forward`
    device = property(lambda self: next(self.parameters()).device)
    dtype = property(lambda self: next(self.parameters()).dtype)

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, source, **options):
        return import_module(CHECKPOINTS).load_model(cls, source, **options)

    def save_pretrained(self, directory):
        import_module(CHECKPOINTS).save_model(self, directory)


# ---- Preprocessing: frames of a video -> pixel_values -------------------------------------------

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; the published checkpoints' statistics
IMAGENET_STD = (0.229, 0.224, 0.225)


def preprocess(frames, config: VideoMAEConfig) -> Tensor:
    """A clip's uint8 frames, of any size -> pixel_values (T, 3, H, W) float32.

    frames: (T, H, W, 3) or (T, 3, H, W), as a list, an array or a tensor. They are resized to just
    cover the model's input, centre-cropped and normalized."""
    frames = check_frames(frames)  # (T, 3, h, w) uint8
    (h, w), (height, width) = frames.shape[-2:], config.image_hw
    # One side fits exactly. The other is longer, and rounded down, as in transformers.
    frames = resize(frames, max(height, width * h // w), max(width, height * w // h))
    top, left = (frames.shape[-2] - height) // 2, (frames.shape[-1] - width) // 2
    return normalize(frames[..., top : top + height, left : left + width])


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """(T, C, H, W) -> (T, C, height, width): bilinear, antialiased, within 1/255 of Pillow."""
    frames = frames.contiguous(memory_format=torch.channels_last)  # torch's fast path for uint8
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True)


def normalize(frames: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float32: (x / 255 - mean) / std, with ImageNet's statistics."""
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.shape[-3] != 3:
        raise TypeError(f"frames: got {frames.dtype} {frames.shape}, expected uint8 (..., 3, H, W)")
    mean, std = frames.new_tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float32)
    return (frames.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


# ---- Patches: the tokens of a video (paper, section 3: joint space-time cube embedding) ---------

def patchify(video: Tensor, config: VideoMAEConfig) -> Tensor:
    """(B, T, C, H, W) -> (B, N, P, C). Patches are in (time step, row, column) order, as are the
    pixels within each."""
    return rearrange(video, "b (t pt) c (h ph) (w pw) -> b (t h w) (pt ph pw) c",
                     pt=config.tubelet_size, ph=config.patch_size, pw=config.patch_size)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, ...), index (B, M) -> (B, M, ...): the indexed tokens of each clip."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]


# ---- Masks (paper, section 3) -------------------------------------------------------------------
# Neighbouring frames are nearly identical, so a patch masked at only one time step can be copied
# from the next, which teaches little. A tube masks the same spatial positions at every time step,
# so its content must be inferred from how the rest looks and moves. The ratio is high (0.9 in the
# paper) because smaller gaps could be filled in from their neighbours.

def random_mask(kind: str, batch_size: int, grid: tuple[int, int, int],
                mask_ratio: float) -> Tensor:
    """A new mask for each clip, (B, N) bool on the CPU, True = masked, equally many in each clip.

    mask_ratio is the share that is masked: of the H'W' spatial positions, at every time step
    ("tube"); of all N patches ("random"); or of the T' time steps ("frame"). Counts are rounded
    down. "tube" is the authors' masking_generator.py; the paper compares the three."""
    time, space = grid[0], grid[1] * grid[2]
    shapes = {
        "tube": (1, space),  # drawn once per spatial position, repeated over time
        "random": (time, space),  # drawn for each patch
        "frame": (time, 1),  # drawn once per time step, repeated over space
    }
    check_choice("kind", kind, shapes)
    num_drawn = math.prod(shapes[kind])
    num_masked = int(mask_ratio * num_drawn)
    if not 0 < num_masked < num_drawn:
        raise ValueError(f"mask_ratio: {mask_ratio} masks {num_masked} of {num_drawn} ({kind} mask)"
                         ", expected at least one masked and one visible")
    scores = torch.rand(batch_size, num_drawn, device="cpu")
    mask = mask_highest(scores, num_masked).view(batch_size, *shapes[kind])
    return mask.expand(batch_size, time, space).flatten(1)


def mask_highest(scores: Tensor, num_masked: int) -> Tensor:
    """scores (B, M) -> (B, M) bool, True for the num_masked highest scores of each row."""
    highest = scores.topk(num_masked, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, highest, True)


def split_mask(bool_masked_pos: Tensor, device=None) -> tuple[Tensor, Tensor]:
    """(B, N) bool -> indices (B, N_vis) of visible and (B, N_mask) of masked patches, increasing.
    Each clip must have the same counts, or its tokens could not be stacked with the others'.

    A pair of indices passes through: to predict fewer patches, shorten the second. Keep masks on
    the CPU: reading their count from a GPU forces a synchronization."""
    if isinstance(bool_masked_pos, tuple):
        return bool_masked_pos
    mask = torch.as_tensor(bool_masked_pos)
    counts = mask.sum(dim=1).tolist()
    if min(counts) != max(counts) or counts[0] in (0, mask.shape[1]):
        raise ValueError(f"bool_masked_pos: got {counts} masked patches, expected the same number "
                         "in each clip, at least one but not all")
    order = mask.byte().argsort(dim=1, stable=True)  # stable: increasing within each part
    order = order.to(device or mask.device, non_blocking=True)
    return order[:, : -counts[0]], order[:, -counts[0] :]


# ---- Positions: fixed, not learned, not in the checkpoints --------------------------------------

def sinusoid(num_positions: int, dim: int) -> Tensor:
    """(num_positions, dim) float64: sin and cos interleaved, at dim / 2 frequencies."""
    position, j = torch.arange(num_positions)[:, None], torch.arange(dim)
    angle = position / 10000 ** ((j - j % 2).double() / dim)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos())


def position_table(config: VideoMAEConfig, dim: int) -> Tensor:
    """(N, dim) float32, a vector for each patch: by default one sinusoid over the flattened (time
    step, row, column) index, where the same position one time step later is H'W' further on."""
    if config.position_embedding == "separable" or config.position_grid:
        return adapted_positions(config, dim)
    return sinusoid(config.num_patches, dim).float()


# ---- The transformer block: a plain pre-norm ViT with joint attention over space and time -------

class Attention(nn.Module):
    """Multi-head self-attention. Queries and values have a bias, as published. Keys have none:
    q . (k + b) would add the same q . b to all scores of a query, which softmax cancels."""

    def __init__(self, dim: int, num_heads: int, config: VideoMAEConfig):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if config.qv_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, D)."""
        qkv = self.qkv(x)  # (B, M, 3 D)
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv += bias.to(qkv.dtype)  # adding float32 to autocast's float16 is slow
        q, k, v = rearrange(qkv, "b m (n heads d) -> n b heads m d", n=3, heads=self.num_heads)
        x = self.attend(q, k, v)
        return self.proj(rearrange(x, "b heads m d -> b m (heads d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, heads, M, D / heads) -> the same shape."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class MLP(nn.Module):
    """(B, M, D) -> (B, M, D)."""

    def __init__(self, dim: int, hidden_dim: int, config: VideoMAEConfig):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = ACTIVATIONS.get(config.hidden_act, config.hidden_act)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention, then MLP. The encoder and the decoder use it, each at its own width."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, config, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = Attention(dim, num_heads, config)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(dim, hidden_dim, config)
        self.drop = Drop(config.hidden_dropout_prob, drop_path)  # skips a branch for some clips

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, D)."""
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


# ---- Encoder: kept after pretraining ------------------------------------------------------------

class VideoMAEEncoder(nn.Module):
    """Encodes any subset of a clip's patches, with their positions. In pretraining it sees only
    the visible ones, a tenth at a ratio of 0.9, which makes it cheap. Its final norm varies:

        use_mean_pooling   model                    encoder.norm   output used         fc_norm
        False              published pretraining    yes            all tokens          no
        False              first-token classifier   yes            token 0             no
        True               mean-pooled classifier   no             mean of all tokens  yes, new
    """

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        dim = config.hidden_size
        self.patch_embed = nn.Linear(config.patch_dim, dim)  # the authors' Conv3d, as a Linear
        self.register_buffer("positions", position_table(config, dim), persistent=False)  # (N, D)
        heads, hidden_dim = config.num_attention_heads, config.intermediate_size
        drop_paths = np.linspace(0, config.drop_path_rate, config.num_hidden_layers).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden_dim, config, drop_path) for drop_path in drop_paths
        ).apply(init_linear)  # Xavier-uniform
        norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.norm = nn.Identity() if config.use_mean_pooling else norm

    def forward(self, patches: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """patches (B, M, P, C), index (B, M) of their positions, by default all N -> (B, M, D)."""
        # positions[index] is (B, M, D): each patch keeps the position that it has in the clip.
        x = self.patch_embed(patches.flatten(2)) + self.positions[index]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---- Decoder: discarded after pretraining -------------------------------------------------------

class VideoMAEDecoder(nn.Module):
    """Predicts masked patches, all or any subset of them, from the visible ones. Narrow and
    shallow, as it processes all tokens. They are not put back in order, since each carries its
    position and attention ignores order."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        dim, std = config.decoder_hidden_size, config.initializer_range
        self.encoder_to_decoder = nn.Linear(config.hidden_size, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # stands in for masked patches
        nn.init.trunc_normal_(self.mask_token, std=std, a=-std, b=std)  # as in the authors' code
        self.register_buffer("positions", position_table(config, dim), persistent=False)
        heads, hidden_dim = config.decoder_num_attention_heads, config.decoder_intermediate_size
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden_dim, config) for _ in range(config.decoder_num_hidden_layers)
        ).apply(init_linear)
        self.norm = nn.LayerNorm(dim, eps=config.head_norm_eps)
        self.head = nn.Linear(dim, config.patch_dim).apply(init_linear)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """encoded (B, N_vis, D), indices (B, N_vis) and (B, N_mask) -> (B, N_mask, P * C)."""
        mask_tokens = self.mask_token.expand(*masked.shape, -1)
        x = torch.cat([self.encoder_to_decoder(encoded), mask_tokens], dim=1)  # (B, N, D_dec)
        x = x + self.positions[torch.cat([visible, masked], dim=1)]
        for block in self.blocks:
            x = block(x)
        x = x[:, -masked.shape[1]:]  # (B, N_mask, D_dec)
        return self.head(self.norm(x))


# ---- Pretraining: the masked autoencoder (paper, section 3) -------------------------------------

class VideoMAEForPreTraining(VideoMAEPreTrainedModel):
    """The masked autoencoder. `autoencode` is the method, line by line."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__(config)
        if config.use_mean_pooling:
            warnings.warn("use_mean_pooling: got True, which drops the encoder's final norm; "
                          "pass False to pretrain as published", stacklevel=2)
        self.videomae = VideoMAEModel(config)  # transformers' name for the encoder's wrapper
        self.decoder = VideoMAEDecoder(config)

    def autoencode(self, pixel_values: Tensor, visible: Tensor, masked: Tensor) -> tuple:
        """clips (B, T, C, H, W), indices (B, N_vis) of visible and (B, N_mask) of masked patches ->
        loss (), predicted patches (B, N_mask, P * C). Shapes below: ViT-B at mask ratio 0.9.
        torch.compile(model.autoencode, fullgraph=True) works."""
        patches = patchify(pixel_values, self.config)  # (B, 1568, 512, 3)
        target = self.target(take(patches, masked))  # (B, 1408, 1536)
        encoded = self.videomae.encoder(take(patches, visible), visible)  # (B, 160, 768)
        predicted = self.decoder(encoded, visible, masked)  # (B, 1408, 1536)
        loss = F.mse_loss(predicted.float(), target)
        return loss, predicted

    @torch.no_grad()
    def target(self, patches: Tensor) -> Tensor:
        """What to predict: patches (B, M, P, C) -> (B, M, P * C). With norm_pix_loss, pixels are
        normalized per patch and per channel, as in the authors' code, so that the model predicts
        structure, not brightness. Without it, RGB pixels go back to [0, 1]."""
        patches = patches.float()
        if not self.config.norm_pix_loss:
            return denormalize(patches).flatten(2)
        mean, std = patch_statistics(patches)
        return ((patches - mean) / std).flatten(2)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor, **options) -> tuple:
        """pixel_values (B, T, C, H, W) float, normalized with ImageNet's mean and std;
        bool_masked_pos (B, N) bool, True = masked, the same count in each clip -> loss (), and
        logits (B, N_mask, P * C): the predicted pixels, in increasing order of position. options:
        see Recorder."""
        recorder = Recorder(self.config, **options)
        check_inputs(self, pixel_values, bool_masked_pos)
        visible, masked = split_mask(bool_masked_pos, pixel_values.device)
        loss, logits = recorder.watch(self).autoencode(pixel_values, visible, masked)
        return recorder.output(loss=loss, logits=logits)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """patches (B, M, P, C) -> mean and std, per patch and per channel, (B, M, 1, C). Source: the
    authors' engine_for_pretraining.py."""
    # The authors add 1e-6 to the std of pixels in [0, 1]. Ours are divided by IMAGENET_STD already;
    # with the 1e-6 divided likewise, the target equals theirs.
    eps = 1e-6 / patches.new_tensor(IMAGENET_STD) if patches.shape[-1] == 3 else 1e-6
    mean = patches.mean(dim=2, keepdim=True)
    # Unbiased, as published; torch.var_mean is several times slower along dim 2.
    variance = (patches - mean).square().sum(dim=2, keepdim=True) / (patches.shape[2] - 1)
    return mean, variance.sqrt() + eps


# ---- Classifier: the encoder and one linear layer -----------------------------------------------

class VideoMAEForVideoClassification(VideoMAEPreTrainedModel):
    """Encodes all patches, then applies one linear layer. Loading a pretraining checkpoint drops
    the decoder and initializes a new head. To fine-tune as the authors do, with a new fc_norm
    instead of encoder.norm, pass use_mean_pooling=True: a pretraining config has False."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__(config)
        self.videomae = VideoMAEModel(config)
        dim, has_norm = config.hidden_size, config.use_mean_pooling
        self.fc_norm = nn.LayerNorm(dim, eps=config.head_norm_eps) if has_norm else None
        self.classifier = nn.Linear(dim, config.num_labels)
        nn.init.trunc_normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **options) -> tuple:
        """pixel_values (B, T, C, H, W) float, normalized -> logits (B, num_labels). With labels
        (B,) int64, also their cross-entropy as loss (). options: see Recorder."""
        recorder = Recorder(self.config, **options)
        check_inputs(self, pixel_values)
        patches = patchify(pixel_values, self.config)
        x = recorder.watch(self).videomae.encoder(patches)  # (B, N, D)
        if self.fc_norm is not None:
            x = self.fc_norm(x.mean(dim=1))  # (B, D)
        else:
            x = x[:, 0]  # VideoMAE has no [CLS] token; as published, use the first patch's
        logits = self.classifier(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return recorder.output(loss=loss, logits=logits)


# ---- The method ends here ----------------------------------------------------------------------

# ==== Part two: everything else ==================================================================

# ---- Named sizes --------------------------------------------------------------------------------

def _vit(width, layers, heads, decoder_width, decoder_layers, decoder_heads, **more) -> dict:
    """A ViT for pretraining, with the authors' eps and an MLP ratio of 4."""
    return dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, use_mean_pooling=False,
        layer_norm_eps=1e-6, head_norm_eps=1e-6,
        decoder_hidden_size=decoder_width, decoder_num_hidden_layers=decoder_layers,
        decoder_num_attention_heads=decoder_heads, decoder_intermediate_size=4 * decoder_width,
    ) | more


# small to huge are from the authors' modeling_pretrain.py, their decoder depths from
# scripts/kinetics; giant is VideoMAE V2's, with an MLP ratio of 48/11; tiny and laptop are our own.
PRESETS = {
    "small": _vit(384, 12, 6, 192, 4, 3),
    "base": _vit(768, 12, 12, 384, 4, 6),
    "large": _vit(1024, 24, 16, 512, 12, 8),
    "huge": _vit(1280, 32, 16, 640, 12, 8),
    "giant": _vit(1408, 40, 16, 512, 4, 8, patch_size=14, intermediate_size=6144),
    "tiny": _vit(128, 4, 4, 96, 1, 3, image_size=32, patch_size=8, num_frames=8,
                 position_embedding="separable"),
    "laptop": _vit(192, 6, 3, 96, 2, 3, image_size=112, position_embedding="separable"),
}
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"),
               "relu": F.relu, "selu": F.selu}


# ---- Details of the modules ---------------------------------------------------------------------

def init_linear(module: nn.Module):
    """Xavier-uniform weights and zero biases, as the authors initialize the blocks and the head.
    The embedding and encoder_to_decoder keep PyTorch's default, as theirs do. transformers uses
    normal(0, 0.02), which suits widths near 768; narrower layers need a larger std."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Drop(nn.Module):
    """Dropout, then drop path: in training, skip a block's branch for a random share of clips."""

    def __init__(self, dropout: float, drop_path: float):
        super().__init__()
        self.dropout, self.drop_path = nn.Dropout(dropout), nn.Dropout(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, D)."""
        return self.dropout(x) * self.drop_path(torch.ones_like(x[:, :1, :1]))


def adapted_positions(config: VideoMAEConfig, dim: int) -> Tensor:
    """(N, dim) float32: positions interpolated from another grid; or "separable" ones, which give
    time, row and column a third of the width each, so adjacent patches share two thirds."""
    t, h, w = config.position_grid or config.grid
    if config.position_embedding == "sinusoid":
        table = sinusoid(t * h * w, dim)
    else:
        third = dim // 6 * 2  # even, so that sin and cos stay paired; time takes the rest
        time, row, column = torch.cartesian_prod(*map(torch.arange, (t, h, w))).T  # (N,) each
        table = torch.cat([sinusoid(t, dim - 2 * third)[time], sinusoid(h, third)[row],
                           sinusoid(w, third)[column]], dim=1)

    table = rearrange(table, "(t h w) d -> 1 d t h w", t=t, h=h)
    if (t, h, w) != config.grid:
        table = F.interpolate(table, size=config.grid, mode="trilinear")
    return rearrange(table, "1 d t h w -> (t h w) d").float()


# ---- Frames of a video --------------------------------------------------------------------------

def frame_indices(total: int, num_frames: int = 16, stride: int = 4, start: float = 0.5) -> Tensor:
    """Pick num_frames of a video's `total` frames, `stride` apart -> (num_frames,) int64. start:
    from 0 (earliest) to 1 (latest), random in training. Short videos repeat their last frame."""
    latest = max(0, total - 1 - (num_frames - 1) * stride)
    index = round(start * latest) + stride * torch.arange(num_frames)
    return index.clamp(max=total - 1)


# ---- Checks, which raise ValueError or TypeError ------------------------------------------------

def check_choice(name: str, value, allowed):
    """Raise ValueError unless the value is one of those allowed."""
    if value not in tuple(allowed):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, allowed))}")


def check_config(config: VideoMAEConfig):
    """Validate a config's fields, and derive num_labels, id2label and label2id."""
    height, width = config.image_hw
    for name, size, divisor in (
        ("image_size", height, "patch_size"),
        ("image_size", width, "patch_size"),
        ("num_frames", config.num_frames, "tubelet_size"),
        ("hidden_size", config.hidden_size, "num_attention_heads"),
        ("decoder_hidden_size", config.decoder_hidden_size, "decoder_num_attention_heads"),
    ):
        by = getattr(config, divisor)
        if min(size, by) < 1 or size % by:
            raise ValueError(f"{name}: got {size}, expected a multiple of {divisor} ({by})")
    check_choice("position_embedding", config.position_embedding, ("sinusoid", "separable"))
    if not callable(config.hidden_act):
        check_choice("hidden_act", config.hidden_act, ACTIVATIONS)
    problem = config.extra.get("problem_type") or "single_label_classification"
    check_choice("problem_type", problem, ("single_label_classification",))
    if not config.initializer_range > 0:
        raise ValueError(f"initializer_range: got {config.initializer_range}, expected more than 0")
    if config.norm_pix_loss and config.tubelet_size * config.patch_size**2 == 1:
        raise ValueError("norm_pix_loss: got True, expected False for patches of a single pixel")

    names = config.id2label or {}
    names = dict(enumerate(names)) if isinstance(names, list) else names
    config.num_labels = config.num_labels or len(names) or 2
    if all(name == f"LABEL_{i}" for i, name in names.items()):  # default names, or none
        names = {i: f"LABEL_{i}" for i in range(config.num_labels)}
    if len(names) != config.num_labels:
        raise ValueError(f"num_labels: got {config.num_labels}, but id2label has {len(names)}")
    if len(names) < 2:
        raise ValueError("num_labels: got 1 (regression), expected at least 2 classes")
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}


def check_frames(frames) -> Tensor:
    """Frames in any form that `preprocess` accepts -> (T, 3, H, W) uint8."""
    if not isinstance(frames, Tensor):
        frames = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    channels_last = frames.shape[-1] == 3
    is_video = frames.ndim == 4 and channels_last != (frames.shape[1] == 3)
    if not is_video or frames.dtype != torch.uint8:
        raise ValueError(f"frames: got {frames.dtype} of shape {tuple(frames.shape)}, expected "
                         "uint8 (T, H, W, 3) or (T, 3, H, W)")
    return frames.movedim(-1, 1) if channels_last else frames


def check_inputs(model: VideoMAEPreTrainedModel, pixel_values: Tensor, bool_masked_pos=None):
    """Raise unless clips (B, T, C, H, W) and masks (B, N) fit the model. See also split_mask."""
    config, dtype = model.config, next(model.parameters()).dtype
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
        raise TypeError(f"pixel_values: got {got}, expected a float tensor; see `preprocess`")
    if pixel_values.dtype != dtype and not torch.is_autocast_enabled(pixel_values.device.type):
        raise TypeError(f"pixel_values: got {pixel_values.dtype}, expected {dtype}, as the model's")
    shape = (config.num_frames, config.num_channels, *config.image_hw)
    if tuple(pixel_values.shape[1:]) != shape or pixel_values.shape[0] == 0:
        raise ValueError(f"pixel_values: got shape {tuple(pixel_values.shape)}, expected (batch, "
                         f"{', '.join(map(str, shape))})")
    if bool_masked_pos is None or isinstance(bool_masked_pos, tuple):  # a pair of indices
        return
    mask, expected = torch.as_tensor(bool_masked_pos), (len(pixel_values), config.num_patches)
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(f"bool_masked_pos: got {mask.dtype} of shape {tuple(mask.shape)}, "
                         f"expected bool {expected}")


# ---- The encoder as a model; outputs and options under transformers' names ----------------------

class VideoMAEModel(VideoMAEPreTrainedModel):
    """The encoder as a standalone model, from clips to tokens."""

    def __init__(self, config: VideoMAEConfig):
        super().__init__(config)
        self.encoder = VideoMAEEncoder(config)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None,
                **options) -> tuple:
        """pixel_values (B, T, C, H, W) float, normalized; bool_masked_pos (B, N) bool, True =
        masked -> last_hidden_state (B, N_vis, D), or (B, N, D) if all are; see Recorder."""
        recorder = Recorder(self.config, **options)
        check_inputs(self, pixel_values, bool_masked_pos)
        patches, index = patchify(pixel_values, self.config), slice(None)  # (B, N, P, C)
        if bool_masked_pos is not None:
            index, _ = split_mask(bool_masked_pos, pixel_values.device)
            patches = take(patches, index)  # (B, N_vis, P, C)
        encoded = recorder.watch(self).encoder(patches, index)
        return recorder.output(last_hidden_state=encoded)


def output_type(fields: tuple[str, ...]) -> type:
    """The named tuple type of a model's output. Missing fields are None as attributes and absent
    from the tuple, so that output[0] is the first field present, as in transformers."""
    kind = namedtuple("ModelOutput", fields, module=__name__)
    for missing in {"loss", "hidden_states", "attentions"} - set(fields):
        setattr(kind, missing, None)
    return kind


OUTPUT_TYPES = {  # created on import, because torch.compile cannot create classes
    (*own, *seen): output_type((*own, *seen))
    for own in (("last_hidden_state",), ("logits",), ("loss", "logits"))
    for seen in ((), ("hidden_states",), ("attentions",), ("hidden_states", "attentions"))
}


@dataclass
class Recorder:
    """The options of `forward`, as in transformers, and what they record of the encoder."""

    config: VideoMAEConfig
    head_mask: Tensor | None = None  # (heads,) or (layers, heads); 1 keeps a head, 0 turns it off
    output_attentions: bool | None = None  # each block's attention weights, (B, heads, M, M)
    output_hidden_states: bool | None = None  # the embedding and each block's output, (B, M, D)
    return_dict: bool | None = None  # False returns a plain tuple

    def __post_init__(self):
        self.hidden_states, self.attentions = [], []
        for name in ("output_attentions", "output_hidden_states", "return_dict"):
            if getattr(self, name) is None:  # then the config decides, as in transformers
                setattr(self, name, getattr(self.config, name, self.config.extra.get(name)))
        shape = self.config.num_hidden_layers, self.config.num_attention_heads
        if self.head_mask is not None and self.head_mask.shape not in (shape[1:], shape):
            raise ValueError(f"head_mask: got shape {tuple(self.head_mask.shape)}, expected "
                             f"(heads,) or (layers, heads) = {shape}")
        self.needs_weights = bool(self.output_attentions) or self.head_mask is not None

    def watch(self, model: VideoMAEPreTrainedModel) -> VideoMAEPreTrainedModel:
        """The model; or, to look into it, a twin whose blocks record their outputs and whose
        attention is written out. Only this call sees the twin, so threads can share a model."""
        if not self.needs_weights and not self.output_hidden_states:
            return model
        model = twin(model)
        encoder = getattr(model, "videomae", model).encoder
        for block in encoder.blocks:
            block.forward = partial(self.record, block.forward)
        for module in encoder.modules() if self.needs_weights else ():
            if isinstance(module, Attention):
                module.attend = partial(self.attend, twin(module))
        return model

    def record(self, forward: Callable, x: Tensor) -> Tensor:
        """A block's `forward`, (B, M, D) -> (B, M, D)."""
        self.hidden_states = self.hidden_states or [x]
        self.hidden_states.append(forward(x))
        return self.hidden_states[-1]

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention.attend`, written out for its weights, which fused kernels hide. Refuses an
        attention that computes something else, because it was changed."""
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        with torch.no_grad():
            ours, theirs = weights @ v, twin(attention).eval().attend(q, k, v)
            tolerance = torch.finfo(v.dtype).eps ** 0.5 * v.abs().max()
            if ours.shape != theirs.shape or (ours - theirs).abs().max() > tolerance:
                raise TypeError("head_mask, output_attentions: got an `attend` that is not "
                                "softmax(q k^T / sqrt(d)) v, whose weights are unknown")
        weights = F.dropout(weights, attention.dropout, attention.training)  # (B, heads, M, M)
        if self.head_mask is not None:
            mask = self.head_mask.to(weights).expand(self.config.num_hidden_layers, -1)
            weights = weights * mask[len(self.attentions)].view(-1, 1, 1)
        self.attentions.append(weights)
        return weights @ v

    def output(self, **fields) -> tuple:
        """A model's output: its own fields that are not None, and what else was requested."""
        if self.needs_weights and len(self.attentions) != self.config.num_hidden_layers:
            raise TypeError(f"head_mask, output_attentions: got {len(self.attentions)} attentions, "
                            f"expected one in each of {self.config.num_hidden_layers} blocks")
        if self.output_hidden_states:
            fields["hidden_states"] = tuple(self.hidden_states)
        if self.output_attentions:
            fields["attentions"] = tuple(self.attentions)
        fields = {name: x for name, x in fields.items() if x is not None}
        if self.return_dict is False:
            return tuple(fields.values())
        return OUTPUT_TYPES[(*fields,)](**fields)


def twin(module: nn.Module) -> nn.Module:
    """A copy of a module and of its submodules, which shares all tensors."""
    module = copy.copy(module)
    module._modules = {name: child and twin(child) for name, child in module._modules.items()}
    return module


# ---- Pictures -----------------------------------------------------------------------------------

@torch.no_grad()
def reconstruct(model: VideoMAEForPreTraining, pixel_values: Tensor, bool_masked_pos: Tensor,
                grey: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """-> three videos (B, T, C, H, W): original, masked, reconstruction. They are scaled to [0, 1]
    if C is 3, but not clamped. Call `model.eval()` first.

    A norm_pix_loss model predicts neither brightness nor contrast, so its patches borrow the mean
    and std of the true ones. Mention this in captions."""
    config = model.config
    check_inputs(model, pixel_values, bool_masked_pos)
    visible, masked = split_mask(bool_masked_pos, pixel_values.device)
    patches = patchify(pixel_values, config)  # (B, N, P, C)
    # Not `autoencode`, which may predict fewer patches.
    encoded = model.videomae.encoder(take(patches, visible), visible)  # (B, N_vis, D)
    predicted = model.decoder(encoded, visible, masked)  # (B, N_mask, P * C)
    patches = patches.float()
    predicted = predicted.float().unflatten(2, patches.shape[2:])  # (B, N_mask, P, C)
    if config.norm_pix_loss:
        mean, std = patch_statistics(take(patches, masked))
        predicted = denormalize(predicted * std + mean)

    original = denormalize(patches)
    index = masked[..., None, None].expand_as(predicted)
    greyed, filled = original.scatter(1, index, grey), original.scatter(1, index, predicted)
    return tuple(unpatchify(x, config) for x in (original, greyed, filled))


def unpatchify(patches: Tensor, config: VideoMAEConfig) -> Tensor:
    """(B, N, P, C) -> (B, T, C, H, W), the inverse of `patchify`."""
    t, h, w = config.grid
    return rearrange(patches, "b (t h w) (pt ph pw) c -> b (t pt) c (h ph) (w pw)", t=t, h=h, w=w,
                     pt=config.tubelet_size, ph=config.patch_size, pw=config.patch_size)


def denormalize(patches: Tensor) -> Tensor:
    """Undo `normalize` for patches (..., P, C), back to [0, 1]. Unless C is 3, pixels were never
    normalized and stay as they are."""
    if patches.shape[-1] != 3:
        return patches
    mean, std = patches.new_tensor([IMAGENET_MEAN, IMAGENET_STD])
    return torch.addcmul(mean, patches, std)
