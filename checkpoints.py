"""Published VideoMAE checkpoints: every format in, transformers' directory out.

    python checkpoints.py inspect SOURCE [field=value ...]          kind, size, config, checks
    python checkpoints.py convert SOURCE TARGET [field=value ...]   a directory for transformers

SOURCE is a directory as transformers 4 or 5 writes it, a hub id such as MCG-NJU/videomae-base, or a
file of the authors or of VideoMAE V2 (.pth, .pt, .bin, .safetensors), of which nothing is executed.
What a file does not say is given as fields of the config: num_attention_heads=3 num_frames=8.

videomae.py imports this file inside `from_pretrained` and `save_pretrained`. Only the command line
above imports videomae.py and processor.py. Wrong files raise a ValueError that names the file and
what is wrong.
"""
import argparse
import json
import logging
import os
import pickle
import re
import sys
import threading
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

logger = logging.getLogger("videomae")  # what is left out or made new is said here


# ---- Names and shapes ---------------------------------------------------------------------------

# (transformers, videomae.py), whole parts of dotted names: read forwards, written backwards.
TRANSFORMERS_NAMES = [
    ("embeddings.patch_embeddings.projection", "patch_embed"),
    ("encoder.layer", "blocks"),
    ("decoder.decoder_layers", "decoder.blocks"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.attention", "attn"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
]
# The authors' names, VideoMAE V2's, and transformers 5's spelling of the biases: (pattern, ours).
OTHER_NAMES = [
    (r"^(model|module)\.", ""),
    (r"query\.bias$", "q_bias"),
    (r"value\.bias$", "v_bias"),
    (r"layernorm\.", "norm."),
    (r"^encoder\.", "videomae."),
    (r"patch_embed\.proj\.", "patch_embed."),
    (r"^head\.", "classifier."),
    (r"^(encoder_to_decoder|mask_token)", r"decoder.\1"),
]
HEADS = ("decoder.", "classifier.", "fc_norm.")  # what is not the encoder's


def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights -> the names and shapes of videomae.py's classes; other names as they are.

    transformers keeps query, key and value apart; here they are one matrix, as in the authors'
    files. A Conv3d weight (D, C, pt, ph, pw) becomes a Linear's over a patch, (D, pt ph pw C). The
    names of an encoder alone come back with "videomae." in front.
    """
    out = {}
    for name, tensor in state_dict.items():
        for theirs, ours in TRANSFORMERS_NAMES:
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\g<1>{ours}", name)
        for pattern, ours in OTHER_NAMES:
            name = re.sub(pattern, ours, name)
        out[name] = tensor
    if not any(name.startswith("videomae.") for name in out):
        out = {n if n.startswith(HEADS) else f"videomae.{n}": x for n, x in out.items()}

    for name in [name for name in out if name.endswith(("attn.scale", "attn.logit_scale"))]:
        raise ValueError(f"state_dict: {name} is of cosine attention, which is not supported")
    for name in [name for name in out if name.endswith("attn.query.weight")]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in out for part in parts):
            out[name.replace("query", "qkv")] = torch.cat([out.pop(part) for part in parts])
    embed = out.get("videomae.patch_embed.weight")
    if embed is None:
        raise ValueError(f"state_dict: got the names {list(state_dict)[:3]} ..., expected those of "
                         "a VideoMAE, with an embedding of patches")
    if embed.ndim == 5:
        out["videomae.patch_embed.weight"] = rearrange(embed, "d c pt ph pw -> d (pt ph pw c)")
    return out


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in transformers' names and shapes: `convert_state_dict` undone."""
    config, out = model.config, {}
    for name, tensor in model.state_dict().items():
        if re.fullmatch(r"(videomae\.)?patch_embed\.weight", name):
            tensor = rearrange(tensor, "d (pt ph pw c) -> d c pt ph pw", pt=config.tubelet_size,
                               ph=config.patch_size, pw=config.patch_size)
        name = re.sub(r"^decoder\.(encoder_to_decoder|mask_token)", r"\1", name)
        parts = {name: tensor}
        if name.endswith("attn.qkv.weight"):
            names = [name.replace("qkv", part) for part in ("query", "key", "value")]
            parts = dict(zip(names, tensor.chunk(3), strict=True))
        for name, tensor in parts.items():
            for theirs, ours in TRANSFORMERS_NAMES[::-1]:
                name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
            out[re.sub(r"^(videomae\.)?norm\.", r"\1layernorm.", name)] = tensor.contiguous()
    return out


# ---- Files --------------------------------------------------------------------------------------

def read_weights(path: Path) -> dict[str, Tensor]:
    """A .safetensors file, or one of torch.save -> its state dict, which may be under "model",
    "module" or "state_dict", as in the authors' files."""
    if path.suffix == ".safetensors":
        load_file = optional_import("safetensors.torch", "safetensors").load_file
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} in it does not match its checksum")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' command line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = re.split(r"\n|\. ", str(error))[0] or "it ends early"
        if isinstance(error, pickle.UnpicklingError):  # torch's message proposes to run the file
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {code[1]}, which is not executed" if code else "it is no pickle"
        raise ValueError(f"{path}: not a checkpoint that can be read ({reason})") from error
    while isinstance(content, dict) and (inner := {"model", "module", "state_dict"} & set(content)):
        content = content[min(inner)]
    if not isinstance(content, dict) or not content or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        raise ValueError(f"{path}: holds no state dict, expected names and tensors, as they are or "
                         "under 'model', 'module' or 'state_dict'")
    return content


