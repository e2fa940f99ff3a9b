"""Tests of checkpoints.py: every published format loads, saved models load in transformers, and no
weight is dropped or invented silently. Also tests of the files copied into another project.

    python -m pytest -q tests/test_checkpoints.py
"""
import argparse
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch

import checkpoints
import videomae
from checkpoints import (
    config_to_json,
    convert_state_dict,
    infer_config,
    published_state_dict,
    write_atomic,
    write_new,
)
from processor import VideoMAEImageProcessor
from test_videomae import GOLDEN, KINDS, SMALL, check_same, clip_and_mask
from tests.helpers import hub_server
from videomae import (
    IMAGENET_MEAN,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    normalize,
    position_table,
    random_mask,
)

HERE = Path(__file__).parent.parent
PRETRAIN, CLASSIFY = GOLDEN / "hf_pretrain_tiny", GOLDEN / "hf_classify_tiny"
AUTHORS = {"image_size": 32, "num_frames": 8, "num_attention_heads": 3, "position_grid": None}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_json(path):
    return json.loads(path.read_text())


def refused(message, source, cls=VideoMAEModel, **options):
    """Check that loading raises an error that contains a message -> the text of the error."""
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as error:
        cls.from_pretrained(source, **options)
    return str(error.value)


# --------------------------------------------------------------------------------------------------
# transformers' directories


@pytest.mark.parametrize("name", KINDS)
def test_transformers_to_ours_and_back_is_bit_exact(name, tmp_path):
    source, saved = GOLDEN / name, tmp_path / "saved"
    model = KINDS[name].from_pretrained(source)
    model.save_pretrained(saved)
    before, after = (safetensors.load_file(x / "model.safetensors") for x in (source, saved))
    assert same_weights(before, after)
    before, after = (read_json(x / "config.json") for x in (source, saved))
    assert before.items() <= after.items(), "every field of the file, known or not"
    extra = model.config.extra
    assert list(extra) == [name for name in before if name in extra], "in the file's order"

    again = KINDS[name].from_pretrained(saved, extra={"mine": 3})
    assert again.config.extra["mine"] == 3
    again = KINDS[name].from_pretrained(saved / "model.safetensors")  # the config beside it is used
    assert config_to_json(again.config) == config_to_json(model.config) and not again.training
    assert same_weights(again.state_dict(), model.state_dict())
    model.save_pretrained(saved)  # the same content is no conflict
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match="model.safetensors already exists with different content"):
        model.save_pretrained(saved)
    refused("config.json: expected weights, such as model.safetensors", saved / "config.json")


