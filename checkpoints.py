"""Load VideoMAE checkpoints in all published formats, and save them for transformers.

    python checkpoints.py SOURCE [field=value ...]          describe it and check for NaN and inf
    python checkpoints.py SOURCE TARGET [field=value ...]   also write a directory for transformers

SOURCE is a directory written by transformers 4 or 5, a hub id such as MCG-NJU/videomae-base, or a
file from the authors or VideoMAE V2 (.pth, .pt, .bin, .safetensors). Loading never executes code
from a file. Fields are those of VideoMAEConfig, such as num_frames=8, with values in JSON. A file
without a config.json also needs a name in videomae.PRESETS, such as preset=base; classifiers of the
authors and V2 need use_mean_pooling=true and num_labels as well. Needs safetensors and videomae.py.
"""
import json
import logging
import os
import re
import sys
import threading
import zipfile
from argparse import Namespace
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn

if __package__:
    from . import videomae
else:
    import videomae

logger = logging.getLogger("videomae")  # reports unused weights and newly initialized ones


# ---- Names and shapes ---------------------------------------------------------------------------

NAMES = [  # (transformers, this project); ^ matches the start of a name
    ("embeddings.patch_embeddings.projection.", "encoder.patch_embed."),
    ("encoder.layer.", "encoder.blocks."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("layernorm.", "encoder.norm."),
    ("attention.attention.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("^encoder_to_decoder", "^decoder.encoder_to_decoder"),
    ("^mask_token", "^decoder.mask_token"),
]
OTHER_NAMES = [  # the authors', VideoMAE V2's, and transformers 5's for biases
    ("^patch_embed.", "^encoder.patch_embed."),
    ("^blocks.", "^encoder.blocks."),
    ("^norm.", "^encoder.norm."),
    ("^encoder.", "^videomae.encoder."),
    ("patch_embed.proj.", "patch_embed."),
    ("^head.", "^classifier."),
    ("attn.query.bias", "attn.q_bias"),
    ("attn.value.bias", "attn.v_bias"),
]
PREFIXES = re.compile(r"^((module|model|net|backbone|student|base_model)\.)+")  # from wrappers
HEADS = ("decoder.", "classifier.", "fc_norm.", "videomae.encoder.norm.", "encoder.norm.")


def rename(name: str, pairs) -> str:
    """Apply (old, new) replacements to a dotted name, in order."""
    name = f"^{name}"
    for old, new in pairs:
        name = name.replace(old, new)
    return name[1:]


def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights -> this project's names, with "videomae." added to a bare encoder's. Query,
    key and value are merged; a Conv3d (D, C, pt, ph, pw) becomes a Linear (D, pt ph pw C)."""
    out = {}
    for original, x in state_dict.items():
        name = PREFIXES.sub("", original.replace("_orig_mod.", ""))  # torch.compile's prefix
        name = rename(name, NAMES + OTHER_NAMES)
        if name in out:
            raise ValueError(f"state_dict: two weights map to {name}, one of them {original}")
        out[name] = rearrange(x, "d c pt ph pw -> d (pt ph pw c)") if x.ndim == 5 else x
    for query in [name for name in out if name.endswith("attn.query.weight")]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        matrices = [out.pop(name) for name in names if name in out]
        out[query.replace("query", "qkv")] = torch.cat(matrices)
    if "videomae.encoder.patch_embed.weight" not in out:
        raise ValueError(f"state_dict: expected VideoMAE weights, got {list(state_dict)[:4]} ...")
    return out


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in transformers' names and shapes, the inverse of `convert_state_dict`."""
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

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors",  # one file, or shards
           "pytorch_model.bin", "pytorch_model-*-of-*.bin")
PROCESSOR_FILE = "preprocessor_config.json"
CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "model_ema")


