"""Published VideoMAE checkpoints: every format in, transformers' directory out.

    python checkpoints.py SOURCE [field=value ...]          print what it is, and check its numbers
    python checkpoints.py SOURCE TARGET [field=value ...]   and write a directory for transformers

SOURCE is a directory as transformers 4 or 5 writes it, a hub id such as MCG-NJU/videomae-base, or a
file of the authors or of VideoMAE V2 (.pth, .pt, .bin, .safetensors), of which nothing is executed.
What a file does not say is given as fields of the config, in JSON: num_attention_heads=3. Wrong
input raises a ValueError or TypeError that names it. Needs torch, einops and safetensors; with
TARGET, processor.py.
"""
import json
import logging
import os
import sys
import threading
import zipfile
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn

logger = logging.getLogger("videomae")  # says what is dropped and what is newly initialized


# ---- Names and shapes ---------------------------------------------------------------------------

NAMES = [  # in a transformers directory, and here; ^ is the start of a name
    ("embeddings.patch_embeddings.projection.", "patch_embed."),
    ("encoder.layer.", "blocks."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.attention.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("^layernorm.", "^norm."),
    ("^videomae.layernorm.", "^videomae.norm."),
    ("^encoder_to_decoder", "^decoder.encoder_to_decoder"),
    ("^mask_token", "^decoder.mask_token"),
]
OTHER_NAMES = [  # the authors' and VideoMAE V2's, and the biases of transformers 5
    ("^encoder.", "^videomae."),
    ("patch_embed.proj.", "patch_embed."),
    ("^head.", "^classifier."),
    ("attn.query.bias", "attn.q_bias"),
    ("attn.value.bias", "attn.v_bias"),
]
HEADS = ("decoder.", "classifier.", "fc_norm.", "videomae.norm.")  # not every model has them


def rename(name: str, pairs) -> str:
    """Replace (old, new) parts of a dotted name, one pair after the other."""
    name = f"^{name}"
    for old, new in pairs:
        name = name.replace(old, new)
    return name[1:]


def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights -> the names here, with "videomae." in front also of an encoder alone.
    Query, key and value become one matrix, a Conv3d (D, C, pt, ph, pw) a Linear (D, pt ph pw C)."""
    out = {}
    for name, x in state_dict.items():
        name = name.removeprefix("module.").removeprefix("model.")
        x = rearrange(x, "d c pt ph pw -> d (pt ph pw c)") if x.ndim == 5 else x
        out[rename(name, NAMES + OTHER_NAMES)] = x
    if not any(name.startswith("videomae.") for name in out):
        out = {name if name.startswith(HEADS) else f"videomae.{name}": x
               for name, x in out.items()}
    for query in [name for name in out if name.endswith("attn.query.weight")]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        matrices = [out.pop(name) for name in names if name in out]
        out[query.replace("query", "qkv")] = torch.cat(matrices)
    if "videomae.patch_embed.weight" not in out:
        raise ValueError(f"state_dict: got the names {list(state_dict)[:3]} ..., expected those of "
                         "a VideoMAE, with an embedding of patches")
    return out


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in transformers' names and shapes: `convert_state_dict` undone."""
    backwards = [(here, there) for there, here in reversed(NAMES)]
    pt, ps = model.config.tubelet_size, model.config.patch_size
    out = {}
    for name, x in model.state_dict().items():
        name = rename(name, backwards)
        if name.endswith("patch_embeddings.projection.weight"):
            x = rearrange(x, "d (pt ph pw c) -> d c pt ph pw", pt=pt, ph=ps, pw=ps).contiguous()
        if name.endswith("attention.qkv.weight"):
            for part, matrix in zip(("query", "key", "value"), x.chunk(3), strict=True):
                out[name.replace("qkv", part)] = matrix
        else:
            out[name] = x
    return out


# ---- Files --------------------------------------------------------------------------------------

def find(source: str | os.PathLike) -> Path:
    """A file or directory as it is; a hub id -> the directory it is downloaded to, once."""
    path = Path(source)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download
        path = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        if not any(path.glob("*.safetensors")):
            snapshot_download(str(source), allow_patterns="*.bin")  # into the same directory
    except Exception as error:
        raise ValueError(f"source: {source} is neither here nor on the hub ({error})") from error
    return path


def read_checkpoint(source: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """-> the state dict as it was saved, and what the config.json beside it says, {} without."""
    path = find(source)
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((file for file in files if file.exists()), None)
        if path is None:
            raise ValueError(f"source: no model.safetensors and no pytorch_model.bin in {source}")
    config = path.with_name("config.json")
    return read_file(path), read_file(config) if config.exists() else {}


def read_file(path: Path) -> dict:
    """What a .json, a .safetensors or a file of torch.save holds; nothing in it is executed."""
    try:
        if path.suffix == ".json":
            return {**json.loads(path.read_text(encoding="utf-8"))}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile  # a checksum differs, which torch does not see
        with torch.serialization.safe_globals([Namespace]):  # the authors' command line
            content = torch.load(path, map_location="cpu", weights_only=True)
        for wrapper in ("state_dict", "model", "module"):
            content = content.get(wrapper, content)
        return {str(name): Tensor.cpu(x) for name, x in content.items()}
    except Exception as error:  # not chained: torch's text proposes to execute the file
        reason = type(error).__name__
        raise ValueError(f"{path}: missing, damaged, or more than plain data ({reason})") from None


def write_whole(path: Path, write):
    """Call write(a binary file) for a temporary file, then rename: readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(directory: str | os.PathLike, contents: dict[str, bytes]):
    """Write files that must not exist yet."""
    for name in contents:
        if (Path(directory) / name).exists():
            raise ValueError(f"directory: {Path(directory) / name} exists already")
    for name, content in contents.items():
        write_whole(Path(directory) / name, lambda file, content=content: file.write(content))


# ---- Configs ------------------------------------------------------------------------------------

OTHER_FIELDS = {"qkv_bias": "qv_bias",  # transformers 4 and every file on the hub
                "img_size": "image_size", "num_heads": "num_attention_heads"}  # VideoMAE V2
LIMITS = {  # a corrupt config must not fill the memory before its weights are looked at
    "num_hidden_layers": (0, 1000), "decoder_num_hidden_layers": (0, 1000),
    "num_patches": (1, 100_000), "initializer_range": (1e-9, 1),
}


def fields_from_json(cls, values: dict) -> dict:
    """A JSON file of any transformers -> fields of dataclass `cls`, unknown ones as "extra"."""
    if values.get("model_type", "videomae") != "videomae":
        raise ValueError(f"model_type: got {values['model_type']!r}, expected 'videomae'")
    values = {OTHER_FIELDS.get(name, name): x for name, x in values.items()}
    if isinstance(names := values.get("id2label"), dict) and names:
        values["id2label"] = {int(i): label for i, label in names.items()}
        values.setdefault("num_labels", len(names))
    known = {f.name: values.pop(f.name) for f in fields(cls) if f.name in values}
    for f in fields(cls):
        if f.name in known and not fits(known[f.name], f.type):
            raise ValueError(f"{f.name}: got {known[f.name]!r}, expected a plausible {f.type}")
    return known | {"extra": values}


def fits(value, kind) -> bool:
    """Whether a value from a JSON file is of a field's kind; a huge number is of none."""
    if isinstance(kind, UnionType):
        return any(fits(value, option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return (isinstance(value, list) and len(value) == len(get_args(kind))
                and all(map(fits, value, get_args(kind))))
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 100_000
    return isinstance(value, get_origin(kind) or kind)


def config_to_json(config) -> dict:
    """For a config.json that every transformers reads."""
    values = dict(vars(config))
    labels = config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)}
    del values["num_labels"]  # as in transformers, the number of names says it
    values |= dict(model_type="videomae", qkv_bias=values.pop("qv_bias"), id2label=labels,
                   label2id={label: int(i) for i, label in labels.items()})
    return values.pop("extra") | values


def infer_config(state_dict: dict[str, Tensor], **known) -> dict:
    """Config fields from the weights' shapes. What these do not tell is assumed and logged, unless
    it is `known`: the published 16 frames of 224 x 224, and the number of heads."""
    conv = next((x for x in state_dict.values() if x.ndim == 5), None)  # (D, C, pt, ph, pw)
    if conv is None:
        raise ValueError("source: no Conv3d among the weights, expected a published VideoMAE")
    weights = convert_state_dict(state_dict)
    told = dict(zip(("num_channels", "tubelet_size", "patch_size"), conv.shape[1:4], strict=True))
    told |= dict(qv_bias="videomae.blocks.0.attn.q_bias" in weights,
                 use_mean_pooling="videomae.norm.weight" not in weights,
                 layer_norm_eps=1e-6, head_norm_eps=1e-6)
    if "classifier.weight" in weights:
        told["num_labels"] = len(weights["classifier.weight"])
    assumed = dict(num_frames=16, image_size=224)
    for part, prefix, most_heads in (("videomae", "", 16), ("decoder", "decoder_", 8)):
        layers = [x for name, x in weights.items()
                  if name.startswith(part) and name.endswith("fc1.weight")]
        if layers:
            hidden_dim, width = layers[0].shape
            told |= {f"{prefix}hidden_size": width, f"{prefix}intermediate_size": hidden_dim,
                     f"{prefix}num_hidden_layers": len(layers)}
            assumed[f"{prefix}num_attention_heads"] = min(width // 64, most_heads)
    if assumed := {name: x for name, x in assumed.items() if name not in known}:
        logger.warning(f"not told by the weights, assumed: {assumed}")
    return told | assumed | known


def make_config(cls, state_dict: dict[str, Tensor], values: dict, overrides: dict):
    """The config of a checkpoint, `values` being its config.json's, with fields of the caller's."""
    is_v2 = isinstance(values.get("model_config"), dict)  # VideoMAE V2's, which says little
    known = fields_from_json(cls, values["model_config"] if is_v2 else values)
    if is_v2 or not values:
        known = infer_config(state_dict, **overrides | known)
    published = cls(**known)
    if overrides.get("num_labels", published.num_labels) != published.num_labels:
        overrides = {"id2label": None} | overrides  # the names are of the old labels
    config = replace(published, **overrides)
    if config.grid != published.grid and "position_grid" not in overrides:
        grid = tuple(published.position_grid or published.grid)
        raise ValueError(f"position_grid: the grid changes from {published.grid} to {config.grid}, "
                         f"expected {grid} to interpolate the positions, or None for new ones")
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected {low} to {high}")
    return config


# ---- Models -------------------------------------------------------------------------------------

def load_model(cls, source, strict: bool, overrides: dict):
    """See VideoMAEPreTrainedModel.from_pretrained in videomae.py."""
    state_dict, values = read_checkpoint(source)
    if names := overrides.get("id2label"):
        overrides = {"num_labels": len(names)} | overrides
    try:
        config = make_config(cls.config_class, state_dict, values, overrides)
        with torch.device("meta"):  # shapes only: nothing is allocated yet
            blank = cls(config)
        expected, weights = blank.state_dict(), convert_state_dict(state_dict)
        if not any(name.startswith("videomae.") for name in expected):  # the encoder alone
            weights = {name.removeprefix("videomae."): x for name, x in weights.items()}
        fitting = {name: x for name, x in weights.items()
                   if name not in expected or x.shape == expected[name].shape}

        # A head is taken whole or not at all; one of other labels is replaced.
        heads = *HEADS, "norm."  # the last one is an encoder's alone
        ours, theirs = ({head for head in heads if any(name.startswith(head) for name in names)}
                        for names in (expected, weights))
        if "num_labels" in overrides and "classifier.weight" in expected.keys() - fitting.keys():
            theirs.discard("classifier.")
        new, unused = (ours - theirs) & {"classifier.", "fc_norm."}, theirs - ours
        if new or unused:
            logger.warning(f"{cls.__name__} from {source}: new, to be trained: {sorted(new)}, "
                           f"not used: {sorted(unused)}")
        if strict:
            used = {name: x for name, x in weights.items() if not name.startswith(tuple(unused))}
            used |= {name: x for name, x in expected.items() if name.startswith(tuple(new))}
            blank.load_state_dict(used, assign=True)  # or an error that names all that is wrong
        model = cls(config)
        different = model.load_state_dict(fitting, strict=False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {error}") from error
    if not strict:
        logger.warning(f"{cls.__name__} from {source}: {different}")
    return model.eval()


def save_model(model: nn.Module, directory):
    """config.json and model.safetensors, as transformers writes them."""
    config, default = vars(model.config), vars(type(model.config)())
    for name in ("position_embedding", "position_grid", "head_norm_eps"):
        if config[name] != default[name]:
            logger.warning(f"{directory}: transformers does not know {name}={config[name]}")
    values = config_to_json(model.config)
    values["architectures"] = [type(model).__name__]
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {name: x.cpu() for name, x in published_state_dict(model).items()}
    write_new(directory, {"model.safetensors": safetensors.torch.save(weights, {"format": "pt"}),
                          "config.json": json.dumps(values, indent=2).encode()})


# ---- The command line ---------------------------------------------------------------------------

def main(source: str, target: str | None = None, **fields):
    """Print what a checkpoint is and check its numbers; write it to `target`, for transformers."""
    import videomae

    names = convert_state_dict(read_checkpoint(source)[0])
    cls = videomae.VideoMAEModel
    if "classifier.weight" in names:
        cls = videomae.VideoMAEForVideoClassification
    if "decoder.norm.weight" in names:
        cls = videomae.VideoMAEForPreTraining
    model = cls.from_pretrained(source, **fields)
    count = sum(x.numel() for x in model.parameters())
    print(f"{source}: {cls.__name__}, {count / 1e6:.2f} M parameters\n{model.config}")
    if broken := [name for name, x in model.named_parameters() if not x.isfinite().all()]:
        raise ValueError(f"{source}: not finite: {', '.join(broken)}")
    if target:
        from processor import VideoMAEImageProcessor

        size = dict(zip(("height", "width"), model.config.image_hw, strict=True))
        processor = VideoMAEImageProcessor(  # as the authors prepare their clips
            size=min(size.values()), crop_size=size,
            image_mean=videomae.IMAGENET_MEAN, image_std=videomae.IMAGENET_STD)
        if "image_size" not in fields and (find(source) / "preprocessor_config.json").exists():
            processor = VideoMAEImageProcessor.from_pretrained(source)
        model.save_pretrained(target)
        processor.save_pretrained(target)


if __name__ == "__main__":
    paths = [text for text in sys.argv[1:] if "=" not in text]
    pairs = [text.split("=", 1) for text in sys.argv[1:] if "=" in text]
    if len(paths) not in (1, 2) or paths[0].startswith("-"):
        sys.exit(__doc__)
    try:
        main(*paths, **{name: json.loads(value) for name, value in pairs})
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"checkpoints.py: {error}")