@pytest.mark.parametrize("kind", ["VideoMAEModel", *(kind.__name__ for kind in KINDS.values())])
def test_transformers_loads_saved_models(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    labels = {0: "walk", 1: "run", 2: "jump"}
    config = VideoMAEConfig(**SMALL, id2label=labels, extra={"mine": [1, 2]},
                            use_mean_pooling=kind != "VideoMAEForPreTraining")
    ours = getattr(videomae, kind)(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.save_pretrained(tmp_path)
    load = getattr(transformers, kind).from_pretrained
    theirs, report = load(tmp_path, output_loading_info=True)
    wrong = [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert not any(wrong), report
    assert theirs.config.id2label == labels and theirs.config.mine == [1, 2]

    clip, mask = clip_and_mask(config)
    inputs = (clip, mask) if kind == "VideoMAEForPreTraining" else (clip,)
    outputs = ours(*inputs, return_dict=False)[-1], theirs(*inputs)[-1]
    check_same(f"saved by this project, read by transformers, {kind}", {"output": outputs})

    # What transformers 5 writes, with its own names for biases, loads unchanged: in one file, in
    # shards, and in half precision.
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for directory in ("theirs", "shards"):
        again = getattr(videomae, kind).from_pretrained(tmp_path / directory)
        assert same_weights(again.state_dict(), ours.state_dict())
        assert again.config.id2label == labels
    next((tmp_path / "shards").glob("model-00002-*")).unlink()
    refused("Missing key", tmp_path / "shards", getattr(videomae, kind))

    theirs.half().save_pretrained(tmp_path / "half")
    for options in ({"dtype": "auto"}, {"torch_dtype": torch.float16}, {"dtype": "float16"}):
        half = getattr(videomae, kind).from_pretrained(tmp_path / "half", **options)
        assert same_weights(half.state_dict(), ours.half().state_dict())
    assert getattr(videomae, kind).from_pretrained(tmp_path / "half").dtype == torch.float32
    half.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again/config.json")["dtype"] == "float16"


def test_spellings_and_bin_files(tmp_path):
    """Three kinds of directory load as the same classifier."""
    expected = VideoMAEForVideoClassification.from_pretrained(CLASSIFY).state_dict()
    weights = safetensors.load_file(CLASSIFY / "model.safetensors")
    config = read_json(CLASSIFY / "config.json")
    for name in ("spelling", "bin", "both"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    config["qv_bias"] = config.pop("qkv_bias")  # transformers 5
    (tmp_path / "spelling/config.json").write_text(json.dumps(config))
    spelling = {name.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): x
                for name, x in weights.items()}
    assert spelling.keys() != weights.keys()
    safetensors.save_file(spelling, tmp_path / "spelling/model.safetensors")
    torch.save(weights, tmp_path / "bin/pytorch_model.bin")

    # If model.safetensors exists, other files are ignored.
    other = {name: x + 1 for name, x in weights.items()}
    safetensors.save_file(weights, tmp_path / "both/model.safetensors")
    safetensors.save_file(other, tmp_path / "both/model_ema.safetensors")
    torch.save(other, tmp_path / "both/pytorch_model.bin")

    for directory in tmp_path.iterdir():
        model = VideoMAEForVideoClassification.from_pretrained(directory)
        assert same_weights(model.state_dict(), expected), directory


def test_unused_and_new_weights_are_reported(caplog):
    """A new head and a dropped decoder are reported in one line."""
    pretrained = VideoMAEForPreTraining.from_pretrained(PRETRAIN)
    assert not caplog.messages
    model = VideoMAEForVideoClassification.from_pretrained(
        PRETRAIN, num_labels=7, use_mean_pooling=True)
    (message,) = caplog.messages
    assert message.endswith("newly initialized: ['classifier.', 'fc_norm.'], "
                            "not used: ['decoder.', 'videomae.encoder.norm.']")
    assert model.config.num_labels == 7 and not model.training
    weights = pretrained.videomae.state_dict()
    assert same_weights(VideoMAEModel.from_pretrained(PRETRAIN).state_dict(), weights)
    encoder = {name: x for name, x in weights.items() if not name.startswith("encoder.norm.")}
    assert same_weights(model.videomae.state_dict(), encoder)

    caplog.clear()
    model = VideoMAEForVideoClassification.from_pretrained(CLASSIFY, num_labels=9)
    assert len(caplog.messages) == 1 and "newly initialized: ['classifier.']" in caplog.text
    assert model.classifier.out_features == 9 and model.config.id2label[8] == "LABEL_8"
    refused('Missing key(s) in state_dict: "decoder.mask_token"', CLASSIFY, VideoMAEForPreTraining)


def test_weights_that_do_not_fit_are_one_error_or_logged(tmp_path, caplog):
    weights = safetensors.load_file(PRETRAIN / "model.safetensors")
    weights["decoder.norm.bias"] = weights["decoder.norm.bias"][:5]
    shutil.copy(PRETRAIN / "config.json", tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    load = VideoMAEForPreTraining.from_pretrained
    model = load(tmp_path, ignore_mismatched_sizes=True)
    name = "decoder.norm.bias"
    assert caplog.messages[-1].endswith(f"newly initialized: ['{name}'], not used: ['{name}']")

    weights["mask_tokens"] = weights.pop("mask_token")
    del weights["videomae.encoder.layer.1.attention.attention.v_bias"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    error = refused("Missing key", tmp_path, VideoMAEForPreTraining)
    for part in (str(tmp_path), '"decoder.mask_token"', '1.attn.v_bias"',
                 'Unexpected key(s) in state_dict: "decoder.mask_tokens"',
                 "size mismatch for decoder.norm.bias", "[5]", "[32]"):
        assert part in error
    refused("Missing key", tmp_path, VideoMAEForPreTraining, ignore_mismatched_sizes=True)

    model = load(tmp_path, strict=False)
    new = {"decoder.mask_token", "decoder.norm.bias", "videomae.encoder.blocks.1.attn.v_bias"}
    assert "'videomae.encoder.blocks.1.attn.v_bias'], not used" in caplog.messages[-1]
    expected = load(PRETRAIN).state_dict()
    assert new == {name for name, x in model.state_dict().items()
                   if not torch.equal(x, expected[name])}


def test_options_of_transformers(caplog):
    """The lines of transformers' guide, and all other options of from_pretrained."""
    load, names = VideoMAEForVideoClassification.from_pretrained, ["Punch", "YoYo"]
    label2id = {name: i for i, name in enumerate(names)}
    for options in (
        dict(label2id=label2id, id2label=dict(enumerate(names))),
        dict(label2id={name: str(i) for name, i in label2id.items()}),  # as in another guide
        dict(id2label={"0": "Punch", "1": "YoYo"}), dict(id2label=names),
        dict(config=VideoMAEConfig(**SMALL, id2label=names)),
    ):
        model = load(CLASSIFY, ignore_mismatched_sizes=True, **options)
        assert model.config.id2label == {0: "Punch", 1: "YoYo"}
        assert model.classifier.out_features == model.config.num_labels == 2
    refused("id2label: got keys ['1', '2'], expected 0 to 1", CLASSIFY, id2label={1: "a", 2: "b"})
    refused("dtype: got 'half16', expected one of float32", CLASSIFY, dtype="half16")
    refused("config: got dict, expected videomae.Video", CLASSIFY, config={"num_labels": 3})
    refused("num_labels: got 3, but id2label has 2", CLASSIFY, id2label=names, num_labels=3)

    model = load(CLASSIFY, config=VideoMAEConfig(**SMALL, num_labels=5), hidden_act="relu",
                 low_cpu_mem_usage=True, attn_implementation="sdpa", local_files_only=True,
                 cache_dir="nowhere", token=None, revision="main", subfolder="")
    assert model.config.hidden_act == "relu" and model.config.num_labels == 5
    for name in ("num_frame", "device_map", "quantization_config"):
        for cls in (VideoMAEModel, VideoMAEImageProcessor):
            message = f"{cls.__name__}: got unknown options ['{name}']; see docs/transformers.md"
            refused(message.replace("Model", "Config"), CLASSIFY, cls, **{name: 3})
    table = (HERE / "docs/transformers.md").read_text()
    assert "`device_map`" in table and "`quantization_config`" in table


# --------------------------------------------------------------------------------------------------
# Files of the authors, of VideoMAE V2, of this project


def authors_file(path, weights, wrapper="model"):
    """Save weights as the authors do: under a key beside other entries, or bare."""
    more = {"epoch": 7, "args": argparse.Namespace(lr=1e-3)}
    torch.save({wrapper: weights, **more} if wrapper else weights, path)
    return path


def golden_weights(name):
    golden = torch.load(GOLDEN / f"mcg_nju_{name}_tiny.pt", weights_only=True)
    (weights,) = golden["checkpoint"].values()
    return golden, weights


def test_authors_pretraining_file(tmp_path):
    """All but the clip size and the number of heads is inferred from shapes."""
    golden, weights = golden_weights("pretrain")
    config = golden["config"]
    known = {name: config[name] for name in
             ("image_size", "num_frames", "num_attention_heads", "decoder_num_attention_heads")}
    source = authors_file(tmp_path / "checkpoint.pth", weights)
    model = VideoMAEForPreTraining.from_pretrained(source, **known, position_grid=None)
    assert config.items() <= vars(model.config).items()
    assert not model.config.use_mean_pooling and model.config.head_norm_eps == 1e-6
    output = model(normalize(golden["frames"]), golden["bool_masked_pos"])
    check_same("authors' pretraining file", {
        "logits": (output.logits, golden["logits"]),
        "loss": (output.loss, golden["loss_normalized"]),
    })
    conv = published_state_dict(model)["videomae.embeddings.patch_embeddings.projection.weight"]
    assert torch.equal(conv, weights["encoder.patch_embed.proj.weight"])

    # What shapes do not determine must be passed, but only for the modules that are loaded.
    refused("position_grid: the grid changes from (8, 28, 28) to (8, 4, 4); pass (8, 28, 28)",
            source, VideoMAEForPreTraining, **known)
    refused("num_attention_heads: cannot be inferred from a width of 48; pass it", source)
    del known["decoder_num_attention_heads"]
    refused("decoder_num_attention_heads: cannot", source, VideoMAEForPreTraining, **known)
    encoder = VideoMAEModel.from_pretrained(source, **known, position_grid=None)
    assert same_weights(encoder.state_dict(), model.videomae.state_dict())


@pytest.mark.parametrize("wrapper, prefix", [
    ("", ""), ("module", "model."), ("model", "_orig_mod.module."), ("net", "module._orig_mod."),
    ("model_state_dict", "base_model.model.backbone."), ("state_dict", "student.module."),
    ("model_ema", "model.model.")])
def test_authors_classifier_in_wrappers(wrapper, prefix, tmp_path):
    golden, weights = golden_weights("finetune")
    weights = {prefix + name: x for name, x in weights.items()}
    source = authors_file(tmp_path / "checkpoint.pth", weights, wrapper)
    model = VideoMAEForVideoClassification.from_pretrained(source, **AUTHORS)
    assert golden["config"].items() <= vars(model.config).items()
    logits = model(normalize(golden["frames"])).logits
    check_same("authors' classifier file", {"logits": (logits, golden["logits"])})

    model.save_pretrained(tmp_path / "saved")
    again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved")
    assert same_weights(again.state_dict(), model.state_dict())
    assert again.config.head_norm_eps == 1e-6


def test_the_model_is_preferred_to_its_ema_and_names_must_differ(tmp_path):
    _, weights = golden_weights("finetune")
    ema = {name: x + 1 for name, x in weights.items()}
    torch.save({"model_ema": ema, "model": weights}, tmp_path / "both.pth")
    read, _ = checkpoints.read_checkpoint(tmp_path / "both.pth")
    assert same_weights(read, weights)
    torch.save({**weights, "module.head.bias": weights["head.bias"]}, tmp_path / "twice.pth")
    refused("two weights map to classifier.bias", tmp_path / "twice.pth", **AUTHORS)


@pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
def test_own_weights(cls, tmp_path):
    """Load a state dict, a training run's state, and a folder written by transformers.Trainer."""
    config = VideoMAEConfig(**SMALL, use_mean_pooling=cls is not VideoMAEForPreTraining)
    model = cls(config)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    compiled = {f"_orig_mod.{name}": x for name, x in model.state_dict().items()}
    torch.save({"model": compiled, "step": 3}, tmp_path / "state.pt")
    (tmp_path / "checkpoint-500").mkdir()
    safetensors.save_file(model.state_dict(), tmp_path / "checkpoint-500/model.safetensors")
    for name in ("weights.pt", "state.pt", "checkpoint-500"):
        refused("config: cannot be inferred from these weights", tmp_path / name, cls)
        again = cls.from_pretrained(tmp_path / name, config=config, drop_path_rate=0.1)
        assert again.config.drop_path_rate == 0.1
        again = cls.from_pretrained(tmp_path / name, config=config)
        assert again.config == config and same_weights(again.state_dict(), model.state_dict())
    encoder = VideoMAEModel.from_pretrained(tmp_path / "state.pt", config=config)
    assert same_weights(encoder.state_dict(), model.videomae.state_dict())


@pytest.mark.parametrize("name", ["small", "base", "large", "huge", "giant"])
def test_sizes_of_videomae_v2_are_inferred(name):
    """The shapes of every published size, on the meta device, with the names in V2's files."""
    preset = VideoMAEConfig.preset(name)
    width, hidden, size = preset.hidden_size, preset.intermediate_size, preset.patch_size
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,),
        "attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
    }
    shapes = {
        "patch_embed.proj.weight": (width, 3, 2, size, size), "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,), "fc_norm.bias": (width,),
        "head.weight": (710, width), "head.bias": (710,),
    } | {f"blocks.{i}.{key}": shape for i in range(preset.num_hidden_layers)
         for key, shape in block.items()}
    weights = {f"model.{key}": torch.empty(x, device="meta") for key, x in shapes.items()}
    config = VideoMAEConfig(**infer_config(weights))
    expected = dict(small=(384, 12, 6, 1536, 16), base=(768, 12, 12, 3072, 16),
                    large=(1024, 24, 16, 4096, 16), huge=(1280, 32, 16, 5120, 16),
                    giant=(1408, 40, 16, 6144, 14))[name]
    for sizes in (config, preset):
        assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads,
                sizes.intermediate_size, sizes.patch_size) == expected
    assert config.num_labels == 710 and config.use_mean_pooling
    with torch.device("meta"):
        model = VideoMAEForVideoClassification(config)
    converted = {key: x.shape for key, x in convert_state_dict(weights).items()}
    assert converted == {key: x.shape for key, x in model.state_dict().items()}


def test_videomae_v2_directory_of_the_hub(tmp_path):
    """It has its own kind of config.json, a "model." prefix on every name, and no head."""
    golden, weights = golden_weights("finetune")
    weights = {f"model.{name}": x for name, x in weights.items() if not name.startswith("head.")}
    config = {"img_size": 32, "num_frames": 8, "num_heads": 3}
    config = {"model_type": "VideoMAEv2_Base", "model_config": config}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = VideoMAEForVideoClassification.from_pretrained(tmp_path)
    encoded = model.videomae(normalize(golden["frames"])).last_hidden_state
    features = model.fc_norm(encoded.mean(dim=1))
    check_same("VideoMAE V2's directory", {"features": (features, golden["pooled_features"])})
    model.save_pretrained(tmp_path / "saved")
    assert VideoMAEModel.from_pretrained(tmp_path / "saved").config.extra.get("extra") is None

    weights["model.blocks.0.attn.scale"] = torch.ones(3, 1, 1)
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    assert "blocks.0.attn.scale" in refused("Unexpected key", tmp_path)


# --------------------------------------------------------------------------------------------------
# Clips of another length or size


def test_clips_of_another_length_or_size(tmp_path, caplog):
    """Positions are recomputed or interpolated, as the caller asks; neither is chosen silently."""
    larger = dict(num_frames=12, image_size=(64, 32))  # from 8 frames of 32 x 32
    for options in (larger, dict(config=VideoMAEConfig(**SMALL | larger, use_mean_pooling=False))):
        refused("grid changes from (4, 4, 4) to (6, 8, 4)", PRETRAIN, **options)
    new = VideoMAEModel.from_pretrained(PRETRAIN, **larger, position_grid=None)
    table = position_table(VideoMAEConfig(**SMALL | larger), 48)
    assert torch.equal(new.encoder.positions, table)
    model = VideoMAEForPreTraining.from_pretrained(PRETRAIN, **larger, position_grid=(4, 4, 4))
    clip, mask = torch.randn(1, 12, 3, 64, 32), random_mask("tube", 1, (6, 8, 4), 0.75)
    assert model(clip, mask).logits.shape == (1, 144, 384)

    # Interpolation keeps the corners, and an unchanged grid keeps the whole table.
    old = VideoMAEModel.from_pretrained(PRETRAIN).encoder.positions.view(4, 4, 4, 48)
    grid = model.videomae.encoder.positions.view(6, 8, 4, 48)
    for corner in np.ndindex(2, 2, 2):
        corner = tuple(-i for i in corner)
        assert torch.allclose(grid[corner], old[corner], atol=1e-6)
    same, plain = VideoMAEConfig(**SMALL, position_grid=(4, 4, 4)), VideoMAEConfig(**SMALL)
    assert torch.equal(position_table(same, 48), position_table(plain, 48))

    # The positions survive saving, with a warning that transformers ignores them.
    model.save_pretrained(tmp_path)
    assert "transformers ignores position_grid=(4, 4, 4)" in caplog.text
    again = VideoMAEForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(again.videomae.encoder.positions, model.videomae.encoder.positions)
    refused("pass (4, 4, 4) to interpolate", tmp_path, num_frames=16)


# --------------------------------------------------------------------------------------------------
# Bad files are refused by name and never executed; no file is left half written


class Bomb:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_bad_files_are_refused_by_name_and_never_executed(tmp_path):
    _, weights = golden_weights("pretrain")
    good = authors_file(tmp_path / "good.pth", weights).read_bytes()
    tensors = (PRETRAIN / "model.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit, somewhere in the weights
    bomb = Bomb(tmp_path / "executed")
    damaged = "missing, damaged, or not plain data"
    cases = {
        "empty.pth": (b"", damaged),
        "truncated.pth": (good[: len(good) // 2], damaged),
        "flipped.pth": (bytes(flipped), "BadZipFile"),
        "text.pth": (b"<html>404 not found</html>", damaged),
        "code.pth": (pickle.dumps({"model": bomb}, 2), "contains posix.system,"),
        "zipped code.pth": ({"model": {"weight": bomb}}, "contains posix.system,"),
        "path.pth": ({"model": weights, "args": tmp_path}, "contains pathlib.PosixPath,"),
        "number.pth": ({"model": weights, "best": np.float64(1)}, "multiarray.scalar, which is"),
        "whole model.pth": (torch.nn.Linear(1, 1), "contains torch.nn.modules.linear.Linear"),
        "list.pth": ([torch.zeros(2)], damaged),
        "no weights.pth": ({"epoch": 3, "model": {}}, "expected weights, got only []"),
        "epoch.pth": ({"epoch": 3, "loss": 2.5}, "expected weights, got only ['epoch', 'loss']"),
        "other.pth": ({"conv.weight": torch.zeros(2)}, "VideoMAE weights, got ['conv.weight']"),
        "truncated.safetensors": (tensors[: len(tensors) // 2], damaged),
        "text.safetensors": (b"not tensors", damaged),
    }
    for name, (content, message) in cases.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            VideoMAEForPreTraining.from_pretrained(tmp_path / name)
        assert name in str(error.value)
        shown = "".join(traceback.format_exception(error.value))
        assert "weights_only=False" not in shown, "no advice to execute the file"
    assert not (tmp_path / "executed").exists()


def test_incomplete_directories_are_refused(tmp_path):
    refused(f"{tmp_path}/nowhere.pth: not a local path, and not found on the Hugging Face Hub",
            tmp_path / "nowhere.pth")
    damaged = "missing, damaged, or not plain data"
    refused(f"preprocessor_config.json: {damaged} (FileNotFoundError)", tmp_path,
            VideoMAEImageProcessor)
    config = tmp_path / "config.json"
    shutil.copy(PRETRAIN / "config.json", config)
    refused(f"{tmp_path}: expected weights, such as model.safetensors or model-*-of-*", tmp_path)
    shutil.copy(PRETRAIN / "model.safetensors", tmp_path)
    refused(f"{damaged} (NotADirectoryError)", tmp_path / "model.safetensors",
            VideoMAEImageProcessor)
    values = read_json(config)
    for text, message in (
        ("{", f"config.json: {damaged} (JSONDecodeError)"),
        ("[1]", f"config.json: {damaged} (TypeError)"),
        ('{"model_type": "vit"}', "model_type: got 'vit', expected 'videomae'"),
        (json.dumps(values | {"id2label": {"1": "a", "2": "b"}}), "id2label: got keys ['1', '2']"),
        (json.dumps(values | {"num_frames": "many"}), "num_frames: got 'many', expected"),
    ):
        config.write_text(text)
        assert str(tmp_path) in refused(message, tmp_path)
    config.write_text(json.dumps(values | {"id2label": ["a", "b"]}))
    assert VideoMAEModel.from_pretrained(tmp_path).config.id2label == {0: "a", 1: "b"}


def test_a_write_is_atomic(tmp_path):
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")

    def fail_half_way(file):
        file.write(b"new, but")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(target, fail_half_way)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    write_atomic(target, lambda file: file.write(b"new"))
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]

    with pytest.raises(ValueError, match="directory: .*model.pt already exists"):
        write_new(tmp_path, {"first.json": b"{}", "model.pt": b"newer"})
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]
    write_new(tmp_path / "new", {"first.json": b"{}"})
    assert (tmp_path / "new/first.json").read_bytes() == b"{}"

    model = VideoMAEModel(VideoMAEConfig(**SMALL, hidden_act=torch.tanh))
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "function")
    assert not (tmp_path / "function").exists()


# --------------------------------------------------------------------------------------------------
# The command line and the hub


def run_script(monkeypatch, *arguments):
    """Run python checkpoints.py ... -> its exit message, or None on success."""
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *map(str, arguments)])
    try:
        runpy.run_path(str(HERE / "checkpoints.py"), run_name="__main__")
    except SystemExit as error:
        return error.code


def test_command_line(tmp_path, capsys, monkeypatch):
    golden, weights = golden_weights("pretrain")
    good, new = authors_file(tmp_path / "good.pth", weights), tmp_path / "new"
    known = {"num_attention_heads": 3, "decoder_num_attention_heads": 2, "image_size": 32,
             "position_grid": None}
    pairs = [f"{name}={json.dumps(x)}" for name, x in known.items()]
    assert run_script(monkeypatch, good, new, *pairs) is None
    assert sorted(file.name for file in new.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json"]
    model = VideoMAEForPreTraining.from_pretrained(new)
    logits = model(normalize(golden["frames"]), golden["bool_masked_pos"]).logits
    check_same("converted from the shell", {"logits": (logits, golden["logits"])})
    processor = VideoMAEImageProcessor.from_pretrained(new)
    assert tuple(processor.image_mean) == IMAGENET_MEAN
    assert processor.crop_size == {"height": 32, "width": 32}
    assert "python checkpoints.py SOURCE TARGET" in run_script(monkeypatch, "--help")
    message = run_script(monkeypatch, tmp_path / "nowhere.pth")
    assert message.startswith(f"checkpoints.py: {tmp_path}/nowhere.pth: not a local path")

    for name, kind in KINDS.items():
        checkpoints.main(GOLDEN / name)
        output = capsys.readouterr().out
        assert kind.__name__ in output and "hidden_size=48" in output
    broken = safetensors.load_file(new / "model.safetensors")
    broken["mask_token"][0, 0, 0] = float("nan")
    safetensors.save_file(broken, new / "model.safetensors")
    for paths, fields, message in [
        ([new], {}, "not finite: decoder.mask_token"),
        ([new, tmp_path / "newer"], {}, "not finite: decoder.mask_token"),
        ([good], known | {"image_sise": 32}, r"unknown options \['image_sise'\]"),
        ([good, new], known, "already exists"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            checkpoints.main(*paths, **fields)
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize("image_size", [(64, 32), (32, 64)])
def test_a_converted_model_that_is_not_square_accepts_ordinary_video(image_size, tmp_path):
    VideoMAEForPreTraining(VideoMAEConfig(
        **SMALL | dict(image_size=image_size), use_mean_pooling=False)).save_pretrained(tmp_path)
    checkpoints.main(tmp_path, tmp_path / "new")
    processor = VideoMAEImageProcessor.from_pretrained(tmp_path / "new")
    model = VideoMAEForPreTraining.from_pretrained(tmp_path / "new")
    for height, width in ((240, 320), (320, 240)):
        frames = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8)
        inputs = processor(frames, return_tensors="pt")
        inputs["bool_masked_pos"] = random_mask("tube", 1, model.config.grid, 0.75)
        assert model(**inputs).loss.isfinite()


def test_hub_ids(tmp_path):
    """Download from a server that answers as the hub does, then load from the cache offline."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    hub = tmp_path / "hub/someone"
    for path in ("tiny/resolve/main", "bin/resolve/main", "many/resolve/main/second"):
        shutil.copytree(CLASSIFY, hub / path)
    expected = safetensors.load_file(CLASSIFY / "model.safetensors")
    torch.save(expected, hub / "bin/resolve/main/pytorch_model.bin")
    (hub / "bin/resolve/main/model.safetensors").unlink()
    code = f"""
import pytest, torch
from processor import VideoMAEImageProcessor
from videomae import VideoMAEModel
expected = VideoMAEModel.from_pretrained({str(CLASSIFY)!r}).state_dict()
processor = VideoMAEImageProcessor.from_pretrained({str(CLASSIFY)!r})
places = dict(tiny={{}}, bin={{"revision": "main", "token": "t"}}, many={{"subfolder": "second"}})
for options in ({{}}, {{"local_files_only": True}}):
    for name, place in places.items():
        place = place | options | {{"cache_dir": "cache"}}
        model = VideoMAEModel.from_pretrained(f"someone/{{name}}", **place)
        assert all(torch.equal(x, expected[key]) for key, x in model.state_dict().items())
        assert VideoMAEImageProcessor.from_pretrained(f"someone/{{name}}", **place) == processor
    with pytest.raises(ValueError, match="someone/other: not a local path, and not found on the"):
        VideoMAEModel.from_pretrained("someone/other", cache_dir="cache", **options)
"""
    with hub_server(tmp_path / "hub") as env:  # a process, as the environment is read on import
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | env | {"PYTHONPATH": HERE},
            capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "cache/models--someone--tiny").exists()


def test_a_missing_huggingface_hub_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "huggingface_hub" in refused("someone/tiny: not a local path", "someone/tiny")


@pytest.mark.hub
def test_published_weights():
    """Published weights give the values in transformers' own tests; downloads about 1 GB."""
    from huggingface_hub import hf_hub_download

    video = np.load(hf_hub_download("hf-internal-testing/spaghetti-video", "eating_spaghetti.npy",
                                    repo_type="dataset"))
    clip = VideoMAEImageProcessor()(list(video), return_tensors="pt").pixel_values
    model = VideoMAEForVideoClassification.from_pretrained(
        "MCG-NJU/videomae-base-finetuned-kinetics")
    logits = model(clip).logits
    assert logits.shape == (1, 400)
    assert torch.allclose(logits[0, :3], torch.tensor([0.3669, -0.0688, -0.2421]), atol=2e-4)

    mask = hf_hub_download("hf-internal-testing/bool-masked-pos", "bool_masked_pos.pt")
    mask = torch.load(mask, weights_only=True).view(1, -1)
    expected = torch.tensor(
        [[0.7994, 0.9612, 0.8508], [0.7401, 0.8958, 0.8302], [0.5862, 0.7468, 0.7325]])
    for norm_pix_loss, loss in ((True, 0.5142), (False, 0.6469)):
        model = VideoMAEForPreTraining.from_pretrained(
            "MCG-NJU/videomae-base-short", norm_pix_loss=norm_pix_loss)
        output = model(clip, mask)
        assert output.logits.shape == (1, 1408, 1536) and abs(output.loss.item() - loss) < 1e-4
        if norm_pix_loss:
            assert torch.allclose(output.logits[0, :3, :3], expected, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Copied into another project


def test_files_copied_into_another_project(tmp_path):
    """videomae.py needs only torch, numpy and einops; in a package, it finds checkpoints.py."""
    (tmp_path / "package").mkdir()
    shutil.copy(HERE / "videomae.py", tmp_path)
    for name in ("videomae.py", "checkpoints.py"):
        shutil.copy(HERE / name, tmp_path / "package")
    code = f"""
import sys, torch, numpy, einops
before = set(sys.modules)
sys.modules["checkpoints"] = None  # hide this project's installed copy
import videomae
new = {{name.split(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
assert new <= {{"videomae", "checkpoints"}}, new
assert videomae.__file__ == {str(tmp_path / "videomae.py")!r}

config = videomae.VideoMAEConfig.preset("tiny")
mask = videomae.random_mask("tube", 2, config.grid, 0.75)
videomae.VideoMAEForPreTraining(config)(torch.randn(2, 8, 3, 32, 32), mask).loss.backward()
try:
    videomae.VideoMAEModel.from_pretrained("MCG-NJU/videomae-base")
except ImportError as error:
    assert "checkpoints.py beside videomae.py" in str(error)
else:
    raise AssertionError

import package.videomae
model = package.videomae.VideoMAEForPreTraining.from_pretrained({str(PRETRAIN)!r})
model.save_pretrained("saved")
assert "package.checkpoints" in sys.modules
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "saved/config.json").exists()


# --------------------------------------------------------------------------------------------------
# transformers' Trainer


def test_trainer_trains_evaluates_and_saves(tmp_path):
    """Follow transformers' guide to video classification, on vertical and horizontal stripes."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    names = ["stand", "lie"]
    model = VideoMAEForVideoClassification.from_pretrained(
        GOLDEN / "hf_pretrain_tiny", label2id={name: i for i, name in enumerate(names)},
        id2label=dict(enumerate(names)), ignore_mismatched_sizes=True, use_mean_pooling=True)
    processor = VideoMAEImageProcessor.from_pretrained(GOLDEN / "hf_pretrain_tiny")
    standing = np.tile(np.uint8([200, 0] * 16)[:, None], (8, 32, 1, 3))  # (T, H, W, C)
    videos = [standing, standing.transpose(0, 2, 1, 3)]
    clips = [dict(pixel_values=processor(list(videos[i % 2]), return_tensors="pt").pixel_values[0],
                  labels=i % 2) for i in range(8)]

    def accuracy(prediction):
        return dict(accuracy=(prediction.predictions.argmax(1) == prediction.label_ids).mean())

    args = transformers.TrainingArguments(
        tmp_path / "trainer", max_steps=20, learning_rate=3e-3, use_cpu=True, report_to="none",
        per_device_train_batch_size=4, save_steps=10, disable_tqdm=True)
    trainer = transformers.Trainer(model, args, train_dataset=clips, eval_dataset=clips,
                                   processing_class=processor, compute_metrics=accuracy)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    logits = torch.from_numpy(trainer.predict(clips).predictions)

    trainer.save_model(tmp_path / "saved")  # weights only, as Trainer does not know our config
    model.save_pretrained(tmp_path / "whole")
    pixel_values = torch.stack([clip["pixel_values"] for clip in clips])
    for source, options in ((tmp_path / "saved", dict(config=trainer.model.config)),
                            (tmp_path / "whole", {})):
        again = VideoMAEForVideoClassification.from_pretrained(source, **options)
        assert again.config.id2label == {0: "stand", 1: "lie"}
        assert torch.allclose(again(pixel_values).logits, logits, atol=1e-5)
