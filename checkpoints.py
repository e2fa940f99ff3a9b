"""Published VideoMAE checkpoints: every format in, transformers' directory out.

    python checkpoints.py SOURCE [field=value ...]          print what it is, and check its numbers
    python checkpoints.py SOURCE TARGET [field=value ...]   and write a directory for transformers

SOURCE is a directory as transformers 4 or 5 writes it, a hub id such as MCG-NJU/videomae-base, or a
file of the authors or of VideoMAE V2 (.pth, .pt, .bin, .safetensors), of which nothing is executed.
What a file does not say is given as fields of the config: num_attention_heads=3 num_frames=8.
"""
import json
import logging
import os
import re
import sys
import threading
import zipfile
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn

logger = logging.getLogger("videomae")  # what is left out or made new is said here


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
HEADS = {"decoder", "classifier", "fc_norm"}  # what is not the encoder's


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
        out[rename(name, NAMES + OTHER_NAMES)] = x
    if not any(name.startswith("videomae.") for name in out):
        out = {name if name.split(".")[0] in HEADS else f"videomae.{name}": x
               for name, x in out.items()}
    for query in [name for name in out if name.endswith("attn.query.weight")]:
        parts = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(part in out for part in parts):
            out[query.replace("query", "qkv")] = torch.cat([out.pop(part) for part in parts])
    embed = out.get("videomae.patch_embed.weight")
    if embed is None:
        raise ValueError(f"state_dict: got the names {list(state_dict)[:3]} ..., expected those of "
                         "a VideoMAE, with an embedding of patches")
    if embed.ndim == 5:
        out["videomae.patch_embed.weight"] = rearrange(embed, "d c pt ph pw -> d (pt ph pw c)")
    return out


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in transformers' names and shapes: `convert_state_dict` undone."""
    backwards = [(here, there) for there, here in reversed(NAMES)]
    pt, ps = model.config.tubelet_size, model.config.patch_size
    out = {}
    for name, x in model.state_dict().items():
        if name in ("patch_embed.weight", "videomae.patch_embed.weight"):
            x = rearrange(x, "d (pt ph pw c) -> d c pt ph pw", pt=pt, ph=ps, pw=ps).contiguous()
        parts = {name: x}
        if name.endswith("attn.qkv.weight"):
            names = [name.replace("qkv", part) for part in ("query", "key", "value")]
            parts = dict(zip(names, x.chunk(3), strict=True))
        out |= {rename(part, backwards): matrix for part, matrix in parts.items()}
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
        return {name: x.cpu() for name, x in content.items()}
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
PUBLISHED_HEADS = {1280: 16, 1408: 16, 640: 8}  # by width; all others have heads 64 wide


def fields_from_json(cls, values: dict) -> dict:
    """A JSON file of any transformers -> fields of dataclass `cls`, unknown ones as "extra"."""
    if values.get("model_type", "videomae") != "videomae":
        raise ValueError(f"model_type: got {values['model_type']!r}, expected 'videomae'")
    values = {OTHER_FIELDS.get(name, name): x for name, x in values.items()}
    if isinstance(names := values.get("id2label"), dict) and names:
        values["id2label"] = {int(i): label for i, label in names.items()}
        values.setdefault("num_labels", len(names))
    kinds = {f.name: f.type for f in fields(cls) if f.name in values}
    for name, kind in kinds.items():
        if not fits(values[name], kind):
            kind = getattr(kind, "__name__", kind)
            raise ValueError(f"{name}: got {values[name]!r}, expected {kind}, of a usual size")
    extra = {name: x for name, x in values.items() if name not in kinds}
    return {name: values[name] for name in kinds} | {"extra": extra}