def optional_import(module: str, package: str):
    """A module that only some users need."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{package} is needed here: pip install {package}") from error


def find(source: str | os.PathLike) -> Path:
    """A file or directory as it is; a hub id -> the directory it is downloaded to, once."""
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"source: {source} is not a file, a directory or a hub id such as "
                         "MCG-NJU/videomae-base")
    download = optional_import("huggingface_hub", "huggingface_hub").snapshot_download
    try:
        path = Path(download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        if not any(path.glob("*.safetensors")):
            path = Path(download(str(source), allow_patterns=["*.json", "*.bin"]))
    except Exception as error:
        raise ValueError(f"source: {source} is no file or directory here, and could not be fetched "
                         f"from the hub ({type(error).__name__}: {str(error)[:200]})") from error
    return path


def read_json(path: Path) -> dict:
    """A JSON file that holds an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"source: there is no {path.name} in {path.parent}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, expected an object")
    return values


def read_checkpoint(source: str | os.PathLike) -> tuple[dict[str, Tensor], dict | None]:
    """-> the state dict as it was saved, and the fields of config.json where there is one."""
    path = find(source)
    if path.is_file():
        has_config = path.name in ("model.safetensors", "pytorch_model.bin")
        config = path.parent / "config.json"
        return read_weights(path), read_json(config) if has_config and config.exists() else None
    values = read_json(path / "config.json")
    for pattern in ("model.safetensors", "model-*-of-*.safetensors",
                    "pytorch_model.bin", "pytorch_model-*-of-*.bin"):
        if files := sorted(path.glob(pattern)):
            count = re.search(r"-of-(\d+)\.", files[0].name)
            if count and len(files) != int(count[1]):
                raise ValueError(f"{path}: holds {len(files)} files like {files[0].name}, a part "
                                 "is missing")
            return {name: x for file in files for name, x in read_weights(file).items()}, values
    raise ValueError(f"source: no model.safetensors and no pytorch_model.bin in {path}")


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

def sort_fields(cls, values: dict) -> dict:
    """The fields of dataclass `cls` that a JSON file holds; all else in it under "extra"."""
    known = {f.name for f in fields(cls)} - {"extra"}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    extra = values.get("extra", {}) | {name: x for name, x in values.items() if name not in known}
    extra.pop("extra", None)
    return {name: values[name] for name in known & values.keys()} | {"extra": extra}