def find(source: str | os.PathLike, subfolder: str = "", **hub) -> Path:
    """A local path, or a hub id, downloaded into a cache -> the path, with `subfolder` added."""
    path = Path(source)
    if not path.exists():
        try:
            from huggingface_hub import snapshot_download

            download = partial(snapshot_download, str(source), **hub)
            patterns = [f"{subfolder}*.json", f"{subfolder}*.safetensors"]
            path = Path(download(allow_patterns=patterns))
            if not any((path / subfolder).glob("*.safetensors")):
                download(allow_patterns=f"{subfolder}*.bin")  # into the same directory
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{source}: not a local path, and not found on the Hugging Face Hub "
                             f"({reason})") from error
    return path / subfolder


def read_checkpoint(source: str | os.PathLike, **hub) -> tuple[dict[str, Tensor], dict]:
    """-> the state dict as saved, and the contents of the config.json beside it, {} if missing."""
    path = find(source, **hub)
    directory, files = path.parent, [] if path.suffix == ".json" else [path]
    if path.is_dir():
        directory, found = path, (sorted(path.glob(name)) for name in WEIGHTS)
        files = next(filter(None, found), [])
    if not files:
        raise ValueError(f"{path}: expected weights, such as {' or '.join(WEIGHTS)}")
    weights = {name: x for file in files for name, x in read_file(file).items()}
    config = directory / "config.json"
    return weights, read_file(config) if config.exists() else {}