def fits(value, kind) -> bool:
    """Whether a value from a JSON file is of a field's kind; an absurd number is of none."""
    if isinstance(kind, UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return isinstance(value, list | tuple) and all(fits(x, inner[0]) for x in value) and (
            inner[-1] is Ellipsis or len(value) == len(inner))
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and (
            not isinstance(value, bool) and abs(value) < 100_000)
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
    it is `known`: the number of heads, and the published 16 frames of 224 x 224."""
    weights = convert_state_dict(state_dict)
    conv = next((x for x in state_dict.values() if x.ndim == 5), None)  # (D, C, pt, ph, pw)
    if conv is None:
        raise ValueError("source: no Conv3d among the weights, expected a published VideoMAE")
    told = dict(zip(("num_channels", "tubelet_size", "patch_size"), conv.shape[1:4], strict=True))
    told |= dict(qv_bias="videomae.blocks.0.attn.q_bias" in weights,
                 use_mean_pooling="videomae.norm.weight" not in weights,
                 layer_norm_eps=1e-6, head_norm_eps=1e-6)
    if "classifier.weight" in weights:
        told["num_labels"] = len(weights["classifier.weight"])
    assumed = dict(num_frames=16, image_size=224)
    for part, prefix in (("videomae", ""), ("decoder", "decoder_")):
        layers = [x for name, x in weights.items() if re.match(rf"{part}.*\.fc1\.weight", name)]
        if layers:
            hidden_dim, width = layers[0].shape
            told |= {f"{prefix}hidden_size": width, f"{prefix}intermediate_size": hidden_dim,
                     f"{prefix}num_hidden_layers": len(layers)}
            assumed[f"{prefix}num_attention_heads"] = PUBLISHED_HEADS.get(width, width // 64)
    if assumed := {name: x for name, x in assumed.items() if name not in known}:
        logger.warning(f"the weights do not tell, assumed: {assumed}")
    return told | assumed | known


def make_config(cls, state_dict: dict[str, Tensor], values: dict, overrides: dict):
    """The config of a checkpoint, with fields of the caller's."""
    if names := overrides.get("id2label"):
        overrides = {"num_labels": len(names)} | overrides
    old = overrides if not values else fields_from_json(cls, values.get("model_config", values))
    if not values or "model_config" in values:  # VideoMAE V2's, which says little
        old = infer_config(state_dict, **old)
    published = cls(**old)
    if overrides.get("num_labels", published.num_labels) != published.num_labels:
        old["id2label"] = None  # the names are of the old labels
    config = cls(**old | overrides)
    if config.grid != published.grid and "position_grid" not in overrides:
        grid = tuple(published.position_grid or published.grid)
        raise ValueError(f"position_grid: the grid changes from {published.grid} to {config.grid}, "
                         f"expected {grid} to interpolate the positions, or None for new ones")
    return config


# ---- Models -------------------------------------------------------------------------------------

def expect(cls, config) -> dict[str, torch.Size]:
    """The shapes of a model's weights, before anything is allocated: a config may be absurd."""
    if max(config.num_hidden_layers, config.decoder_num_hidden_layers) > 1000:
        raise ValueError("num_hidden_layers: got over 1,000")
    if config.initializer_range <= 0:
        raise ValueError(f"initializer_range: got {config.initializer_range}, expected over 0")
    with torch.device("meta"):
        model = cls(config)
    if any(x.numel() > 2**31 for x in model.buffers()):
        raise ValueError(f"num_frames, image_size: got {config.num_patches} patches")
    return {name: x.shape for name, x in model.state_dict().items()}


def load_model(cls, source, strict: bool, overrides: dict):
    """See VideoMAEPreTrainedModel.from_pretrained in videomae.py."""
    state_dict, values = read_checkpoint(source)
    try:
        weights = convert_state_dict(state_dict)
        config = make_config(cls.config_class, state_dict, values, overrides)
        shapes = expect(cls, config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {error}") from error
    if not any(name.startswith("videomae.") for name in shapes):  # the encoder alone
        weights = {name.removeprefix("videomae."): x for name, x in weights.items()}
    fitting = {name: x for name, x in weights.items() if shapes.get(name) == x.shape}
    if {"num_labels", "id2label"} & overrides.keys():  # a head of other labels is replaced
        weights = {name: x for name, x in weights.items()
                   if name in fitting or not name.startswith("classifier.")}

    title = f"{cls.__name__} from {source}"
    ours, theirs = ({name.split(".")[0] for name in names} for names in (shapes, weights))
    new = (ours - theirs) & {"classifier", "fc_norm"}
    unused = (theirs - ours) & HEADS
    if "fc_norm" in ours and "videomae.norm.weight" in weights:
        unused.add("videomae.norm")  # fc_norm replaces it
    used = {x for x in weights if not x.startswith(tuple(f"{part}." for part in unused))}
    wrong = {
        "missing": {name for name in shapes.keys() - used if name.split(".")[0] not in new},
        "unexpected": used - shapes.keys(),
        "of another shape": {f"{name} {tuple(weights[name].shape)} instead of {tuple(shapes[name])}"
                             for name in used & shapes.keys() - fitting.keys()},
    }
    text = "; ".join(f"{what}: {', '.join(sorted(x))}" for what, x in wrong.items() if x)
    if text and strict:
        raise ValueError(f"{title}: {text}")
    if text:
        logger.warning(f"{title}: {text}")
    if new:
        logger.warning(f"{title}: new, to be trained: {', '.join(sorted(new))}")
    if unused:
        logger.warning(f"{title}: not used: {', '.join(sorted(unused))}")
    model = cls(config)
    model.load_state_dict(fitting, strict=False)
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

def main():
    """The command line; see the top of the file."""
    import videomae
    from processor import VideoMAEImageProcessor

    paths = [text for text in sys.argv[1:] if "=" not in text]
    if len(paths) not in (1, 2) or paths[0].startswith("-"):
        sys.exit(__doc__)
    source, *targets = paths
    pairs = [text.split("=", 1) for text in sys.argv[1:] if "=" in text]
    overrides = {name: json.loads(x) if re.match(r"[\d\[{tfn]", x) else x for name, x in pairs}
    parts = {name.split(".")[0] for name in convert_state_dict(read_checkpoint(source)[0])}
    kinds = {"decoder": videomae.VideoMAEForPreTraining,
             "classifier": videomae.VideoMAEForVideoClassification}
    cls = next((kinds[head] for head in kinds if head in parts), videomae.VideoMAEModel)
    model = cls.from_pretrained(source, **overrides)

    millions = sum(x.numel() for x in model.parameters()) / 1e6
    default = vars(cls.config_class()) | {"extra": model.config.extra}
    print(f"{source}: {cls.__name__}, {millions:.2f} M parameters")
    print({name: x for name, x in vars(model.config).items() if x != default[name]})
    if broken := [name for name, x in model.named_parameters() if not x.isfinite().all()]:
        raise ValueError(f"{source}: not finite: {', '.join(broken)}")
    for target in targets:
        size = dict(zip(("height", "width"), model.config.image_hw, strict=True))
        processor = VideoMAEImageProcessor(  # as the authors prepare their clips
            size=min(size.values()), crop_size=size,
            image_mean=videomae.IMAGENET_MEAN, image_std=videomae.IMAGENET_STD)
        if (find(source) / "preprocessor_config.json").exists():
            processor = VideoMAEImageProcessor.from_pretrained(source)
        model.save_pretrained(target)
        processor.save_pretrained(target)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"checkpoints.py: {error}")