def config_from_json(cls, values: dict):
    """The fields of a transformers config.json, of any version -> a config."""
    if values.get("model_type", "videomae") != "videomae":
        raise ValueError(f"config.json: model_type {values['model_type']!r}, expected 'videomae'")
    values = dict(values)
    if "qkv_bias" in values:  # transformers 4 and every file on the hub; transformers 5: qv_bias
        values.setdefault("qv_bias", values.pop("qkv_bias"))
    if names := values.get("id2label"):
        values["id2label"] = {int(i): label for i, label in names.items()}
        values.setdefault("num_labels", len(names))
    return cls(**sort_fields(cls, values))


def config_to_json(config) -> dict:
    """For a config.json that every transformers reads."""
    if callable(config.hidden_act):
        raise ValueError(f"hidden_act: got {config.hidden_act!r}, expected a name, to be saved")
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    labels = config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)}
    del values["num_labels"]  # as in transformers, the number of names says it
    values |= dict(model_type="videomae", qkv_bias=values.pop("qv_bias"), id2label=labels,
                   label2id={label: i for i, label in labels.items()})
    return values.pop("extra") | values


PUBLISHED_HEADS = {1280: 16, 1408: 16, 640: 8}  # by width; all others have heads 64 wide


def infer_config(state_dict: dict[str, Tensor], **known) -> dict:
    """Config fields of weights that come without a config, from their shapes; `known` are given.

    Shapes do not tell the clips' length and size, so the published 16 frames of 224 x 224 are
    assumed, nor the number of heads. What is assumed is logged.
    """
    weights = convert_state_dict(state_dict)
    conv = next((x for x in state_dict.values() if x.ndim == 5), None)  # (D, C, pt, ph, pw)
    if conv is None or "videomae.blocks.0.mlp.fc1.weight" not in weights:
        raise ValueError("source: no Conv3d or no block among the weights, expected a published "
                         "VideoMAE")
    values = dict(num_channels=conv.shape[1], tubelet_size=conv.shape[2], patch_size=conv.shape[3],
                  layer_norm_eps=1e-6, head_norm_eps=1e-6,
                  qv_bias="videomae.blocks.0.attn.q_bias" in weights,
                  use_mean_pooling="videomae.norm.weight" not in weights)
    if "classifier.weight" in weights:
        values["num_labels"] = len(weights["classifier.weight"])
    for part, prefix in (("videomae", ""), ("decoder", "decoder_")):
        blocks = [name for name in weights if name.startswith(f"{part}.blocks.")]
        if not blocks:
            continue
        hidden_dim, width = weights[f"{part}.blocks.0.mlp.fc1.weight"].shape
        heads = f"{prefix}num_attention_heads"
        if heads not in known and width not in PUBLISHED_HEADS and width % 64:
            raise ValueError(f"{heads}: a width of {width} does not tell it, expected {heads}=...")
        values |= {f"{prefix}hidden_size": width, f"{prefix}intermediate_size": hidden_dim,
                   f"{prefix}num_hidden_layers": len({name.split(".")[2] for name in blocks}),
                   heads: PUBLISHED_HEADS.get(width, width // 64)}
    assumed = {"num_frames": 16, "image_size": 224}
    assumed |= {name: x for name, x in values.items() if name.endswith("attention_heads")}
    assumed = {name: x for name, x in assumed.items() if name not in known}
    if assumed:
        text = ", ".join(f"{name}={x}" for name, x in assumed.items())
        logger.warning(f"the weights do not tell, assumed: {text}")
    return {**values, **known}


def make_config(cls, state_dict: dict[str, Tensor], values: dict | None, overrides: dict):
    """The config of a checkpoint, with fields of the caller's."""
    if unknown := overrides.keys() - {f.name for f in fields(cls)}:
        raise TypeError(f"config_overrides: {', '.join(sorted(unknown))} is no field of the config")
    if overrides.get("id2label"):
        overrides = {"num_labels": len(overrides["id2label"])} | overrides
    if values is None:
        return cls(**infer_config(state_dict, **overrides))
    if "model_config" in values:  # the hub's VideoMAE V2 has its own kind of config.json
        names = {"img_size": "image_size", "num_frames": "num_frames",
                 "num_heads": "num_attention_heads"}
        known = {ours: values["model_config"][name] for name, ours in names.items()
                 if name in values["model_config"]}
        values = infer_config(state_dict, **known)
    old = config_from_json(cls, values)
    if overrides.get("num_labels", old.num_labels) != old.num_labels:  # the names are of old labels
        values = {name: x for name, x in values.items() if name not in ("id2label", "label2id")}
    config = config_from_json(cls, values | overrides)
    if config.grid != old.grid and "position_grid" not in overrides:
        grid = old.position_grid or old.grid
        raise ValueError(f"position_grid: the grid changes from {old.grid} to {config.grid}, "
                         f"expected position_grid={grid} to interpolate the positions, or "
                         "position_grid=None to make new ones")
    return config


# ---- Models and processors ----------------------------------------------------------------------

def load_model(cls, source, strict: bool, overrides: dict):
    """See VideoMAEPreTrainedModel.from_pretrained in videomae.py."""
    return build_model(cls, source, *read_checkpoint(source), strict, overrides)


def build_model(cls, source, state_dict: dict, values: dict | None, strict: bool, overrides: dict):
    """`load_model`, once the checkpoint is read."""
    config = make_config(cls.config_class, state_dict, values, overrides)
    weights = convert_state_dict(state_dict)
    with torch.device("meta"):  # shapes only: a damaged config allocates nothing
        shapes = {name: x.shape for name, x in cls(config).state_dict().items()}
    if not any(name.startswith("videomae.") for name in shapes):  # the encoder alone
        weights = {name.removeprefix("videomae."): x for name, x in weights.items()}

    head = "classifier.weight"
    is_new_head = "num_labels" in overrides or "id2label" in overrides
    if is_new_head and head in weights and weights[head].shape != shapes.get(head):
        weights = {name: x for name, x in weights.items() if not name.startswith("classifier.")}
    layers = {name.split(".")[0] for name in weights}
    missing = shapes.keys() - weights.keys()
    unexpected = weights.keys() - shapes.keys()
    misshaped = {f"{name} {tuple(weights[name].shape)} instead of {tuple(shapes[name])}"
                 for name in weights.keys() & shapes.keys() if weights[name].shape != shapes[name]}

    # Allowed: a new head, and to leave out another model's head, or the norm that fc_norm replaces.
    new = {name for name in missing
           if name.startswith(("classifier.", "fc_norm.")) and name.split(".")[0] not in layers}
    droppable = [head for head in HEADS if not any(name.startswith(head) for name in shapes)]
    droppable += ["videomae.norm."] * ("fc_norm.weight" in shapes)
    dropped = {name for name in unexpected if name.startswith(tuple(droppable))}
    wrong = {"missing": missing - new, "unexpected": unexpected - dropped,
             "of another shape": misshaped}
    text = "; ".join(f"{what}: {', '.join(sorted(names))}"
                     for what, names in wrong.items() if names)
    if text and strict:
        raise ValueError(f"source: {source} does not fit {cls.__name__}: {text}")
    if text:
        logger.warning(f"{cls.__name__} from {source}: {text}")
    for what, names in (("new, to be trained", new), ("not used", dropped)):
        if names:
            parts = sorted({re.sub(r"\.(weight|bias|blocks.*)$", "", name) for name in names})
            logger.warning(f"{cls.__name__} from {source}: {what}: {', '.join(parts)}")
    model = cls(config)
    fitting = {name: x for name, x in weights.items() if shapes.get(name) == x.shape}
    model.load_state_dict(fitting, strict=False)
    return model.eval()


def save_model(model: nn.Module, directory):
    """config.json and model.safetensors, as transformers writes them."""
    save = optional_import("safetensors.torch", "safetensors").save
    config, published = model.config, type(model.config)()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    values = config_to_json(config) | {"architectures": [type(model).__name__], "dtype": dtype}
    values.pop("torch_dtype", None)  # the older name of dtype
    for name in ("position_embedding", "position_grid", "head_norm_eps"):
        if (value := getattr(config, name)) != getattr(published, name):
            logger.warning(f"{directory}: transformers does not know {name}={value} and will "
                           "compute without")
    weights = {name: tensor.cpu() for name, tensor in published_state_dict(model).items()}
    write_new(directory, {"model.safetensors": save(weights, metadata={"format": "pt"}),
                          "config.json": json.dumps(values, indent=2).encode()})


def load_processor(cls, source, overrides: dict):
    """See VideoMAEImageProcessor.from_pretrained in processor.py."""
    path = find(source)
    path = path.parent if path.is_file() else path
    values = read_json(path / "preprocessor_config.json")
    return cls(**sort_fields(cls, values) | overrides)


def save_processor(processor, directory):
    """preprocessor_config.json, as transformers writes it."""
    values = {f.name: getattr(processor, f.name) for f in fields(processor)}
    values = {"image_processor_type": type(processor).__name__, **values.pop("extra"), **values}
    write_new(directory, {"preprocessor_config.json": json.dumps(values, indent=2).encode()})


# ---- The command line ---------------------------------------------------------------------------

def open_checkpoint(source: str, overrides: dict):
    """-> a model of the class that the checkpoint was saved from."""
    import videomae

    state_dict, values = read_checkpoint(source)
    parts = {name.split(".")[0] for name in convert_state_dict(state_dict)}
    cls = videomae.VideoMAEModel
    if "decoder" in parts:
        cls = videomae.VideoMAEForPreTraining
    elif "classifier" in parts:
        cls = videomae.VideoMAEForVideoClassification
    return build_model(cls, source, state_dict, values, True, overrides)


def inspect(source: str, overrides: dict):
    """Print what a checkpoint is and whether it is sound: every weight is used, or named."""
    model = open_checkpoint(source, overrides)
    parameters, defaults = dict(model.named_parameters()), vars(type(model.config)())
    changed = {name: x for name, x in vars(model.config).items()
               if name != "extra" and x != defaults[name]}
    biases = [x for name, x in parameters.items() if name.endswith(("q_bias", "v_bias"))]
    broken = [name for name, x in parameters.items() if not x.isfinite().all()]
    print(f"{source}: {type(model).__name__}")
    print(f"parameters  {sum(x.numel() for x in parameters.values()) / 1e6:.2f} M")
    print(f"config      {changed}")
    zero = sum(not x.any() for x in biases)
    print(f"biases      {len(biases)} of queries and values, {zero} of them all zero")
    if broken:
        raise ValueError(f"{source}: not finite: {', '.join(broken)}")


def convert(source: str, target: str, overrides: dict):
    """Any checkpoint -> a directory that transformers reads, with its processor."""
    from processor import VideoMAEImageProcessor
    from videomae import IMAGENET_MEAN, IMAGENET_STD

    if Path(target).exists():
        raise ValueError(f"target: {target} exists already, expected a new directory")
    model = open_checkpoint(source, overrides)
    if (find(source) / "preprocessor_config.json").exists():
        processor = VideoMAEImageProcessor.from_pretrained(source)
    else:  # as the authors prepare their clips
        height, width = model.config.image_hw
        processor = VideoMAEImageProcessor(
            size=min(height, width), crop_size={"height": height, "width": width},
            image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    print(f"{target}: {type(model).__name__}")


def main():
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["inspect", "convert"])
    parser.add_argument("source")
    parser.add_argument("rest", nargs="*", metavar="TARGET, field=value")
    args = parser.parse_args()
    paths = [text for text in args.rest if "=" not in text]
    pairs = [text.split("=", 1) for text in args.rest if "=" in text]
    overrides = {name: json.loads(x) if re.match(r"[\d\[{tfn]", x) else x for name, x in pairs}
    if len(paths) != (args.command == "convert"):
        parser.error("convert needs one TARGET, inspect none")
    try:
        {"inspect": inspect, "convert": convert}[args.command](args.source, *paths, overrides)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"checkpoints.py: {error}")


if __name__ == "__main__":
    main()
