"""checkpoints.py: every published format in, transformers' out, nothing lost, nothing made up in
silence; and the files copied into another project.

    python -m pytest -q tests/test_checkpoints.py
"""
import argparse
import json
import os
import pickle
import re
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
    write_new,
    write_whole,
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_json(path):
    return json.loads(path.read_text())


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
    assert before.items() <= after.items(), "every field of the file, known here or not"
    extra = model.config.extra
    assert list(extra) == [name for name in before if name in extra], "in the file's order"

    again = KINDS[name].from_pretrained(saved, extra={"mine": 3})
    assert again.config.extra["mine"] == 3
    again = KINDS[name].from_pretrained(saved / "model.safetensors")  # the config beside it is used
    assert config_to_json(again.config) == config_to_json(model.config) and not again.training
    assert same_weights(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="model.safetensors exists already"):
        model.save_pretrained(saved)


@pytest.mark.parametrize("kind", ["VideoMAEModel", *(kind.__name__ for kind in KINDS.values())])
def test_transformers_loads_what_is_saved_here(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    labels = {0: "walk", 1: "run", 2: "jump"}
    config = VideoMAEConfig(**SMALL, num_labels=3, id2label=labels, extra={"mine": [1, 2]})
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
    check_same(f"saved here, read by transformers, {kind}", {"output": outputs})

    # What transformers 5 writes itself, with its own names of the biases, comes back as it went.
    theirs.save_pretrained(tmp_path / "theirs")
    again = getattr(videomae, kind).from_pretrained(tmp_path / "theirs")
    assert same_weights(again.state_dict(), ours.state_dict()) and again.config.id2label == labels


def test_spellings_and_bin_files(tmp_path):
    """The same classifier from three kinds of directory."""
    source = GOLDEN / "hf_classify_tiny"
    expected = VideoMAEForVideoClassification.from_pretrained(source).state_dict()
    weights = safetensors.load_file(source / "model.safetensors")
    config = read_json(source / "config.json")
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

    # A file of another name is not read.
    other = {name: x + 1 for name, x in weights.items()}
    safetensors.save_file(weights, tmp_path / "both/model.safetensors")
    safetensors.save_file(other, tmp_path / "both/model_ema.safetensors")
    torch.save(other, tmp_path / "both/pytorch_model.bin")

    for directory in tmp_path.iterdir():
        model = VideoMAEForVideoClassification.from_pretrained(directory)
        assert same_weights(model.state_dict(), expected), directory


def test_every_weight_is_used_or_named(caplog):
    """A new head and a dropped decoder are said in a line each."""
    source = GOLDEN / "hf_pretrain_tiny"
    pretrained = VideoMAEForPreTraining.from_pretrained(source)
    assert not caplog.messages
    model = VideoMAEForVideoClassification.from_pretrained(
        source, num_labels=7, use_mean_pooling=True)
    (message,) = caplog.messages
    assert message.endswith("new, to be trained: ['classifier.', 'fc_norm.'], "
                            "not used: ['decoder.', 'videomae.norm.']")
    assert model.config.num_labels == 7 and not model.training
    weights = pretrained.videomae.state_dict()
    assert same_weights(VideoMAEModel.from_pretrained(source).state_dict(), weights)
    encoder = {name: x for name, x in weights.items() if not name.startswith("norm.")}
    assert same_weights(model.videomae.state_dict(), encoder)

    caplog.clear()
    source = GOLDEN / "hf_classify_tiny"
    model = VideoMAEForVideoClassification.from_pretrained(source, num_labels=9)
    assert len(caplog.messages) == 1 and "new, to be trained: ['classifier.']" in caplog.text
    assert model.classifier.out_features == 9 and model.config.id2label is None
    labels = {0: "Punch", 1: "YoYo"}
    model = VideoMAEForVideoClassification.from_pretrained(source, id2label=labels)
    assert model.classifier.out_features == 2 and model.config.id2label == labels
    with pytest.raises(ValueError, match='Missing key.*"decoder.blocks.0.attn'):
        VideoMAEForPreTraining.from_pretrained(source)


def test_weights_that_do_not_fit_are_one_error_or_left_out(tmp_path, caplog):
    source = GOLDEN / "hf_pretrain_tiny"
    weights = safetensors.load_file(source / "model.safetensors")
    weights["mask_tokens"] = weights.pop("mask_token")
    weights["decoder.norm.bias"] = weights["decoder.norm.bias"][:5]
    del weights["videomae.encoder.layer.1.attention.attention.v_bias"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(ValueError) as error:
        VideoMAEForPreTraining.from_pretrained(tmp_path)
    for part in (str(tmp_path), 'Missing key', '"decoder.mask_token"', '1.attn.v_bias"',
                 'Unexpected key(s) in state_dict: "decoder.mask_tokens"',
                 "size mismatch for decoder.norm.bias", "[5]", "[32]"):
        assert part in str(error.value)

    model = VideoMAEForPreTraining.from_pretrained(tmp_path, strict=False)
    assert "unexpected_keys=['decoder.mask_tokens']" in caplog.messages[-1]
    for name in ("decoder.mask_token", "decoder.norm.bias", "videomae.blocks.1.attn.v_bias"):
        assert f"'{name}'" in caplog.messages[-1]
    expected = VideoMAEForPreTraining.from_pretrained(source).state_dict()
    different = {name for name, x in model.state_dict().items()
                 if not torch.equal(x, expected[name])}
    assert different == {"decoder.mask_token", "decoder.norm.bias", "videomae.blocks.1.attn.v_bias"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_frame'"):
        VideoMAEModel.from_pretrained(source, num_frame=8)


# --------------------------------------------------------------------------------------------------
# Files of the authors and of VideoMAE V2


def authors_file(path, golden, wrapper):
    """The golden weights as the authors save them: under a name beside other things, or bare."""
    (weights,) = golden["checkpoint"].values()
    more = {"epoch": 7, "args": argparse.Namespace(lr=1e-3)}
    torch.save({wrapper: weights, **more} if wrapper else weights, path)
    return path


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", ""])
def test_authors_pretraining_file(wrapper, tmp_path):
    """All but the size of clips and the heads is read off the shapes."""
    golden = torch.load(GOLDEN / "mcg_nju_pretrain_tiny.pt", weights_only=True)
    weights, config = golden["checkpoint"]["model"], golden["config"]
    known = {name: config[name] for name in
             ("image_size", "num_frames", "num_attention_heads", "decoder_num_attention_heads")}
    source = authors_file(tmp_path / "checkpoint.pth", golden, wrapper)
    model = VideoMAEForPreTraining.from_pretrained(source, **known)
    assert config.items() <= vars(model.config).items()
    assert not model.config.use_mean_pooling and model.config.head_norm_eps == 1e-6
    output = model(normalize(golden["frames"]), golden["bool_masked_pos"])
    check_same(f"authors' pretraining file, under {wrapper!r}", {
        "logits": (output.logits, golden["logits"]),
        "loss": (output.loss, golden["loss_normalized"]),
    })
    conv = published_state_dict(model)["videomae.embeddings.patch_embeddings.projection.weight"]
    assert torch.equal(conv, weights["encoder.patch_embed.proj.weight"])


@pytest.mark.parametrize("prefix", ["", "model."])  # the authors' files; VideoMAE V2's on the hub
def test_authors_classifier_file_and_back(prefix, tmp_path):
    golden = torch.load(GOLDEN / "mcg_nju_finetune_tiny.pt", weights_only=True)
    weights = golden["checkpoint"]["module"]
    golden["checkpoint"]["module"] = {prefix + name: x for name, x in weights.items()}
    source = authors_file(tmp_path / "checkpoint.pth", golden, "module")
    known = dict(image_size=32, num_frames=8, num_attention_heads=3)
    model = VideoMAEForVideoClassification.from_pretrained(source, **known)
    assert golden["config"].items() <= vars(model.config).items()
    logits = model(normalize(golden["frames"])).logits
    check_same("authors' classifier file", {"logits": (logits, golden["logits"])})

    model.save_pretrained(tmp_path / "saved")
    again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved")
    assert same_weights(again.state_dict(), model.state_dict())
    assert again.config.head_norm_eps == 1e-6


@pytest.mark.parametrize("name", ["small", "base", "large", "huge", "giant"])
def test_sizes_of_videomae_v2_are_inferred(name):
    """The shapes of every published size, without its memory, with the names of V2's files."""
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
    """Its own kind of config.json, "model." in front of every name, no head."""
    golden = torch.load(GOLDEN / "mcg_nju_finetune_tiny.pt", weights_only=True)
    weights = {f"model.{name}": x for name, x in golden["checkpoint"]["module"].items()
               if not name.startswith("head.")}
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
    with pytest.raises(ValueError, match="Unexpected key.*blocks.0.attn.scale"):
        VideoMAEModel.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------
# Clips of another length or size


def test_clips_of_another_length_or_size(tmp_path, caplog):
    """Positions are made anew or interpolated, as the caller says; neither is chosen in silence."""
    source = GOLDEN / "hf_pretrain_tiny"  # 8 frames of 32 x 32: a grid of (4, 4, 4)
    larger = dict(num_frames=12, image_size=(64, 32))
    with pytest.raises(ValueError, match=r"grid changes from \(4, 4, 4\) to \(6, 8, 4\)"):
        VideoMAEModel.from_pretrained(source, **larger)
    new = VideoMAEModel.from_pretrained(source, **larger, position_grid=None)
    assert torch.equal(new.positions, position_table(VideoMAEConfig(**SMALL | larger), 48))
    model = VideoMAEForPreTraining.from_pretrained(source, **larger, position_grid=(4, 4, 4))
    clip, mask = torch.randn(1, 12, 3, 64, 32), random_mask("tube", 1, (6, 8, 4), 0.75)
    assert model(clip, mask).logits.shape == (1, 144, 384)

    # Corners stay what they were; between them the table runs from one to the other.
    old = VideoMAEModel.from_pretrained(source).positions.view(4, 4, 4, 48)
    grid = model.videomae.positions.view(6, 8, 4, 48)
    for corner in np.ndindex(2, 2, 2):
        corner = tuple(-i for i in corner)
        assert torch.allclose(grid[corner], old[corner], atol=1e-6)
    same, plain = VideoMAEConfig(**SMALL, position_grid=(4, 4, 4)), VideoMAEConfig(**SMALL)
    assert torch.equal(position_table(same, 48), position_table(plain, 48))

    # They survive saving, and it is said that transformers does not know them.
    model.save_pretrained(tmp_path)
    assert "transformers does not know position_grid=(4, 4, 4)" in caplog.text
    again = VideoMAEForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(again.videomae.positions, model.videomae.positions)
    with pytest.raises(ValueError, match=r"expected \(4, 4, 4\) to interpolate"):
        VideoMAEModel.from_pretrained(tmp_path, num_frames=16)


# --------------------------------------------------------------------------------------------------
# The processor's file


def test_processor_is_saved_and_loaded(tmp_path):
    processor = VideoMAEImageProcessor.from_pretrained(GOLDEN / "hf_classify_tiny", resample=3)
    assert processor.size == {"shortest_edge": 32} and processor.resample == 3
    assert processor.crop_size == {"height": 32, "width": 32}
    assert tuple(processor.image_mean) == IMAGENET_MEAN
    processor.save_pretrained(tmp_path)
    assert VideoMAEImageProcessor.from_pretrained(tmp_path) == processor
    with pytest.raises(ValueError, match="preprocessor_config.json exists already"):
        processor.save_pretrained(tmp_path)

    theirs = pytest.importorskip("transformers.models.videomae.image_processing_pil_videomae",
                                 reason="transformers is not installed")
    theirs = theirs.VideoMAEImageProcessorPil.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    again = VideoMAEImageProcessor.from_pretrained(tmp_path / "theirs")
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 50, 3), dtype=np.uint8)
    expected = theirs(list(frames), return_tensors="pt").pixel_values
    for ours in (processor, again):
        difference = ours(frames, return_tensors="pt").pixel_values - expected
        assert difference.abs().max() < 1.01 / 255 / 0.2


# --------------------------------------------------------------------------------------------------
# Bad files: refused by name, never executed, never half written


class Bomb:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_bad_files_are_refused_by_name_and_never_executed(tmp_path):
    golden = torch.load(GOLDEN / "mcg_nju_pretrain_tiny.pt", weights_only=True)
    good = authors_file(tmp_path / "good.pth", golden, "model").read_bytes()
    tensors = (GOLDEN / "hf_pretrain_tiny/model.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit, somewhere in the weights
    bomb = Bomb(tmp_path / "executed")
    damaged = "missing, damaged, or more than plain data"
    cases = {
        "empty.pth": (b"", damaged),
        "truncated.pth": (good[: len(good) // 2], damaged),
        "flipped.pth": (bytes(flipped), "BadZipFile"),
        "text.pth": (b"<html>404 not found</html>", damaged),
        "code.pth": (pickle.dumps({"model": bomb}, 2), damaged),
        "zipped code.pth": ({"model": {"weight": bomb}}, damaged),
        "list.pth": ([torch.zeros(2)], damaged),
        "no weights.pth": ({"epoch": 3}, damaged),
        "other.pth": ({"conv.weight": torch.zeros(2)}, "expected a published VideoMAE"),
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
        assert "weights_only=False" not in shown, "no advice to run it"
    assert not (tmp_path / "executed").exists()


def test_directories_that_lack_something_are_refused(tmp_path):
    load = VideoMAEModel.from_pretrained
    with pytest.raises(ValueError, match="source: .*nowhere.pth is neither here nor on the hub"):
        load(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="preprocessor_config.json: missing, .*FileNotFoundError"):
        VideoMAEImageProcessor.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_bytes((GOLDEN / "hf_pretrain_tiny/config.json").read_bytes())
    with pytest.raises(ValueError, match="source: no model.safetensors and no pytorch_model.bin"):
        load(tmp_path)
    shutil.copy(GOLDEN / "hf_pretrain_tiny/model.safetensors", tmp_path)
    for text, message in (
        ("{", "config.json: missing, damaged, .*JSONDecodeError"),
        ("[1]", "config.json: missing, damaged, .*TypeError"),
        ('{"model_type": "vit"}', "model_type: got 'vit', expected 'videomae'"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")

    def fail_half_way(file):
        file.write(b"new, but")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(target, fail_half_way)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    write_whole(target, lambda file: file.write(b"new"))
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]

    with pytest.raises(ValueError, match="directory: .*model.pt exists already"):
        write_new(tmp_path, {"first.json": b"{}", "model.pt": b"newer"})
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]
    write_new(tmp_path / "new", {"first.json": b"{}"})
    assert (tmp_path / "new/first.json").read_bytes() == b"{}"


def test_a_function_as_activation_cannot_be_saved(tmp_path):
    model = VideoMAEModel(VideoMAEConfig(**SMALL, hidden_act=torch.tanh))
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------
# The command line and the hub


def test_command_line(tmp_path, capsys):
    golden = torch.load(GOLDEN / "mcg_nju_pretrain_tiny.pt", weights_only=True)
    good, new = authors_file(tmp_path / "good.pth", golden, "model"), tmp_path / "new"
    known = {"num_attention_heads": 3, "decoder_num_attention_heads": 2, "image_size": 32}
    command = [sys.executable, HERE / "checkpoints.py"]
    subprocess.run([*command, good, new, *(f"{name}={x}" for name, x in known.items())], check=True)
    assert sorted(file.name for file in new.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json"]
    model = VideoMAEForPreTraining.from_pretrained(new)
    logits = model(normalize(golden["frames"]), golden["bool_masked_pos"]).logits
    check_same("converted from the shell", {"logits": (logits, golden["logits"])})
    processor = VideoMAEImageProcessor.from_pretrained(new)
    assert tuple(processor.image_mean) == IMAGENET_MEAN
    assert processor.crop_size == {"height": 32, "width": 32}
    nowhere = tmp_path / "nowhere.pth"
    failed = subprocess.run([*command, nowhere], capture_output=True, text=True)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith(f"checkpoints.py: source: {nowhere} is neither here nor on")

    usage = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert "python checkpoints.py SOURCE TARGET" in usage.stderr

    for name, kind in KINDS.items():
        checkpoints.main(GOLDEN / name)
        output = capsys.readouterr().out
        assert kind.__name__ in output and "hidden_size=48" in output
    torch.save({"model": Bomb(tmp_path / "executed")}, tmp_path / "code.pth")
    broken = safetensors.load_file(new / "model.safetensors")
    broken["mask_token"][0, 0, 0] = float("nan")
    safetensors.save_file(broken, new / "model.safetensors")
    for paths, fields, message in [
        ([tmp_path / "code.pth"], {}, "or more than plain data"),
        ([new], {}, "not finite: decoder.mask_token"),
        ([new, tmp_path / "newer"], {}, "not finite: decoder.mask_token"),
        ([good], {}, "hidden_size: got 48, expected a multiple of num_attention_heads 0"),
        ([good], known | {"image_sise": 32}, "unexpected keyword argument 'image_sise'"),
        ([good, new], known, "exists already"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            checkpoints.main(*paths, **fields)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "newer").exists()


def test_hub_ids(tmp_path):
    """Downloaded from a server that answers as the hub does; then from the cache, without it."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def run(*commands, env):
        """One process, for huggingface_hub reads the environment once -> (exit status, output)."""
        lines = [list(map(str, command)) for command in commands]
        code = f"import checkpoints\nfor paths in {lines}:\n    checkpoints.main(*paths)"
        process = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=os.environ | env,
                                 capture_output=True, text=True, timeout=120)
        return process.returncode, process.stdout + process.stderr

    source = GOLDEN / "hf_classify_tiny"
    expected = safetensors.load_file(source / "model.safetensors")
    names = ("tiny", "bin")
    for name in names:
        shutil.copytree(source, tmp_path / f"hub/someone/{name}/resolve/main")
    directory = tmp_path / "hub/someone/bin/resolve/main"
    torch.save(expected, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with hub_server(tmp_path / "hub") as env:
        env["HF_HOME"] = str(tmp_path / "home")
        status, output = run(*((f"someone/{name}", tmp_path / name) for name in names), env=env)
    assert status == 0, output
    for name in names:
        weights = safetensors.load_file(tmp_path / name / "model.safetensors")
        assert same_weights(weights, expected)

    env["HF_HUB_OFFLINE"] = "1"
    status, output = run(*([f"someone/{name}"] for name in (*names, "other")), env=env)
    assert output.count(": VideoMAEForVideoClassification") == 2
    assert status == 1 and "ValueError: source: someone/other is neither here" in output


def test_a_missing_huggingface_hub_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="someone/tiny is neither here .*huggingface_hub"):
        VideoMAEModel.from_pretrained("someone/tiny")


@pytest.mark.hub
def test_published_weights():
    """The values that transformers' own tests check, on the published weights; about 1 GB."""
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


def python(code, folder):
    """Run code in a folder -> its output."""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_videomae_alone_needs_torch_and_einops_only(tmp_path):
    shutil.copy(HERE / "videomae.py", tmp_path)
    output = python("""
import sys, torch, einops
before = set(sys.modules)
sys.modules["checkpoints"] = None  # this project's, where it is installed, does not count
import videomae
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert new <= {"videomae", "checkpoints", "torch", "einops"}, new

config = videomae.VideoMAEConfig.preset("tiny")
mask = videomae.random_mask("tube", 2, config.grid, 0.75)
videomae.VideoMAEForPreTraining(config)(torch.randn(2, 8, 3, 32, 32), mask).loss.backward()
try:
    videomae.VideoMAEModel.from_pretrained("MCG-NJU/videomae-base")
except ImportError as error:
    print(videomae.__file__, error, sep="\\n")
""", tmp_path)
    file, message = output.splitlines()
    assert file == str(tmp_path / "videomae.py") and "checkpoints.py beside videomae.py" in message


def test_files_work_inside_a_package(tmp_path):
    (tmp_path / "package").mkdir()
    for name in ("videomae.py", "checkpoints.py"):
        shutil.copy(HERE / name, tmp_path / "package")
    output = python(f"""
import sys, package.videomae as videomae
model = videomae.VideoMAEForPreTraining.from_pretrained({str(GOLDEN / "hf_pretrain_tiny")!r})
model.save_pretrained("saved")
print(sorted({{"videomae", "checkpoints", "package.checkpoints"}} & set(sys.modules)))
""", tmp_path)
    assert output.strip() == "['package.checkpoints']" and (tmp_path / "saved/config.json").exists()