def read_file(path: Path) -> dict:
    """The contents of a .json, .safetensors or torch.save file; never executes code from it."""
    try:
        if path.suffix == ".json":
            return {**json.loads(path.read_text(encoding="utf-8"))}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile  # torch does not verify checksums
        with torch.serialization.safe_globals([Namespace]):  # the authors save their arguments
            content = {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:  # not chained, as torch's message suggests executing the file
        reason = f"missing, damaged, or not plain data ({type(error).__name__})"
        if blocked := re.search(r"GLOBAL (\S+) w", str(error)):
            reason = f"contains {blocked[1]}, which is not plain data; save the weights without it"
        raise ValueError(f"{path}: {reason}") from None
    for name in 2 * CONTAINERS:
        content = content[name] if isinstance(content.get(name), dict) else content
    weights = {str(name): x for name, x in content.items() if isinstance(x, Tensor)}
    if not weights:
        raise ValueError(f"{path}: expected weights, got only {list(content)}")
    return weights


def write_atomic(path: Path, content):
    """Write bytes, or what content(file) writes to a binary file: readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(directory: str | os.PathLike, contents: dict[str, bytes]):
    """Write files; raise if one already exists with different content."""
    for name, content in contents.items():
        path = Path(directory) / name
        if path.exists() and path.read_bytes() != content:
            raise ValueError(f"directory: {path} already exists with different content")
    for name, content in contents.items():
        write_atomic(Path(directory) / name, content)


# ---- Options and fields -------------------------------------------------------------------------

HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
NO_EFFECT = {"attn_implementation", "label2id", "low_cpu_mem_usage", "trust_remote_code",
             "use_fast", "use_safetensors", "weights_only"}  # ignored; split_fields reads label2id
REFUSED = {"quantization_config", "pruned_heads",  # in a config.json, unless empty or false
           "default_to_square", "offset"}  # in a preprocessor_config.json, as are other do_...


def split_fields(cls, values: dict) -> tuple[dict, dict]:
    """Settings under any of their names -> fields of dataclass `cls`, and the rest. Labels may be a
    list, a dict with number keys (strings in JSON), or label2id alone."""
    values = {"qv_bias" if name == "qkv_bias" else name: x for name, x in values.items()}
    labels = values.get("id2label")
    if not labels and isinstance(values.get("label2id"), dict):
        labels = {number: name for name, number in values["label2id"].items()}
    if labels and isinstance(labels, (dict, list, tuple)):
        pairs = labels.items() if isinstance(labels, dict) else enumerate(labels)
        names = {str(number): name for number, name in pairs}
        if names.keys() != set(map(str, range(len(names)))):
            raise ValueError(f"id2label: got keys {list(names)}, expected 0 to {len(names) - 1}")
        values["id2label"] = {i: names[str(i)] for i in range(len(names))}
        values.setdefault("num_labels", len(names))
    return {f.name: values.pop(f.name) for f in fields(cls) if f.name in values}, values


def sort_options(cls, options: dict) -> tuple[dict, dict]:
    """Keyword arguments of from_pretrained -> fields of dataclass `cls`, and hub options."""
    known, more = split_fields(cls, options)
    if unknown := more.keys() - HUB_OPTIONS - NO_EFFECT:
        raise TypeError(f"{cls.__name__}: got unknown options {sorted(unknown)}; see "
                        "docs/transformers.md")
    return known, {name: x for name, x in more.items() if name in HUB_OPTIONS}


def fields_from_json(cls, values: dict) -> dict:
    """JSON of any transformers version -> fields of dataclass `cls`, unknown ones in "extra".
    Unknown ones that would change the outputs are refused."""
    known, extra = split_fields(cls, values)
    for name, x in extra.items():
        if x and (name in REFUSED or name.startswith("do_")):
            raise ValueError(f"{name}: got {x!r}, which is not supported")
    for f in fields(cls):
        if f.name in known and not fits(known[f.name], f.type):
            kind = getattr(f.type, "__name__", f.type)  # int, but also int | None
            raise ValueError(f"{f.name}: got {known[f.name]!r}, expected a plausible {kind}")
    return known | {"extra": extra}


def fits(value, kind) -> bool:
    """Whether a JSON value matches a field's type. Implausibly large numbers never do."""
    if isinstance(kind, UnionType):
        return any(fits(value, option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return (isinstance(value, list) and len(value) == len(get_args(kind))
                and all(map(fits, value, get_args(kind))))
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 100_000
    return isinstance(value, get_origin(kind) or kind)


# ---- Configs ------------------------------------------------------------------------------------

def config_to_json(config: videomae.VideoMAEConfig) -> dict:
    """The contents of a config.json that every transformers version reads."""
    # Not vars(config), to which others such as transformers' Trainer add attributes.
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    del values["num_labels"]  # as in transformers, id2label implies it
    values |= dict(model_type="videomae", qkv_bias=values.pop("qv_bias"), label2id=config.label2id)
    return values.pop("extra") | values


def processor_file(config: videomae.VideoMAEConfig) -> dict[str, bytes]:
    """A preprocessor_config.json, {name: content}: the model's size, the authors' mean and std.
    Frames' short side is resized to the model's long side, so that a crop always fits."""
    height, width = config.image_hw
    values = dict(size={"shortest_edge": max(height, width)},
                  crop_size={"height": height, "width": width},
                  image_mean=videomae.IMAGENET_MEAN, image_std=videomae.IMAGENET_STD,
                  image_processor_type="VideoMAEImageProcessor")
    return {PROCESSOR_FILE: json.dumps(values, indent=2).encode()}


def make_config(values: dict, config: videomae.VideoMAEConfig | None, overrides: dict):
    """`config`, or else that of a config.json's `values`, {} if missing, with the overrides."""
    published = None
    if values.get("model_type") == "videomae":
        published = videomae.VideoMAEConfig(**fields_from_json(videomae.VideoMAEConfig, values))
    config = config or published
    if config is None:
        kind = values.get("model_type", "no model_type") if values else "no config.json"
        raise ValueError(
            f"config: got {kind}, so num_frames, image_size and the numbers of heads are unknown; "
            'pass config=VideoMAEConfig.preset("base"), with the fields that differ, or first '
            "convert it with python checkpoints.py SOURCE TARGET preset=base")
    if overrides.get("num_labels", config.num_labels) != config.num_labels:
        overrides = {"id2label": None} | overrides  # id2label names the old labels
    config = replace(config, **overrides)
    if published and "position_grid" not in overrides:  # then positions may not change
        old, new = (tuple(c.position_grid or c.grid) for c in (published, config))
        if old != new:
            raise ValueError(
                f"position_grid: the positions are of grid {old}, by config.json with num_frames="
                f"{published.num_frames} and image_size={published.image_size}, but {new} is asked "
                f"for; keep both fields, or pass position_grid={old} to interpolate the positions, "
                "or None for new ones")
    if config.num_patches > 100_000:  # would exhaust the memory
        raise ValueError(f"num_frames, image_size: got {config.num_patches} patches, too many")
    return config


def check_sizes(cls, config: videomae.VideoMAEConfig, state_dict: dict, weights: dict):
    """Raise unless a config says what weights, as saved and as converted, tell of a `cls`."""
    told = {}
    for x in state_dict.values():
        if x.ndim == 5:  # the Conv3d of published files, (D, C, pt, ph, pw)
            told = dict(num_channels=x.shape[1], tubelet_size=x.shape[2], patch_size=x.shape[3])
    parts = {"videomae.": ""}
    if issubclass(cls, videomae.VideoMAEForPreTraining):
        parts["decoder."] = "decoder_"
    for part, prefix in parts.items():
        layers = [x.shape for name, x in weights.items()
                  if name.startswith(part) and name.endswith("mlp.fc1.weight")]
        if layers:
            hidden_dim, width = layers[0]
            told |= {f"{prefix}hidden_size": width, f"{prefix}intermediate_size": hidden_dim,
                     f"{prefix}num_hidden_layers": len(layers)}
    if "fc_norm.weight" in weights:
        told["use_mean_pooling"] = True
    if "classifier.weight" in weights and issubclass(cls, videomae.VideoMAEForVideoClassification):
        told["num_labels"] = len(weights["classifier.weight"])
    for field, value in told.items():
        if value != getattr(config, field):
            raise ValueError(f"{field}: got {getattr(config, field)}, but the weights say {value}")


# ---- Models -------------------------------------------------------------------------------------

def load_model(cls, source, config=None, strict=True, ignore_mismatched_sizes=False, dtype=None,
               torch_dtype=None, **options) -> nn.Module:
    """Load a checkpoint -> a model in evaluation mode, in float32 unless dtype is given.

    config: a VideoMAEConfig, instead of the checkpoint's; a file without config.json needs it.
    strict: a missing, unknown or mismatched weight is an error; only a new head, and an unused
        head, norm or decoder, are logged. False loads the weights that fit and logs the rest.
    ignore_mismatched_sizes: a classifier of a different number of classes is newly initialized, as
        it also is where num_labels or id2label is passed.
    dtype, torch_dtype: for instance torch.float16, or "auto" for the checkpoint's.
    options: fields of VideoMAEConfig, label2id, and HUB_OPTIONS."""
    if not isinstance(config, (videomae.VideoMAEConfig, type(None))):
        raise TypeError(f"config: got {type(config).__name__}, expected videomae.VideoMAEConfig")
    dtype = str(dtype or torch_dtype or "float32").removeprefix("torch.")
    videomae.check_choice("dtype", dtype, ("float32", "float16", "bfloat16", "float64", "auto"))
    overrides, hub = sort_options(videomae.VideoMAEConfig, options)
    state_dict, values = read_checkpoint(source, **hub)
    try:
        config = make_config(values, config, overrides)
        weights = convert_state_dict(state_dict)
        wants_new_head = ignore_mismatched_sizes or "num_labels" in overrides
        if wants_new_head and len(weights.get("classifier.weight", ())) != config.num_labels:
            weights = {name: x for name, x in weights.items() if not name.startswith("classifier.")}
        if strict:
            check_sizes(cls, config, state_dict, weights)
        model = cls(config)
        load_weights(model, weights, strict)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{source}: {error}") from error
    if dtype == "auto":
        dtype = str(next(x.dtype for x in weights.values() if x.is_floating_point()))
    return model.to(getattr(torch, dtype.removeprefix("torch."))).eval()


def load_weights(model: nn.Module, weights: dict[str, Tensor], strict: bool):
    """Load weights into a model. New and unused ones are logged; if strict, any outside a head is
    an error. A head is used whole or not at all."""
    initial = model.state_dict()
    if not any(name.startswith("videomae.") for name in initial):  # the encoder alone
        weights = {name.removeprefix("videomae."): x for name, x in weights.items()}

    ours, theirs = ({head for head in HEADS if any(name.startswith(head) for name in names)}
                    for names in (initial, weights))
    new, unused = (ours - theirs) & {"classifier.", "fc_norm."}, theirs - ours
    reshaped = {name for name in initial.keys() & weights.keys()
                if not strict and initial[name].shape != weights[name].shape}
    used = {name: x for name, x in weights.items()
            if name not in reshaped and not name.startswith(tuple(unused))}
    kept = {name: x for name, x in initial.items() if name.startswith(tuple(new))}
    missing, unknown = model.load_state_dict(used | kept, strict=strict)
    new, unused = sorted({*new, *missing}), sorted({*unused, *reshaped, *unknown})
    if new or unused:
        logger.warning(f"{type(model).__name__}: newly initialized: {new}, not used: {unused}")


def save_model(model: nn.Module, directory: str | os.PathLike):
    """Write config.json and model.safetensors as transformers does."""
    for name, x in model.state_dict().items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{directory}: got {type(x).__name__} for {name}, expected a tensor; "
                            "a quantized model cannot be saved")
    config, default = vars(model.config), vars(videomae.VideoMAEConfig())
    for name in ("position_embedding", "position_grid", "head_norm_eps"):
        if config[name] != default[name]:
            logger.warning(f"{directory}: transformers ignores {name}={config[name]}, so its "
                           "outputs will differ")
    values = config_to_json(model.config)
    values["architectures"] = [type(model).__name__]
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {name: x.cpu() for name, x in published_state_dict(model).items()}
    write_new(directory, {"model.safetensors": safetensors.torch.save(weights, {"format": "pt"}),
                          "config.json": json.dumps(values, indent=2).encode()})


# ---- The command line ---------------------------------------------------------------------------

def main(source: str, target: str | None = None, preset: str | None = None, **options):
    """Describe a checkpoint, check for NaN and inf, and write it to `target` for transformers."""
    known, hub = sort_options(videomae.VideoMAEConfig, options)
    fields_from_json(videomae.VideoMAEConfig, known)  # raises for a value of the wrong type
    path = find(source, **hub)
    names = convert_state_dict(read_checkpoint(path)[0])
    kinds = {"decoder.norm.weight": videomae.VideoMAEForPreTraining,
             "classifier.weight": videomae.VideoMAEForVideoClassification}
    cls = next((kind for name, kind in kinds.items() if name in names), videomae.VideoMAEModel)
    if preset:  # says what the file is, not what to change
        known = {"config": videomae.VideoMAEConfig.preset(preset, **known)}
    model = cls.from_pretrained(path, **known)
    count = sum(x.numel() for x in model.parameters())
    print(f"{source}: {cls.__name__}, {count / 1e6:.2f} M parameters\n{model.config}")
    if broken := [name for name, x in model.named_parameters() if not x.isfinite().all()]:
        raise ValueError(f"{source}: weights are not finite: {', '.join(broken)}")
    if target:
        files = processor_file(model.config)
        if (path / PROCESSOR_FILE).exists() and "image_size" not in options:
            files = {PROCESSOR_FILE: (path / PROCESSOR_FILE).read_bytes()}
        model.save_pretrained(target)
        write_new(target, files)


def parse(value: str):
    """JSON, or else text as it is, such as base."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


if __name__ == "__main__":
    is_field = re.compile(r"\w+=").match  # a path may contain = later on
    paths = [text for text in sys.argv[1:] if not is_field(text)]
    pairs = [text.split("=", 1) for text in sys.argv[1:] if is_field(text)]
    if len(paths) not in (1, 2) or paths[0].startswith("-"):
        sys.exit(__doc__)
    try:
        main(*paths, **{name: parse(value) for name, value in pairs})
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"checkpoints.py: {error}")
