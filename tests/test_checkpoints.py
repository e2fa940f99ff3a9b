"""Tests of checkpoints.py: every published format loads, saved models load in transformers, and no
weight is dropped or invented silently. Also tests of the files copied into another project.

    python -m pytest -q tests/test_checkpoints.py
"""
import argparse
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch

import checkpoints
import videomae
from checkpoints import config_to_json, published_state_dict, write_atomic, write_new
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_json(path):
    return json.loads(path.read_text())


def refused(pattern, source, cls=VideoMAEModel, **options):
    """Check that loading raises an error that matches a pattern -> the text of the error."""
    with pytest.raises((ValueError, TypeError), match=pattern) as error:
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
    with pytest.raises(ValueError, match="model.safetensors"):
        model.save_pretrained(saved)
    refused("config.json.*model.safetensors", saved / "config.json")


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
    refused("(?s)shards.*(Missing key|layers.* but)", tmp_path / "shards", getattr(videomae, kind))

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
    refused("decoder.mask_token", CLASSIFY, VideoMAEForPreTraining, use_mean_pooling=True)


def test_weights_that_do_not_fit_are_one_error_or_logged(tmp_path, caplog):
    weights = safetensors.load_file(PRETRAIN / "model.safetensors")
    weights["decoder.norm.bias"] = weights["decoder.norm.bias"][:5]
    shutil.copy(PRETRAIN / "config.json", tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    load = VideoMAEForPreTraining.from_pretrained
    model = load(tmp_path, strict=False)
    name = "decoder.norm.bias"
    assert caplog.messages[-1].endswith(f"newly initialized: ['{name}'], not used: ['{name}']")
    refused(f"{tmp_path}(?s:.*){name}", tmp_path, VideoMAEForPreTraining,
            ignore_mismatched_sizes=True)  # that is for classifiers

    weights["mask_tokens"] = weights.pop("mask_token")
    del weights["videomae.encoder.layer.1.attention.attention.v_bias"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    error = refused("Missing", tmp_path, VideoMAEForPreTraining)
    for part in (str(tmp_path), '"decoder.mask_token"', '1.attn.v_bias"',
                 '"decoder.mask_tokens"', "decoder.norm.bias", "[5]", "[32]"):
        assert part in error

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
    refused("id2label.*'1', '2'", CLASSIFY, id2label={1: "a", 2: "b"})
    refused("dtype.*half16", CLASSIFY, dtype="half16")
    refused("config.*dict.*VideoMAEConfig", CLASSIFY, config={"num_labels": 3})
    refused("num_labels.*3.*id2label.*2", CLASSIFY, id2label=names, num_labels=3)
    refused(f"{CLASSIFY}.*num_labels.*2.*5", CLASSIFY, VideoMAEForVideoClassification,
            config=VideoMAEConfig(**SMALL, id2label=names))

    model = load(CLASSIFY, config=VideoMAEConfig(**SMALL, num_labels=5), hidden_act="relu",
                 low_cpu_mem_usage=True, attn_implementation="sdpa", local_files_only=True,
                 cache_dir="nowhere", token=None, revision="main", subfolder="")
    assert model.config.hidden_act == "relu" and model.config.num_labels == 5
    for name in ("num_frame", "device_map", "quantization_config"):
        for cls in (VideoMAEModel, VideoMAEImageProcessor):
            refused(f"{name}.*docs/transformers.md", CLASSIFY, cls, **{name: 3})
    table = (HERE / "docs/transformers.md").read_text()
    assert "`device_map`" in table and "`quantization_config`" in table


# --------------------------------------------------------------------------------------------------
# Files of the authors, of VideoMAE V2, of this project


def authors_file(path, weights, wrapper="model"):
    """Save weights as the authors do: under a key beside other entries, or bare."""
    more = {"epoch": 7, "args": argparse.Namespace(lr=1e-3)}
    torch.save({wrapper: weights, **more} if wrapper else weights, path)
    return path


def authors(name):
    """-> golden inputs and outputs, the weights, and the config, which the file does not have."""
    golden = torch.load(GOLDEN / f"mcg_nju_{name}_tiny.pt", weights_only=True)
    (weights,) = golden["checkpoint"].values()
    fields = dict(head_norm_eps=1e-6, use_mean_pooling=name == "finetune")
    return golden, weights, VideoMAEConfig(**fields | golden["config"])


def test_authors_pretraining_file(tmp_path):
    golden, weights, config = authors("pretrain")
    source = authors_file(tmp_path / "checkpoint.pth", weights)
    model = VideoMAEForPreTraining.from_pretrained(source, config=config)
    assert model.config == config
    output = model(normalize(golden["frames"]), golden["bool_masked_pos"])
    check_same("authors' pretraining file", {
        "logits": (output.logits, golden["logits"]),
        "loss": (output.loss, golden["loss_normalized"]),
    })
    conv = published_state_dict(model)["videomae.embeddings.patch_embeddings.projection.weight"]
    assert torch.equal(conv, weights["encoder.patch_embed.proj.weight"])
    encoder = VideoMAEModel.from_pretrained(source, config=config, decoder_hidden_size=64)
    assert same_weights(encoder.state_dict(), model.videomae.state_dict())


@pytest.mark.parametrize("wrapper, prefix", [
    ("", ""), ("module", "model."), ("model", "_orig_mod.module."), ("net", "module._orig_mod."),
    ("model_state_dict", "base_model.model.backbone."), ("state_dict", "student.module."),
    ("model_ema", "model.model.")])
def test_authors_classifier_in_wrappers(wrapper, prefix, tmp_path):
    golden, weights, config = authors("finetune")
    weights = {prefix + name: x for name, x in weights.items()}
    source = authors_file(tmp_path / "checkpoint.pth", weights, wrapper)
    model = VideoMAEForVideoClassification.from_pretrained(source, config=config)
    logits = model(normalize(golden["frames"])).logits
    check_same("authors' classifier file", {"logits": (logits, golden["logits"])})


def test_a_config_is_asked_for_and_not_guessed(tmp_path):
    """Neither a bare file nor another model's config.json says frames, size and heads."""
    golden, weights, config = authors("finetune")
    bare, v2 = authors_file(tmp_path / "bare.pth", weights), tmp_path / "v2"
    v2.mkdir()
    prefixed = {f"model.{name}": x for name, x in weights.items() if not name.startswith("head.")}
    safetensors.save_file(prefixed, v2 / "model.safetensors")  # as in VideoMAE V2's on the hub
    v2_config = {"model_type": "VideoMAEv2_Base", "model_config": {"img_size": 32, "num_heads": 3}}
    (v2 / "config.json").write_text(json.dumps(v2_config))
    for source in (bare, v2):
        for options in ({}, dict(num_frames=8, image_size=32, num_attention_heads=3)):
            error = refused(f"{source}.*VideoMAEConfig.preset.*preset=base", source, **options)
            assert "num_frames" in error and ("no config.json" in error) == (source == bare)
        model = VideoMAEForVideoClassification.from_pretrained(source, config=config)
        encoded = model.videomae(normalize(golden["frames"])).last_hidden_state
        features = model.fc_norm(encoded.mean(dim=1))
        check_same(source.name, {"features": (features, golden["pooled_features"])})

        # A size that the file does not say is whatever the caller says; no old grid is claimed.
        model = VideoMAEModel.from_pretrained(source, config=config, num_frames=4)
        assert model.config.grid == (2, 4, 4)


def test_sizes_in_the_weights_must_be_the_config_s(tmp_path):
    """An error names the file, the field, and both values, for every size that the shapes say."""
    wrong = dict(num_channels=1, tubelet_size=1, patch_size=16, hidden_size=96,
                 num_hidden_layers=2, intermediate_size=48)
    _, weights, config = authors("pretrain")
    pretrain = authors_file(tmp_path / "pretrain.pth", weights)
    more = dict(decoder_hidden_size=64, decoder_num_hidden_layers=3, decoder_intermediate_size=32)
    for field, value in (wrong | more).items():
        pattern = f"pretrain.pth.*{field}.* {value},.* {getattr(config, field)}$"
        refused(pattern, pretrain, VideoMAEForPreTraining, config=config, **{field: value})
    small = VideoMAEConfig.preset("small", patch_size=8)
    refused("hidden_size.* 384,.* 48$", pretrain, config=small)
    for field, value in dict(hidden_size=96, num_hidden_layers=2).items():  # from a directory, too
        refused(f"{PRETRAIN}.*{field}.* {value},", PRETRAIN, **{field: value})

    _, weights, config = authors("finetune")
    finetune = authors_file(tmp_path / "finetune.pth", weights)
    load = VideoMAEForVideoClassification
    refused("finetune.pth.*use_mean_pooling", finetune, load, config=config, use_mean_pooling=False)
    seven = replace(config, num_labels=7, id2label=None)
    refused("finetune.pth.*num_labels.* 7,.* 5$", finetune, load, config=seven)
    model = load.from_pretrained(finetune, config=config, num_labels=7)  # asks for a new head
    assert model.classifier.out_features == 7


def test_the_presets_have_the_published_numbers_of_heads():
    """Weights do not tell it, so that a wrong number would load."""
    heads = {name: (config["num_attention_heads"], config["decoder_num_attention_heads"])
             for name, config in videomae.PRESETS.items() if name not in ("tiny", "laptop")}
    assert heads == dict(small=(6, 3), base=(12, 6), large=(16, 8), huge=(16, 8), giant=(16, 8))


def test_the_model_is_preferred_to_its_ema_and_names_must_differ(tmp_path):
    _, weights, config = authors("finetune")
    ema = {name: x + 1 for name, x in weights.items()}
    torch.save({"model_ema": ema, "model": weights}, tmp_path / "both.pth")
    read, _ = checkpoints.read_checkpoint(tmp_path / "both.pth")
    assert same_weights(read, weights)
    torch.save({**weights, "module.head.bias": weights["head.bias"]}, tmp_path / "twice.pth")
    refused("twice.pth.*classifier.bias", tmp_path / "twice.pth", config=config)


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
        refused(f"{name}.*config=", tmp_path / name, cls)
        again = cls.from_pretrained(tmp_path / name, config=config, drop_path_rate=0.1)
        assert again.config == replace(config, drop_path_rate=0.1)
        assert same_weights(again.state_dict(), model.state_dict())
    encoder = VideoMAEModel.from_pretrained(tmp_path / "state.pt", config=config)
    assert same_weights(encoder.state_dict(), model.videomae.state_dict())


def test_fields_that_would_change_the_outputs_are_refused(tmp_path):
    shutil.copytree(CLASSIFY, tmp_path, dirs_exist_ok=True)
    values = read_json(CLASSIFY / "config.json")
    for field, value in (
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("pruned_heads", {"0": [1]}),
        ("hidden_act", "silu"),
        ("problem_type", "multi_label_classification"),
        ("id2label", {"0": "score"}),  # regression
        ("patch_size", [8, 8]),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | {field: value}))
        name = "num_labels" if field == "id2label" else field
        assert str(tmp_path) in refused(name, tmp_path)
    harmless = dict(quantization_config=None, pruned_heads={}, is_decoder=True,
                    add_cross_attention=True, chunk_size_feed_forward=1, torch_dtype="float16")
    (tmp_path / "config.json").write_text(json.dumps(values | harmless))
    extra = VideoMAEModel.from_pretrained(tmp_path).config.extra
    assert harmless.items() <= extra.items()


def test_a_quantized_model_is_not_saved(tmp_path):
    model = VideoMAEModel(VideoMAEConfig(**SMALL))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    with pytest.raises(TypeError, match="encoder.patch_embed._packed_params"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --------------------------------------------------------------------------------------------------
# Clips of another length or size


def test_clips_of_another_length_or_size(tmp_path, caplog):
    """Positions are recomputed or interpolated, as the caller asks; neither is chosen silently."""
    larger = dict(num_frames=12, image_size=(64, 32))  # from 8 frames of 32 x 32
    for options in (larger, dict(config=VideoMAEConfig(**SMALL | larger, use_mean_pooling=False))):
        error = refused(r"position_grid.*\(4, 4, 4\).*\(6, 8, 4\)", PRETRAIN, **options)
        assert str(PRETRAIN) in error and "num_frames=8" in error and "image_size=32" in error
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
    same = VideoMAEConfig(**SMALL | larger, use_mean_pooling=False)  # but not interpolated
    refused(r"position_grid.*\(4, 4, 4\).*\(6, 8, 4\)", tmp_path, config=same)


# --------------------------------------------------------------------------------------------------
# Bad files are refused by name and never executed; no file is left half written


class Bomb:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_bad_files_are_refused_by_name_and_never_executed(tmp_path):
    _, weights, config = authors("pretrain")
    good = authors_file(tmp_path / "good.pth", weights).read_bytes()
    tensors = (PRETRAIN / "model.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit, somewhere in the weights
    bomb = Bomb(tmp_path / "executed")
    cases = {  # name: (content, what the error says of it)
        "empty.pth": (b"", "damaged"),
        "truncated.pth": (good[: len(good) // 2], "damaged"),
        "flipped.pth": (bytes(flipped), "damaged"),
        "text.pth": (b"<html>404 not found</html>", "damaged"),
        "code.pth": (pickle.dumps({"model": bomb}, 2), "posix.system"),
        "zipped code.pth": ({"model": {"weight": bomb}}, "posix.system"),
        "path.pth": ({"model": weights, "args": tmp_path}, "PosixPath"),
        "number.pth": ({"model": weights, "best": np.float64(1)}, "multiarray.scalar"),
        "whole model.pth": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        "list.pth": ([torch.zeros(2)], "damaged"),
        "no weights.pth": ({"epoch": 3, "model": {}}, r"weights.*\[\]"),
        "epoch.pth": ({"epoch": 3, "loss": 2.5}, "weights.*'epoch', 'loss'"),
        "other.pth": ({"conv.weight": torch.zeros(2)}, "weights.*conv.weight"),
        "truncated.safetensors": (tensors[: len(tensors) // 2], "damaged"),
        "text.safetensors": (b"not tensors", "damaged"),
    }
    for name, (content, pattern) in cases.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.*{pattern}") as error:
            VideoMAEForPreTraining.from_pretrained(tmp_path / name, config=config)
        shown = "".join(traceback.format_exception(error.value))
        assert "weights_only=False" not in shown, "no advice to execute the file"
    assert not (tmp_path / "executed").exists()


def test_incomplete_directories_are_refused(tmp_path):
    refused(f"{tmp_path}/nowhere.pth.*Hub", tmp_path / "nowhere.pth")
    refused("preprocessor_config.json.*FileNotFound", tmp_path, VideoMAEImageProcessor)
    config = tmp_path / "config.json"
    shutil.copy(PRETRAIN / "config.json", config)
    refused(f"{tmp_path}.*model.safetensors", tmp_path)
    shutil.copy(PRETRAIN / "model.safetensors", tmp_path)
    refused("model.safetensors.*NotADirectory", tmp_path / "model.safetensors",
            VideoMAEImageProcessor)
    values = read_json(config)
    for text, pattern in (
        ("{", "config.json.*JSON"),
        ("[1]", "config.json.*TypeError"),
        ('{"model_type": "vit"}', "config.*vit"),
        (json.dumps(values | {"id2label": {"1": "a", "2": "b"}}), "id2label.*'1', '2'"),
        (json.dumps(values | {"num_frames": "many"}), "num_frames.*'many'"),
    ):
        config.write_text(text)
        assert str(tmp_path) in refused(pattern, tmp_path)
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

    with pytest.raises(ValueError, match="model.pt"):
        write_new(tmp_path, {"first.json": b"{}", "model.pt": b"newer"})
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]
    write_new(tmp_path / "new", {"first.json": b"{}"})
    assert (tmp_path / "new/first.json").read_bytes() == b"{}"

    model = VideoMAEModel(VideoMAEConfig(**SMALL, hidden_act=torch.tanh))
    with pytest.raises(TypeError, match="builtin_function"):
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
    golden, weights, config = authors("pretrain")
    good, new = authors_file(tmp_path / "good.pth", weights), tmp_path / "new"
    known = golden["config"] | {"position_embedding": "sinusoid"}
    pairs = [f"{name}={json.dumps(x)}" for name, x in known.items()]
    assert run_script(monkeypatch, good, new, "preset=tiny", *pairs) is None
    assert sorted(file.name for file in new.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json"]
    model = VideoMAEForPreTraining.from_pretrained(new)
    logits = model(normalize(golden["frames"]), golden["bool_masked_pos"]).logits
    check_same("converted from the shell", {"logits": (logits, golden["logits"])})
    processor = VideoMAEImageProcessor.from_pretrained(new)
    assert tuple(processor.image_mean) == IMAGENET_MEAN
    assert processor.crop_size == {"height": 32, "width": 32}
    assert "python checkpoints.py SOURCE TARGET" in run_script(monkeypatch, "--help")
    assert f"{tmp_path}/nowhere.pth" in run_script(monkeypatch, tmp_path / "nowhere.pth")
    assert "preset=base" in run_script(monkeypatch, good, tmp_path / "other")
    assert "nano" in run_script(monkeypatch, good, "preset=nano")

    for name, kind in KINDS.items():
        checkpoints.main(GOLDEN / name)
        output = capsys.readouterr().out
        assert kind.__name__ in output and "hidden_size=48" in output
    classifier = authors_file(tmp_path / "finetuned.pth", authors("finetune")[1])
    broken = safetensors.load_file(new / "model.safetensors")
    broken["mask_token"][0, 0, 0] = float("nan")
    safetensors.save_file(broken, new / "model.safetensors")
    for paths, fields, message in [
        ([new], {}, "not finite: decoder.mask_token"),
        ([new, tmp_path / "newer"], {}, "not finite: decoder.mask_token"),
        ([new], {"image_sise": 32}, "image_sise"),
        ([new], {"image_size": "abc"}, "image_size.*'abc'"),
        ([good, new, "tiny"], known, "new/model.safetensors"),
        ([classifier, None, "tiny"], known | {"num_labels": 5}, "use_mean_pooling"),
        ([classifier, None, "tiny"], known | dict(num_labels=7, use_mean_pooling=True),
         "num_labels.* 7,.* 5$"),
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
    with pytest.raises(ValueError, match="someone/other"):
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
    refused("someone/tiny.*huggingface_hub", "someone/tiny")


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
    assert "checkpoints" in str(error)
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
