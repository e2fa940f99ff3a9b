"""The proof: the same numbers as the published implementations, masks that keep their promises, errors instead of
silence, clips whose label is motion only, and a training run from start to end.

    python -m pytest -q

Needs no network. Tests that need transformers or safetensors (the test extra installs both) or the real clips in
../shared are skipped where those are missing, and say so.
"""
import argparse
import contextlib
import http.server
import json
import logging
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_tiny
import videomae
from train_tiny import MOTIONS, MotionClips, VideoClips, move_textures, split_folder
from videomae import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEModel,
    convert_state_dict,
    normalize,
    patchify,
    random_mask,
    running_cells,
    split_mask,
    unpatchify,
)

HERE = Path(__file__).parent
TOLERANCE = 1e-5  # relative, float32


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs|, over all numbers of a tensor."""
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


# ----------------------------------------------------------------------------------------------------------------------
# Same numbers as transformers, live, on random weights

SMALL = dict(image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
             intermediate_size=96, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
             decoder_intermediate_size=64)
CONFIGS = {
    "small": SMALL,
    "final norm": {**SMALL, "use_mean_pooling": False},
    "raw pixels": {**SMALL, "norm_pix_loss": False, "layer_norm_eps": 1e-6},
    "no bias, relu": {**SMALL, "qv_bias": False, "hidden_act": "relu"},
    "tubelet 4, patch 16": {**SMALL, "tubelet_size": 4, "patch_size": 16, "hidden_act": "gelu_new"},
    "one channel": {**SMALL, "num_channels": 1, "hidden_act": "selu", "use_mean_pooling": False},
    "long": {**SMALL, "num_frames": 16, "image_size": 48, "decoder_num_hidden_layers": 1},
    "wide": {**SMALL, "image_size": (32, 64), "num_attention_heads": 2, "use_mean_pooling": False},
    "no bias, raw, token 0": {**SMALL, "qv_bias": False, "norm_pix_loss": False, "use_mean_pooling": False},
    "ViT-S": dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536, decoder_hidden_size=192,
                  decoder_num_attention_heads=3, decoder_intermediate_size=768),
    "ViT-B": dict(use_mean_pooling=False),
}
FULL_SIZE = ("ViT-S", "ViT-B")


def their_model(name, kind, **fields):
    """A transformers model with weights large enough that every part of it matters, and biases that are not 0."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(len(name))
    transformers.activations.ACT2FN["selu"] = torch.nn.SELU  # documented for VideoMAE, missing there
    config = transformers.VideoMAEConfig(**{**CONFIGS[name], **fields}, attn_implementation="eager")  # shows attentions
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def check_same(theirs, ours, inputs):
    """Every output, asked for or not, and the gradient of every parameter agree; -> the largest relative error."""
    def convert(tensors):
        tensors = convert_state_dict(tensors)
        if isinstance(ours, VideoMAEModel):
            tensors = {name.removeprefix("videomae."): tensor for name, tensor in tensors.items()}
        return tensors

    ours.load_state_dict(convert(theirs.state_dict()))
    ours.eval()
    their_output, our_output = theirs(**inputs), ours(**inputs)
    names = [name for name in ("loss", "logits", "last_hidden_state") if getattr(our_output, name, None) is not None]
    errors = {name: relative_error(getattr(our_output, name), their_output[name]) for name in names}
    for output in (their_output, our_output):
        (output.loss if "loss" in names else output.last_hidden_state.square().mean()).backward()
    # Gradients are laid out as weights are, so the weights' conversion serves them too.
    their_gradients = convert({name: p.grad for name, p in theirs.named_parameters()})
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert their_gradients.keys() == our_gradients.keys()
    errors |= {name: relative_error(our_gradients[name], g) for name, g in their_gradients.items()}
    with torch.no_grad():
        more = dict(output_attentions=True, output_hidden_states=True)
        their_output, our_output = theirs(**inputs, **more), ours(**inputs, **more)
        for name in [*names, "hidden_states", "attentions"]:
            x, y = getattr(our_output, name), their_output[name]
            for i, pair in enumerate(zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]):
                errors[f"{name} {i}, all asked for"] = relative_error(*pair)
        names = [name for name in ("loss", "logits", "last_hidden_state") if name in names]
        plain = ours(**inputs, return_dict=False)
        assert type(plain) is tuple and all(torch.equal(x, getattr(ours(**inputs), name))
                                            for x, name in zip(plain, names, strict=True))
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.1e}"
    return errors[worst]


def clip_and_mask(config, batch_size=2, kind="random", mask_ratio=0.75):
    torch.manual_seed(1)
    pixel_values = torch.randn(batch_size, config.num_frames, config.num_channels, *config.image_hw)
    return pixel_values, random_mask(kind, batch_size, config.grid, mask_ratio)


@pytest.mark.parametrize("name", CONFIGS)
def test_pretraining_equals_transformers(name):
    config = VideoMAEConfig(**CONFIGS[name])
    pixel_values, mask = clip_and_mask(config, batch_size=1 if name in FULL_SIZE else 2)
    error = check_same(their_model(name, "VideoMAEForPreTraining"), VideoMAEForPreTraining(config),
                       dict(pixel_values=pixel_values, bool_masked_pos=mask))
    print(f"\npretraining, {name}: largest relative error {error:.1e}")


@pytest.mark.parametrize("name", CONFIGS)
def test_classifier_equals_transformers(name):
    config = VideoMAEConfig(**CONFIGS[name], num_labels=5)
    pixel_values, _ = clip_and_mask(config, batch_size=1 if name in FULL_SIZE else 2)
    labels = torch.arange(len(pixel_values)) + 1
    theirs = their_model(name, "VideoMAEForVideoClassification", num_labels=5)
    error = check_same(theirs, VideoMAEForVideoClassification(config), dict(pixel_values=pixel_values, labels=labels))
    print(f"\nclassifier, {name}: largest relative error {error:.1e}")


def test_regression_equals_transformers():
    config = VideoMAEConfig(**SMALL, num_labels=1)
    theirs = their_model("small", "VideoMAEForVideoClassification", num_labels=1)
    inputs = dict(pixel_values=clip_and_mask(config)[0], labels=torch.tensor([0.3, -2.0]))
    check_same(theirs, VideoMAEForVideoClassification(config), inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FULL_SIZE])
def test_encoder_equals_transformers(name, masked):
    config = VideoMAEConfig(**CONFIGS[name])
    pixel_values, mask = clip_and_mask(config)
    inputs = dict(pixel_values=pixel_values, bool_masked_pos=mask if masked else None)
    theirs = their_model(name, "VideoMAEModel")
    error = check_same(theirs, VideoMAEModel(config), inputs)
    print(f"\nencoder, {name}: largest relative error {error:.1e}")


# ----------------------------------------------------------------------------------------------------------------------
# Same numbers as the published code, from files it made (golden/)


def authors_file(path, golden, wrapper):
    """The golden weights as the authors save them: "model" beside the command line, "module", "state_dict" or bare."""
    (weights,) = golden["checkpoint"].values()
    content = {wrapper: weights, "epoch": 7, "args": argparse.Namespace(lr=1e-3)} if wrapper else weights
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", ""])
def test_pretraining_equals_the_authors_code(wrapper, tmp_path):
    golden = torch.load(HERE / "golden/mcg_nju_pretrain_tiny.pt", weights_only=True)
    known = {name: golden["config"][name] for name in
             ("image_size", "num_frames", "num_attention_heads", "decoder_num_attention_heads")}
    model = VideoMAEForPreTraining.from_pretrained(authors_file(tmp_path / "checkpoint.pth", golden, wrapper), **known)
    inferred = {name: getattr(model.config, name) for name in golden["config"]}
    assert inferred == golden["config"] and not model.config.use_mean_pooling and model.config.head_norm_eps == 1e-6
    pixel_values, mask = normalize(golden["frames"]), golden["bool_masked_pos"]
    output = model(pixel_values, mask)
    model.config.norm_pix_loss = False
    errors = {
        "encoder": relative_error(model.videomae(pixel_values, mask).last_hidden_state, golden["encoder_output"]),
        "logits": relative_error(output.logits, golden["logits"]),
        "loss": abs(output.loss.item() / golden["loss_normalized"] - 1),
        "raw loss": abs(model(pixel_values, mask).loss.item() / golden["loss_raw"] - 1),
    }
    print(f"\nauthors, pretraining: {errors}")
    assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model."])  # as in the authors' files, and as in VideoMAE V2's on the hub
def test_classifier_equals_the_authors_code(prefix, tmp_path):
    golden = torch.load(HERE / "golden/mcg_nju_finetune_tiny.pt", weights_only=True)
    golden["checkpoint"]["module"] = {prefix + name: x for name, x in golden["checkpoint"]["module"].items()}
    model = VideoMAEForVideoClassification.from_pretrained(
        authors_file(tmp_path / "checkpoint.pth", golden, "module"), image_size=32, num_frames=8, num_attention_heads=3)
    assert {name: getattr(model.config, name) for name in golden["config"]} == golden["config"]
    pixel_values = normalize(golden["frames"])
    features = model.fc_norm(model.videomae(pixel_values).last_hidden_state.mean(dim=1))
    errors = {
        "features": relative_error(features, golden["pooled_features"]),
        "logits": relative_error(model(pixel_values).logits, golden["logits"]),
    }
    print(f"\nauthors, classifier: {errors}")
    assert max(errors.values()) <= TOLERANCE


KINDS = {"hf_pretrain_tiny": VideoMAEForPreTraining, "hf_classify_tiny": VideoMAEForVideoClassification}


@pytest.mark.parametrize("name", KINDS)
def test_equals_transformers_4(name):
    golden = torch.load(HERE / f"golden/{name}/golden.pt", weights_only=True)
    model = KINDS[name].from_pretrained(HERE / "golden" / name)
    more = dict(output_hidden_states=True, output_attentions=True)
    outputs = {"": model(**golden["inputs"], **more),
               "head_mask_": model(**golden["inputs"], head_mask=golden["head_mask"])}
    errors = {key: relative_error(getattr(output, field), golden[key]) for prefix, output in outputs.items()
              for field in ("loss", "logits") if (key := prefix + field)}
    hidden_states = list(outputs[""].hidden_states)
    hidden_states[-1] = model.videomae.norm(hidden_states[-1])  # 4.57 shows the last one normalized, 5.23 does not
    for field, ours in (("hidden_states", hidden_states), ("attentions", outputs[""].attentions)):
        pairs = zip(ours, golden[field], strict=True)
        errors |= {f"{field} {i}": relative_error(*pair) for i, pair in enumerate(pairs)}
    print(f"\ntransformers 4.57, {name}: largest relative error {max(errors.values()):.1e}")
    assert max(errors.values()) <= TOLERANCE
    # A mask of ones is no mask; one row stands for every layer; only what is switched off is.
    plain = model(**golden["inputs"]).logits
    assert relative_error(model(**golden["inputs"], head_mask=torch.ones(3)).logits, plain) <= TOLERANCE
    one_row = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(model(**golden["inputs"], head_mask=one_row).logits,
                       model(**golden["inputs"], head_mask=one_row.expand(3, 3)).logits)


def test_position_table_is_the_published_one():
    """Compared with the formula of the paper's code, written out with NumPy in float64."""
    config = VideoMAEConfig()
    position, j = np.arange(1568)[:, None], np.arange(768)
    angle = position / np.power(10000, 2 * (j // 2) / 768)
    expected = np.where(j % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
    assert np.array_equal(videomae.position_table(config, 768).numpy(), expected)


def pillow_processor(**fields):
    processing = pytest.importorskip("transformers.models.videomae.image_processing_pil_videomae",
                                     reason="transformers is not installed")
    return processing.VideoMAEImageProcessorPil(**fields)


@pytest.mark.parametrize("fields", [
    {},
    dict(size={"shortest_edge": 256}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD),
    dict(size={"height": 100, "width": 130}, crop_size={"height": 96, "width": 128}),
    dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 48}, resample=3),
    dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, resample=0),
    dict(do_center_crop=False), dict(do_resize=False, crop_size={"height": 80, "width": 100}), dict(do_normalize=False),
    dict(do_rescale=False, do_normalize=False), dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1] * 3),
], ids=lambda fields: ",".join(fields) or "defaults")
def test_processor_equals_pillow(fields):
    """Against transformers' Pillow processor, within one 8-bit level and 0.01 level in the mean."""
    theirs, ours = pillow_processor(**fields), VideoMAEImageProcessor(**fields)
    level = np.array(1.0)  # one 8-bit level in the units of the result
    if ours.do_rescale:
        level = level * ours.rescale_factor
    if ours.do_normalize:
        level = level / np.array(ours.image_std).reshape(3, 1, 1)
    rng = np.random.default_rng(0)
    for height, width in [(240, 320), (500, 281), (224, 224), (113, 150)]:
        coarse = rng.integers(0, 256, (4, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        video = list(coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width])
        expected = np.asarray(theirs(video, return_tensors="np")["pixel_values"], dtype=np.float64)
        difference = np.abs(ours(video, return_tensors="np")["pixel_values"].astype(np.float64) - expected) / level
        assert difference.max() < 1.01 and difference.mean() < 0.01, (height, width)


def test_processor_takes_every_kind_of_video():
    from PIL import Image

    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (4, 3, 40, 50), dtype=np.uint8)  # (T, C, H, W)
    last = np.ascontiguousarray(video.transpose(0, 2, 3, 1))
    processor = VideoMAEImageProcessor(size=32, crop_size=32)
    expected = processor(last, return_tensors="pt").pixel_values
    assert expected.shape == (1, 4, 3, 32, 32) and expected.dtype == torch.float32
    for same in (video, torch.from_numpy(video), list(video), list(torch.from_numpy(last)), video.astype(np.int64),
                 [Image.fromarray(frame) for frame in last], [list(last)], last[None], [torch.from_numpy(video)]):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)
    channels_last = processor(last, return_tensors="np", data_format="channels_last").pixel_values
    assert np.array_equal(channels_last.transpose(0, 1, 4, 2, 3), expected.numpy())

    small = rng.integers(0, 256, (4, 33, 60, 3), dtype=np.uint8)
    batch = processor([list(last), list(small)], return_tensors="pt").pixel_values
    assert torch.equal(batch[:1], expected) and batch.shape == (2, 4, 3, 32, 32)
    lists = processor([last[:2], small], do_center_crop=False).pixel_values  # lengths and sizes may differ
    assert [x.shape for x in lists] == [(2, 3, 32, 40), (4, 3, 32, 58)]

    grey = VideoMAEImageProcessor(size=32, crop_size=32, image_mean=(0.5,), image_std=(0.5,))
    one = grey(last[..., :1], return_tensors="pt").pixel_values
    assert one.shape == (1, 4, 1, 32, 32)
    for same in (last[..., 0], [Image.fromarray(frame[..., 0]) for frame in last], video[:, :1]):
        assert torch.equal(grey(list(same), return_tensors="pt").pixel_values, one)

    # Floats in [0, 1] are not quantized: near the 8-bit path, and no two readings of three channels are confused.
    floats = processor(last / 255.0, do_rescale=False, return_tensors="pt").pixel_values
    assert (floats - expected).abs().max() < 1.6 / 255 / 0.5
    narrow = rng.integers(0, 256, (4, 3, 40, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="input_data_format"):
        processor(narrow)
    plain = VideoMAEImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    assert np.array_equal(plain(narrow, input_data_format="channels_first").pixel_values[0], narrow)
    assert np.array_equal(plain(narrow, input_data_format="channels_last").pixel_values[0],
                          narrow.transpose(0, 3, 1, 2))


def test_processor_is_saved_and_loaded(tmp_path):
    processor = VideoMAEImageProcessor.from_pretrained(HERE / "golden/hf_classify_tiny", resample=3)
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    assert tuple(processor.image_mean) == IMAGENET_MEAN and processor.resample == 3
    processor.save_pretrained(tmp_path)
    assert VideoMAEImageProcessor.from_pretrained(tmp_path) == processor
    theirs = type(pillow_processor()).from_pretrained(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 50, 3), dtype=np.uint8)
    expected = theirs(list(frames), return_tensors="pt").pixel_values
    assert (processor(frames, return_tensors="pt").pixel_values - expected).abs().max() < 1.01 / 255 / 0.2
    with pytest.raises(ValueError, match="preprocessor_config.json exists already"):
        processor.save_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Cubes and masks

sizes = st.integers(1, 4)


@given(batch=sizes, t=sizes, h=sizes, w=sizes, tubelet=st.integers(1, 3), patch=st.integers(1, 4), c=st.integers(1, 4))
@settings(deadline=None)
def test_unpatchify_undoes_patchify(batch, t, h, w, tubelet, patch, c):
    video = torch.randn(batch, t * tubelet, c, h * patch, w * patch)
    cubes = patchify(video, tubelet, patch)
    assert cubes.shape == (batch, t * h * w, tubelet * patch * patch * c)
    assert torch.equal(unpatchify(cubes, (t, h, w), tubelet, patch), video)
    # The last cube is the last corner of the clip, channels innermost.
    corner = video[:, -tubelet:, :, -patch:, -patch:].movedim(2, -1)
    assert torch.equal(cubes[:, -1], corner.flatten(1))


@given(kind=st.sampled_from(["tube", "random", "frame"]), batch=sizes, t=st.integers(2, 8), h=st.integers(2, 6),
       w=st.integers(2, 6), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_masks(kind, batch, t, h, w, ratio, seed):
    units = {"tube": h * w, "random": t * h * w, "frame": t}[kind]

    def draw():
        return random_mask(kind, batch, (t, h, w), ratio, torch.Generator().manual_seed(seed))

    if not 0 < int(ratio * units) < units:
        with pytest.raises(ValueError, match="mask_ratio"):
            draw()
        return
    mask = draw()
    assert mask.dtype == torch.bool and mask.shape == (batch, t * h * w)
    assert torch.equal(mask, draw()), "the same seed gives the same mask"
    assert (mask.sum(dim=1) == int(ratio * units) * (t * h * w // units)).all(), "the same count in every clip"
    grid = mask.view(batch, t, h * w)
    if kind == "tube":
        assert (grid == grid[:, :1]).all(), "the same places at every time"
    if kind == "frame":
        assert (grid == grid[:, :, :1]).all(), "whole frames"
    visible, masked = split_mask(mask)
    assert not mask.gather(1, visible).any() and mask.gather(1, masked).all()
    for index in (visible, masked):
        assert (index.diff(dim=1) > 0).all(), "in increasing order"


@given(batch=sizes, t=st.sampled_from([4, 8]), h=st.integers(2, 6), w=st.integers(2, 6), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_running_cells_predict_half_of_the_masked_cubes(batch, t, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    mask, cells = random_mask("tube", batch, (t, h, w), 0.5, generator), running_cells(batch, (t, h, w), generator)
    visible, predicted, others = split_mask(mask, cells)
    assert mask.gather(1, predicted).all() and 2 * predicted.shape[1] == mask[0].sum()
    every = torch.cat([visible, predicted, others], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(t * h * w).expand(batch, -1)), "every cube is in one of the lists"
    cells = cells.view(batch, t, h, w)
    assert (cells.view(batch, -1, 4, h, w).sum(dim=2) == 2).all(), "each place at two of four times"
    assert (cells[..., :2, :2].sum(dim=(2, 3)) == 2).all() and not torch.equal(cells[:, 0], cells[:, 1])


def test_with_dual_masking_the_other_hidden_cubes_play_no_part():
    config = VideoMAEConfig(**SMALL)
    model = VideoMAEForPreTraining(config)
    pixel_values, mask = clip_and_mask(config, kind="tube")
    cells = running_cells(len(mask), config.grid)
    pair = split_mask(mask, cells)
    output, cubes = model(pixel_values, pair), patchify(pixel_values, 2, 8)
    noise = torch.where((mask & ~cells)[..., None], torch.randn_like(cubes), cubes)
    assert torch.equal(model(unpatchify(noise, config.grid, 2, 8), pair).loss, output.loss)
    target = model.target(cubes[mask & cells].view(len(mask), -1, config.cube_size))
    assert torch.allclose(output.loss, (output.logits - target).square().mean())
    encoded = model.videomae(pixel_values, pair).last_hidden_state
    assert torch.equal(encoded, model.videomae(pixel_values, mask).last_hidden_state), "the encoder sees what it would"


def test_every_tube_is_masked_equally_often():
    masks = random_mask("tube", 4000, (2, 4, 4), 0.75, torch.Generator().manual_seed(0))
    assert ((masks.float().mean(dim=0) - 0.75).abs() < 0.03).all()


def test_encoder_does_not_see_masked_pixels_and_loss_does_not_see_visible_ones():
    config = VideoMAEConfig(**SMALL)
    model = VideoMAEForPreTraining(config)
    pixel_values, mask = clip_and_mask(config, kind="tube")
    cubes = patchify(pixel_values, 2, 8)
    noise = torch.randn_like(cubes)
    hidden_changed = unpatchify(torch.where(mask[..., None], noise, cubes), config.grid, 2, 8)
    visible_changed = unpatchify(torch.where(mask[..., None], cubes, noise), config.grid, 2, 8)
    output = model(pixel_values, mask)
    assert torch.equal(model(hidden_changed, mask).logits, output.logits)
    target = model.target(cubes[mask].view(2, -1, config.cube_size))
    other = model(visible_changed, mask)
    assert torch.allclose(other.loss, (other.logits - target).square().mean())


def test_reconstruction_keeps_visible_pixels_and_draws_predictions():
    """With the truth as prediction, the picture is the original: the normalization is undone exactly."""
    for norm_pix_loss in (True, False):
        config = VideoMAEConfig(**{**SMALL, "norm_pix_loss": norm_pix_loss})
        model = VideoMAEForPreTraining(config)
        frames = torch.randint(256, (2, 8, 3, 32, 32), dtype=torch.uint8)
        pixel_values = normalize(frames)
        mask = random_mask("tube", 2, config.grid, 0.75)
        truth = model.target(patchify(pixel_values, 2, 8)[mask].view(2, -1, config.cube_size))
        model.decoder.forward = lambda *_, truth=truth: truth
        pictures = model.reconstruct(pixel_values, mask)
        assert torch.allclose(pictures.original, frames / 255, atol=1e-5)
        assert torch.allclose(pictures.reconstruction, pictures.original, atol=1e-5)
        assert torch.equal(patchify(pictures.masked, 2, 8)[~mask], patchify(pictures.original, 2, 8)[~mask])
        assert (patchify(pictures.masked, 2, 8)[mask] == 0.5).all()
        assert pictures.borrows_truth == norm_pix_loss


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    block = VideoMAEModel(VideoMAEConfig(**SMALL, drop_path_rate=0.5)).blocks[-1]
    x = torch.ones(4000, 1, 1)
    dropped = block.branch(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean().item() - 1) < 0.06
    assert torch.equal(block.eval().branch(x), x)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: every format in, transformers' out, nothing lost and nothing made up in silence


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("name", KINDS)
def test_transformers_to_ours_and_back_is_bit_exact(name, tmp_path):
    model = KINDS[name].from_pretrained(HERE / "golden" / name)
    model.save_pretrained(tmp_path / "saved")
    assert same_weights(load_safetensors(tmp_path / "saved/model.safetensors"),
                        load_safetensors(HERE / "golden" / name / "model.safetensors"))
    before, after = (json.loads((folder / "config.json").read_text())
                     for folder in (HERE / "golden" / name, tmp_path / "saved"))
    assert before.items() <= after.items(), "every field of the file, known here or not"
    again = KINDS[name].from_pretrained(tmp_path / "saved", extra={"mine": 3})
    assert again.config.extra.pop("mine") == 3
    again = KINDS[name].from_pretrained(tmp_path / "saved/model.safetensors")  # the config beside it is used
    assert again.config.to_dict() == model.config.to_dict()
    assert same_weights(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="model.safetensors exists already"):
        model.save_pretrained(tmp_path / "saved")


def test_authors_to_transformers_and_back_is_bit_exact(tmp_path):
    golden = torch.load(HERE / "golden/mcg_nju_finetune_tiny.pt", weights_only=True)
    source = authors_file(tmp_path / "checkpoint.pth", golden, "module")
    known = dict(image_size=32, num_frames=8, num_attention_heads=3)
    ours = VideoMAEForVideoClassification.from_pretrained(source, **known)
    ours.save_pretrained(tmp_path / "saved")
    again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved")
    assert same_weights(again.state_dict(), ours.state_dict()) and again.config.head_norm_eps == 1e-6
    # An authors' pretraining file too, with the order of the cubes' numbers undone and redone.
    golden = torch.load(HERE / "golden/mcg_nju_pretrain_tiny.pt", weights_only=True)
    source = authors_file(tmp_path / "pretrain.pth", golden, "model")
    known = dict(image_size=32, num_frames=16, num_attention_heads=3, decoder_num_attention_heads=2)
    ours = VideoMAEForPreTraining.from_pretrained(source, **known)
    conv = videomae.published_state_dict(ours)["videomae.embeddings.patch_embeddings.projection.weight"]
    assert torch.equal(conv, golden["checkpoint"]["model"]["encoder.patch_embed.proj.weight"])


@pytest.mark.parametrize("kind", ["VideoMAEModel", "VideoMAEForPreTraining", "VideoMAEForVideoClassification"])
def test_transformers_loads_what_is_saved_here(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = VideoMAEConfig(**SMALL, num_labels=3, id2label={0: "walk", 1: "run", 2: "jump"}, extra={"mine": [1, 2]})
    ours = getattr(videomae, kind)(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert theirs.config.id2label == config.id2label and theirs.config.mine == [1, 2]
    pixel_values, mask = clip_and_mask(config)
    inputs = [pixel_values] + [mask] * (kind == "VideoMAEForPreTraining")
    error = relative_error(ours(*inputs, return_dict=False)[0], theirs(*inputs)[0])
    print(f"\nsaved here, read by transformers, {kind}: relative error {error:.1e}")
    assert error <= TOLERANCE
    # What transformers 5 writes itself, with its own spelling of the biases, comes back as it went.
    theirs.save_pretrained(tmp_path / "theirs")
    again = getattr(videomae, kind).from_pretrained(tmp_path / "theirs")
    assert same_weights(again.state_dict(), ours.state_dict()) and again.config.id2label == config.id2label


def test_both_bias_spellings_shards_and_bin_files(tmp_path):
    """The same classifier from five kinds of directory; a missing shard is named."""
    from safetensors.torch import save_file

    golden = HERE / "golden/hf_classify_tiny"
    weights = load_safetensors(golden / "model.safetensors")
    new = {n.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): x for n, x in weights.items()}
    assert new.keys() != weights.keys()
    names = sorted(weights)
    for folder in ("spelling", "bin", "shards", "bin-shards"):
        (tmp_path / folder).mkdir()
        config = json.loads((golden / "config.json").read_text())
        if folder == "spelling":
            config["qv_bias"] = config.pop("qkv_bias")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    save_file(new, tmp_path / "spelling/model.safetensors")
    torch.save(weights, tmp_path / "bin/pytorch_model.bin")
    for folder, whole, save in (("shards", "model.safetensors", save_file),
                                ("bin-shards", "pytorch_model.bin", torch.save)):
        stem, suffix = whole.split(".")
        files = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
        for file, part in files.items():
            save({name: weights[name] for name in part}, tmp_path / folder / file)
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (tmp_path / folder / f"{whole}.index.json").write_text(json.dumps(index))
    expected = VideoMAEForVideoClassification.from_pretrained(golden).state_dict()
    for folder in ("spelling", "bin", "shards", "bin-shards"):
        model = VideoMAEForVideoClassification.from_pretrained(tmp_path / folder)
        assert same_weights(model.state_dict(), expected), folder
    (tmp_path / "shards/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors, which .* names, is missing"):
        VideoMAEForVideoClassification.from_pretrained(tmp_path / "shards")


def test_every_weight_is_used_or_named(tmp_path, caplog):
    """A new head and a dropped decoder are said in one line each; anything else out of place is one error."""
    golden = HERE / "golden/hf_pretrain_tiny"
    with caplog.at_level(logging.WARNING, "videomae"):
        pretrained = VideoMAEForPreTraining.from_pretrained(golden)
        assert not caplog.messages
        model = VideoMAEForVideoClassification.from_pretrained(golden, num_labels=7, use_mean_pooling=True)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].endswith("new, to be trained: classifier, fc_norm")
    assert caplog.messages[1].endswith("not used: decoder, decoder.blocks, decoder.encoder_to_decoder, decoder.head, "
                                       "decoder.norm, videomae.norm")
    assert model.config.num_labels == 7 and not model.training
    encoder = {name: x for name, x in pretrained.videomae.state_dict().items() if not name.startswith("norm.")}
    assert same_weights(model.videomae.state_dict(), encoder)
    assert same_weights(VideoMAEModel.from_pretrained(golden).state_dict(), pretrained.videomae.state_dict())

    caplog.clear()
    with caplog.at_level(logging.WARNING, "videomae"):
        model = VideoMAEForVideoClassification.from_pretrained(HERE / "golden/hf_classify_tiny", num_labels=9)
    assert len(caplog.messages) == 2 and model.classifier.out_features == 9 and model.config.id2label is None
    with pytest.raises(ValueError, match="does not fit VideoMAEForPreTraining: missing: decoder.blocks.0"):
        VideoMAEForPreTraining.from_pretrained(HERE / "golden/hf_classify_tiny")

    weights = load_safetensors(golden / "model.safetensors")
    weights["mask_tokens"] = weights.pop("mask_token")
    weights["decoder.norm.bias"] = weights["decoder.norm.bias"][:5]
    del weights["videomae.encoder.layer.1.attention.attention.v_bias"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    shutil.copy(golden / "config.json", tmp_path)
    with pytest.raises(ValueError) as error:
        VideoMAEForPreTraining.from_pretrained(tmp_path)
    assert str(error.value).endswith(
        "missing: decoder.mask_token, videomae.blocks.1.attn.v_bias; unexpected: decoder.mask_tokens; "
        "of another shape: decoder.norm.bias (5,) instead of (32,)")
    with pytest.raises(TypeError, match="config_overrides: num_frame is no field"):
        VideoMAEModel.from_pretrained(golden, num_frame=8)


V2 = dict(small=(384, 12, 6), base=(768, 12, 12), large=(1024, 24, 16), huge=(1280, 32, 16), giant=(1408, 40, 16))


@pytest.mark.parametrize("name", V2)
def test_sizes_of_videomae_v2_are_inferred(name):
    """The shapes of every published size, without its memory, in the layout of VideoMAE V2's files."""
    width, depth, heads = V2[name]
    patch_size, hidden = (14, 6144) if name == "giant" else (16, 4 * width)
    shapes = {"patch_embed.proj.weight": (width, 3, 2, patch_size, patch_size), "patch_embed.proj.bias": (width,),
              "fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (710, width), "head.bias": (710,)}
    for i in range(depth):
        block = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.q_bias": (width,), "attn.v_bias": (width,),
                 "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
                 "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (hidden, width),
                 "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    state_dict = {f"model.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = videomae.infer_config(state_dict)
    assert config.num_attention_heads == heads and config.num_labels == 710 and config.use_mean_pooling
    preset = VideoMAEConfig.preset(name)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"):
        assert getattr(config, field) == getattr(preset, field), field
    with torch.device("meta"):
        model = VideoMAEForVideoClassification(config)
    expected = {key: x.shape for key, x in model.state_dict().items()}
    assert {key: x.shape for key, x in convert_state_dict(state_dict).items()} == expected


def test_videomae_v2_directory_of_the_hub(tmp_path):
    """Its own kind of config.json, a "model." in front of every name, no head. Cosine attention is refused."""
    from safetensors.torch import save_file

    golden = torch.load(HERE / "golden/mcg_nju_finetune_tiny.pt", weights_only=True)
    weights = {f"model.{n}": x for n, x in golden["checkpoint"]["module"].items() if not n.startswith("head.")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "VideoMAEv2_Base", "model_config": {"img_size": 32, "num_frames": 8, "num_heads": 3}}))
    model = VideoMAEForVideoClassification.from_pretrained(tmp_path)
    features = model.fc_norm(model.videomae(normalize(golden["frames"])).last_hidden_state.mean(dim=1))
    error = relative_error(features, golden["pooled_features"])
    print(f"\nlayout of VideoMAE V2's hub directories, features: relative error {error:.1e}")
    assert error <= TOLERANCE
    save_file({**weights, "model.blocks.0.attn.scale": torch.ones(3, 1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="blocks.0.attn.scale belongs to a model with cosine attention"):
        VideoMAEModel.from_pretrained(tmp_path)


class Bomb:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def bad_files(tmp_path):
    """name -> (file, what is said of it)."""
    golden = torch.load(HERE / "golden/mcg_nju_pretrain_tiny.pt", weights_only=True)
    good = authors_file(tmp_path / "good.pth", golden, "model").read_bytes()
    safetensors = (HERE / "golden/hf_pretrain_tiny/model.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit, somewhere in the weights
    contents = {
        "empty.pth": (b"", "not a checkpoint that can be read"),
        "truncated.pth": (good[: len(good) // 2], "not a checkpoint that can be read"),
        "flipped.pth": (bytes(flipped), "does not match its checksum"),
        "text.pth": (b"<html>404 not found</html>", "not a checkpoint that can be read"),
        "code.pth": (pickle.dumps({"model": Bomb(tmp_path / "executed")}, 2), "system, which is not executed"),
        "truncated.safetensors": (safetensors[: len(safetensors) // 2], "not a whole safetensors file"),
        "text.safetensors": (b"not tensors", "not a whole safetensors file"),
    }
    files = {}
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        files[name] = tmp_path / name, message
    torch.save({"model": {"weight": Bomb(tmp_path / "executed")}}, tmp_path / "zipped code.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "no weights.pth")
    return files | {"zipped code.pth": (tmp_path / "zipped code.pth", "system, which is not executed"),
                    "list.pth": (tmp_path / "list.pth", "holds no state dict"),
                    "no weights.pth": (tmp_path / "no weights.pth", "holds no state dict")}


def test_bad_files_are_refused_by_name_and_never_executed(bad_files, tmp_path):
    for name, (file, message) in bad_files.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            VideoMAEForPreTraining.from_pretrained(file)
        assert name in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="source: nowhere.pth is not a file, a directory or a hub id"):
        VideoMAEModel.from_pretrained("nowhere.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="source: there is no config.json in"):
        VideoMAEModel.from_pretrained(tmp_path / "empty")
    shutil.copy(HERE / "golden/hf_pretrain_tiny/config.json", tmp_path / "empty")
    with pytest.raises(ValueError, match="source: no model.safetensors and no pytorch_model.bin"):
        VideoMAEModel.from_pretrained(tmp_path / "empty")


def videomae_command(*arguments, env=None):
    """python videomae.py ... -> (exit status, stdout + stderr)."""
    process = subprocess.run([sys.executable, HERE / "videomae.py", *map(str, arguments)], capture_output=True,
                             text=True, timeout=120, env={**os.environ, **(env or {})})
    return process.returncode, process.stdout + process.stderr


def test_inspect_and_convert_from_the_shell(bad_files, tmp_path):
    for name, kind in KINDS.items():
        status, output = videomae_command("inspect", HERE / "golden" / name)
        assert status == 0 and kind.__name__ in output and "none all zero" in output, output
    known = ["num_attention_heads=3", "decoder_num_attention_heads=2", "image_size=32"]
    status, output = videomae_command("convert", tmp_path / "good.pth", tmp_path / "new", *known)
    assert status == 0 and {file.name for file in (tmp_path / "new").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json"}, output
    golden = torch.load(HERE / "golden/mcg_nju_pretrain_tiny.pt", weights_only=True)
    model = VideoMAEForPreTraining.from_pretrained(tmp_path / "new")
    logits = model(normalize(golden["frames"]), golden["bool_masked_pos"]).logits
    assert relative_error(logits, golden["logits"]) <= TOLERANCE
    assert tuple(VideoMAEImageProcessor.from_pretrained(tmp_path / "new").image_mean) == IMAGENET_MEAN
    for arguments, message in [(("inspect", tmp_path / "code.pth"), "which is not executed"),
                               (("convert", tmp_path / "good.pth", tmp_path / "new", *known), "exists already"),
                               (("inspect", tmp_path / "good.pth"), "num_attention_heads: a width of 48")]:
        status, output = videomae_command(*arguments)
        assert status == 1 and message in output and "Traceback" not in output, output
    assert not (tmp_path / "executed").exists()


@contextlib.contextmanager
def hub_server(folder):
    """A server on this machine that answers as the hub does: folder/owner/name/resolve/main/file -> the environment."""
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            file = folder / self.path.lstrip("/")
            body = file.read_bytes() if file.is_file() else b""
            self.send_response(200 if file.is_file() else 404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
           "no_proxy": "127.0.0.1"}
    server.shutdown()
    server.server_close()


def test_hub_ids(tmp_path):
    """Downloaded from a server that answers as the hub does; then from the cache, without any server."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    shutil.copytree(HERE / "golden/hf_classify_tiny", tmp_path / "hub/someone/tiny/resolve/main")
    with hub_server(tmp_path / "hub") as env:
        env["HF_HOME"] = str(tmp_path / "home")
        status, output = videomae_command("convert", "someone/tiny", tmp_path / "new", env=env)
    assert status == 0, output
    assert same_weights(load_safetensors(tmp_path / "new/model.safetensors"),
                        load_safetensors(HERE / "golden/hf_classify_tiny/model.safetensors"))
    status, output = videomae_command("inspect", "someone/tiny", env=env | {"HF_HUB_OFFLINE": "1"})
    assert status == 0, output
    status, output = videomae_command("inspect", "someone/other", env=env | {"HF_HUB_OFFLINE": "1"})
    assert status == 1 and "someone/other is no file or directory here" in output and "Traceback" not in output


def test_without_safetensors_or_the_hub_it_is_said_what_to_install(monkeypatch):
    for package, source in (("safetensors", HERE / "golden/hf_pretrain_tiny"), ("huggingface_hub", "someone/tiny")):
        for module in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"pip install {package}"):
            VideoMAEModel.from_pretrained(source)


@pytest.mark.hub
def test_published_weights():
    """The values that transformers' own tests check, on the published weights. About 1 GB is downloaded."""
    from huggingface_hub import hf_hub_download

    video = np.load(hf_hub_download("hf-internal-testing/spaghetti-video", "eating_spaghetti.npy", repo_type="dataset"))
    pixel_values = VideoMAEImageProcessor()(list(video), return_tensors="pt").pixel_values
    model = VideoMAEForVideoClassification.from_pretrained("MCG-NJU/videomae-base-finetuned-kinetics")
    logits = model(pixel_values).logits
    assert logits.shape == (1, 400)
    assert torch.allclose(logits[0, :3], torch.tensor([0.3669, -0.0688, -0.2421]), atol=2e-4)
    mask = torch.load(hf_hub_download("hf-internal-testing/bool-masked-pos", "bool_masked_pos.pt"), weights_only=True)
    expected = torch.tensor([[0.7994, 0.9612, 0.8508], [0.7401, 0.8958, 0.8302], [0.5862, 0.7468, 0.7325]])
    for norm_pix_loss, loss in ((True, 0.5142), (False, 0.6469)):
        model = VideoMAEForPreTraining.from_pretrained("MCG-NJU/videomae-base-short", norm_pix_loss=norm_pix_loss)
        output = model(pixel_values, mask.view(1, -1))
        assert output.logits.shape == (1, 1408, 1536) and abs(output.loss.item() - loss) < 1e-4
        if norm_pix_loss:
            assert torch.allclose(output.logits[0, :3, :3], expected, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Beyond the published interface


def test_clips_of_another_length_or_size():
    """Positions are made anew or interpolated, as the caller names it; neither is chosen in silence."""
    golden = HERE / "golden/hf_pretrain_tiny"  # 8 frames of 32 x 32: a grid of (4, 4, 4)
    pixel_values = torch.randn(1, 12, 3, 64, 32)
    larger = dict(num_frames=12, image_size=(64, 32))
    with pytest.raises(ValueError, match=r"position_grid: the clips' grid changes from \(4, 4, 4\) to \(6, 8, 4\)"):
        VideoMAEModel.from_pretrained(golden, **larger)
    new = VideoMAEModel.from_pretrained(golden, **larger, position_grid=None)
    assert torch.equal(new.positions, videomae.position_table(VideoMAEConfig(**{**SMALL, **larger}), 48))
    interpolated = VideoMAEForPreTraining.from_pretrained(golden, **larger, position_grid=(4, 4, 4))
    old = VideoMAEModel.from_pretrained(golden).positions.view(4, 4, 4, 48)
    grid = interpolated.videomae.positions.view(6, 8, 4, 48)
    corners = torch.tensor([0, -1])
    for axis in range(3):  # corners stay what they were; between them the table runs from one to the other
        old, grid = (table.index_select(axis, corners % table.shape[axis]) for table in (old, grid))
    assert torch.allclose(grid, old, atol=1e-6)
    assert new(pixel_values).last_hidden_state.shape == (1, 192, 48)
    mask = random_mask("tube", 1, (6, 8, 4), 0.75)
    assert interpolated(pixel_values, mask).logits.shape == (1, 144, 384)
    assert torch.equal(videomae.position_table(VideoMAEConfig(**SMALL, position_grid=(4, 4, 4)), 48),
                       videomae.position_table(VideoMAEConfig(**SMALL), 48))


def test_interpolated_positions_survive_saving(tmp_path, caplog):
    golden = HERE / "golden/hf_pretrain_tiny"
    model = VideoMAEModel.from_pretrained(golden, num_frames=12, position_grid=(4, 4, 4))
    with caplog.at_level(logging.WARNING, "videomae"):
        model.save_pretrained(tmp_path)
    assert "transformers does not know position_grid=(4, 4, 4)" in caplog.messages[-1]
    assert torch.equal(VideoMAEModel.from_pretrained(tmp_path).positions, model.positions)
    with pytest.raises(ValueError, match=r"expected position_grid=\(4, 4, 4\) to interpolate"):
        VideoMAEModel.from_pretrained(tmp_path, num_frames=16)


def test_pretraining_step_compiles_to_one_graph_and_reads_no_value_back():
    """fullgraph=True refuses a graph break. Fake tensors have no values: code that reads one, as a copy from a GPU
    would, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = VideoMAEConfig(**SMALL, use_mean_pooling=False, drop_path_rate=0.1)
    model = VideoMAEForPreTraining(config).eval()
    pixel_values, mask = clip_and_mask(config, kind="tube")
    expected = model(pixel_values, mask).loss
    expected.backward()
    gradient = model.videomae.embed.weight.grad.clone()
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values, split_mask(mask)).loss
    loss.backward()
    assert relative_error(loss, expected) <= TOLERANCE
    assert relative_error(model.videomae.embed.weight.grad, gradient) <= TOLERANCE

    model.train()
    pair = split_mask(mask)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        pixel_values, mask, *pair = (fake.from_tensor(x) for x in (pixel_values, mask, *pair))
        model(pixel_values, tuple(pair)).loss.backward()
        with pytest.raises(Exception, match="_local_scalar_dense|data-dependent|nonzero"):
            model(pixel_values, mask)


def test_classifier_is_exported():
    """torch.export with any batch size; the program gives the model's numbers."""
    model = VideoMAEForVideoClassification(VideoMAEConfig(**SMALL, num_labels=5)).eval()
    pixel_values, _ = clip_and_mask(model.config, batch_size=3)
    program = torch.export.export(model, (pixel_values[:2],), dynamic_shapes={
        "pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}})
    assert torch.allclose(program.module()(pixel_values).logits, model(pixel_values).logits, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: an error that names the argument, before any work is done


@pytest.mark.parametrize("fields, named", [
    (dict(image_size=30), "image_size"), (dict(image_size=224.0), "image_size"),
    (dict(num_frames=15), "num_frames"), (dict(hidden_size=100), "hidden_size"),
    (dict(decoder_hidden_size=100), "decoder_hidden_size"), (dict(num_channels=0), "num_channels"),
    (dict(num_hidden_layers=2.0), "num_hidden_layers"), (dict(hidden_act="swish"), "hidden_act"),
    (dict(hidden_dropout_prob=1.5), "hidden_dropout_prob"), (dict(layer_norm_eps=0), "layer_norm_eps"),
    (dict(position_embedding="learned"), "position_embedding"), (dict(drop_path_rate=-0.1), "drop_path_rate"),
])
def test_config_names_the_bad_field(fields, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        VideoMAEConfig(**fields)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: got 'giant2', expected one of small, base"):
        VideoMAEConfig.preset("giant2")


def test_models_refuse_wrong_inputs():
    config = VideoMAEConfig(**SMALL)
    model = VideoMAEForPreTraining(config)
    clip, mask = clip_and_mask(config)
    uneven = mask.clone()
    first_masked = mask[0].nonzero()[0, 0]
    uneven[0, first_masked], uneven[1, (~mask[1]).nonzero()[0, 0]] = False, True  # the total still divides
    cases = [
        ((clip.to(torch.uint8), mask), TypeError, "pixel_values: got torch.uint8"),
        ((clip.numpy(), mask), TypeError, "pixel_values: got ndarray"),
        ((clip.transpose(1, 2), mask), ValueError, "pixel_values: got shape"),
        ((clip[:, :, :1], mask), ValueError, "pixel_values: got shape"),
        ((clip[:, :6], mask), ValueError, "pixel_values: got shape"),
        ((clip[..., :24], mask), ValueError, "pixel_values: got shape"),
        ((clip[0], mask), ValueError, "pixel_values: got shape"),
        ((clip, mask.int()), TypeError, "bool_masked_pos: got torch.int32"),
        ((clip, None), TypeError, "bool_masked_pos: got NoneType"),
        ((clip, mask[:1]), ValueError, "bool_masked_pos: got 64 cubes for 1 clips"),
        ((clip, mask.repeat(1, 2)), ValueError, "bool_masked_pos: got 128 cubes for 2 clips"),
        ((clip, split_mask(mask[:1])), ValueError, "bool_masked_pos: got 64 cubes for 1 clips"),
        ((clip, mask[0]), ValueError, "bool_masked_pos: got shape"),
        ((clip, mask, torch.ones(2)), ValueError, "head_mask: got shape"),
        ((clip, uneven), ValueError, r"bool_masked_pos: got \[47, 49\] masked cubes"),
        ((clip, torch.ones_like(mask)), ValueError, "bool_masked_pos: every cube"),
        ((clip, torch.zeros_like(mask)), ValueError, "bool_masked_pos: no cube"),
    ]
    for inputs, error, message in cases:
        with pytest.raises(error, match=message):
            model(*inputs)
    with pytest.raises(ValueError, match="labels: got torch.float32"):
        VideoMAEForVideoClassification(config)(clip, labels=torch.zeros(2))
    with pytest.raises(ValueError, match="labels: got torch.int64 .* regression"):
        VideoMAEForVideoClassification(replace(config, num_labels=1))(clip, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="frames: got torch.float32"):
        normalize(clip)
    with pytest.raises(ValueError, match="state_dict: no cube embedding"):
        convert_state_dict({"model": clip})
    with pytest.raises(ValueError, match="kind: got 'checkerboard'"):
        random_mask("checkerboard", 2, config.grid, 0.75)
    with pytest.raises(ValueError, match="grid: got 2 cubes in time"):
        running_cells(2, (2, 4, 4))
    cells = running_cells(2, config.grid)
    with pytest.raises(ValueError, match="bool_masked_pos and predicted: got .* masked cubes per clip"):
        split_mask(random_mask("random", 2, config.grid, 0.75), cells)
    with pytest.raises(ValueError, match="predicted: got torch.int32"):
        split_mask(mask, cells.int())
    for lost in ((0, 1), (1, 2)):  # as much as if the clip were shorter
        with pytest.raises(ValueError, match="bool_masked_pos: got .* for 2 clips"):
            parts = split_mask(random_mask("tube", 2, config.grid, 0.75), cells)
            model(clip, tuple(parts[i] for i in lost))


def test_processor_refuses_wrong_inputs():
    from PIL import Image

    processor = VideoMAEImageProcessor(size=32, crop_size=32)
    frame = np.zeros((40, 50, 3), dtype=np.uint8)
    cases = [
        ([], {}, ValueError, "videos: got list, expected one video or several"),
        (frame, {}, ValueError, "videos: got one image"),
        ([frame == 0] * 4, {}, TypeError, "videos: got frames of torch.bool"),
        ([frame + 0.5] * 4, {}, ValueError, "do_rescale: got float frames within"),
        ([frame.astype(int) + 256] * 4, {}, ValueError, "videos: got integers from 256 to 256"),
        ([frame[..., :2]] * 4, {}, ValueError, r"videos: got frames of shape \(40, 50, 2\), expected 1 or 3"),
        ([frame] * 4, dict(input_data_format="channels_first"), ValueError, "videos: got frames of shape"),
        ([frame, frame[:30]], {}, ValueError, r"videos: got frames of shapes \[\(30, 50, 3\), \(40, 50, 3\)\]"),
        ([[frame] * 4, [frame] * 3], dict(return_tensors="pt"), ValueError, "videos: got clips that end as"),
        ([Image.fromarray(frame).convert("P")] * 4, {}, ValueError, "videos: got a PIL image of mode P"),
        ([frame[..., :1]] * 4, {}, ValueError, "image_mean: got .* for frames of 1 channels"),
        ([frame] * 4, dict(crop_size=48), ValueError, "crop_size: 48 x 48"),
        ([frame] * 4, dict(resample=1), ValueError, "resample: got 1"),
        ([frame] * 4, dict(size={"longest_edge": 3}), ValueError, "size: got"),
        ([frame] * 4, dict(return_tensors="tf"), ValueError, "return_tensors: got 'tf'"),
        ([frame] * 4, dict(data_format="NCHW"), ValueError, "data_format: got 'NCHW'"),
    ]
    for videos, options, error, message in cases:
        with pytest.raises(error, match=message):
            processor(videos, **options)


# ----------------------------------------------------------------------------------------------------------------------
# The embedded clips: the label is the motion, and no single frame gives it away

TINY = VideoMAEConfig.preset("tiny")


def test_the_middle_frame_does_not_depend_on_the_label():
    """The same draws with another label: the middle frame is the same to the last bit, the others are not."""
    textures = train_tiny.make_textures(8, 64, torch.Generator().manual_seed(0))
    clips = torch.stack([
        move_textures(textures, torch.full((64,), label), 8, 32, torch.Generator().manual_seed(1))
        for label in range(len(MOTIONS))
    ])  # (8, 64, T, 3, H, W)
    middle = TINY.num_frames // 2
    assert (clips[:, :, middle] == clips[:1, :, middle]).all()
    for frame in set(range(TINY.num_frames)) - {middle}:
        assert all((clips[i, :, frame] != clips[j, :, frame]).any() for i in range(8) for j in range(i))


def test_a_single_frame_gives_at_most_zoom_in_from_zoom_out_away():
    """The best cue in one frame is how fine it is. Learned on other clips, it says nothing of the middle frame, and of
    the first frame less than a zoom's direction for the two zooms would (2 of 8 classes more than chance)."""
    train_clips, test_clips = MotionClips(3000, TINY, seed=11), MotionClips(3000, TINY, seed=12)

    def fineness(clips, frame):
        return (clips.clips[:, frame].float().diff(dim=-1).square().mean(dim=(1, 2, 3)) + 1).log()

    top1 = {}
    for frame in (0, TINY.num_frames // 2):
        energy, test_energy = fineness(train_clips, frame), fineness(test_clips, frame)
        edges = energy.quantile(torch.linspace(0, 1, 21)[1:-1])  # 20 bins, each with its most frequent label
        counts = torch.zeros(20, len(MOTIONS))
        counts.index_put_((torch.bucketize(energy, edges), train_clips.labels), torch.ones(3000), accumulate=True)
        predictions = counts.argmax(dim=1)[torch.bucketize(test_energy, edges)]
        top1[frame] = train_tiny.percent(predictions == test_clips.labels)
    print(f"\ntop-1 from the fineness of one frame: {top1}")
    assert top1[TINY.num_frames // 2] < 15.5 and top1[0] < 30


def motion_by_optical_flow(clips):
    """(B, T, C, H, W) uint8 -> (B,) MOTIONS index, without learning: least squares of I_t + u . grad I = 0.

    u = shift + rotation * (-y, x) + zoom * (x, y); each part is compared with the slowest motion of its kind.
    """
    video = clips.float()
    average = (video[:, 1:] + video[:, :-1]) / 2
    dt = (video[:, 1:] - video[:, :-1])[..., 1:-1, 1:-1]
    dx = (average[..., 1:-1, 2:] - average[..., 1:-1, :-2]) / 2
    dy = (average[..., 2:, 1:-1] - average[..., :-2, 1:-1]) / 2
    y, x = torch.meshgrid(torch.arange(30) - 14.5, torch.arange(30) - 14.5, indexing="ij")
    # A motion about another centre is the same rotation or zoom plus a shift, so the shift is free here.
    columns = torch.stack([dx, dy, dy * x - dx * y, dx * x + dy * y], dim=-1)
    solution = torch.linalg.lstsq(columns.flatten(1, -2), -dt.flatten(1)[..., None]).solution[..., 0]
    shift_x, shift_y, rotation, zoom = solution.unbind(dim=1)
    turning = torch.stack([rotation, -rotation, zoom * 2.2, -zoom * 2.2], dim=1)  # zooms are 0.5 as fast as turns
    straight = torch.stack([-shift_x, shift_x, -shift_y, shift_y], dim=1)
    strongest, turn = turning.max(dim=1)
    return torch.where(strongest > 0.1, 4 + turn, straight.argmax(dim=1))


def test_motion_gives_the_label_and_reversed_clips_have_the_opposite_one():
    clips = MotionClips(1000, TINY, seed=3)
    opposite = clips.labels ^ 1
    right = (motion_by_optical_flow(clips.clips) == clips.labels).float().mean()
    reversed_right = (motion_by_optical_flow(clips.clips.flip(1)) == opposite).float().mean()
    assert right > 0.7 and reversed_right > 0.7, (right, reversed_right)


def test_a_network_reads_the_motion_and_not_the_middle_frame(monkeypatch, tmp_path):
    """Trained on whole clips it knows the motions: of a clip run backwards it says the opposite, of the middle frame
    held still it knows nothing. The textures repeat sooner than train_tiny.py's, so that it learns in seconds."""
    make_textures = train_tiny.make_textures
    monkeypatch.setattr(train_tiny, "make_textures", lambda count, size, generator:
                        make_textures(count, size // 2, generator).tile(2, 2))
    clips, test_clips = MotionClips(3000, TINY, seed=4), MotionClips(512, TINY, seed=5)
    config = VideoMAEConfig.preset("tiny", num_labels=len(MOTIONS))
    recipe = train_tiny.RECIPES["embedded"] | {"recolour": False}
    run = train_tiny.Run(tmp_path, 0, recipe, torch.device("cpu"))
    model = VideoMAEForVideoClassification(config)
    train_tiny.finetune(run, clips, torch.arange(3000), model, "test", 250, 8e-3, 1.0)
    moving = train_tiny.percent(train_tiny.probabilities(model, test_clips, "cpu").argmax(dim=1) == test_clips.labels)
    checks = train_tiny.motion_checks(model, test_clips, "cpu")
    print(f"\nwhole clips {moving} %, {checks} (chance 12.5 %)")
    assert moving > 60 and checks["middle_frame_top1"] < 20 and checks["reversed_as_opposite"] > 50


# ----------------------------------------------------------------------------------------------------------------------
# train_tiny.py from start to end, as a user runs it


def train_tiny_command(*arguments, cwd, processes=1, timeout=120):
    """-> (exit status, stdout + stderr)."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    process = subprocess.run([sys.executable, *launcher, str(HERE / "train_tiny.py"), *map(str, arguments)], cwd=cwd,
                             capture_output=True, text=True, timeout=timeout)
    return process.returncode, process.stdout + process.stderr


def losses(folder):
    """metrics.jsonl -> {(stage, step): loss}; every step is there once."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {(m["stage"], m["step"]): m["loss"] for m in metrics}
    assert len(result) == len(metrics)
    return result


SHORT = ["--unlabelled-clips", 500, "--test-clips", 64, "--pretrain-steps", 60, "--finetune-steps", 3,
         "--scratch-full-time-steps", 4]
FILES = {"summary.json", "metrics.jsonl", "results.json", "settings.json", "table.md", "curves.png",
         "reconstruction.png", "reconstruction.gif", "pretrained"}


def test_short_run_learns_leaves_its_files_and_repeats(tmp_path):
    summaries = []
    for name in ("a", "b"):
        status, output = train_tiny_command(*SHORT, "--name", name, cwd=tmp_path)
        assert status == 0, output
        names = {file.name for file in (tmp_path / "runs" / name).iterdir()}
        assert names == FILES | {"finetuned-2", "finetuned-10", "confusion-2.png", "confusion-10.png"}
        summaries.append(json.loads((tmp_path / "runs" / name / "summary.json").read_text()))
    first, second = summaries
    assert first["pretrain_loss_last"] < first["pretrain_loss_first"] - 0.2
    assert [result["labels_per_class"] for result in first["results"]] == [2, 10]
    assert first.keys() >= {"finetune_top1", "scratch_top1", "scratch_full_time_top1", "linear_probe_top1", "device",
                            "labels_per_class", "seed", "seconds", "middle_frame_top1", "reversed_as_opposite"}
    for summary in summaries:
        del summary["seconds"], summary["total_seconds"], summary["data_wait"]
    assert first == second, "the same seed gives the same numbers"
    assert losses(tmp_path / "runs/a") == losses(tmp_path / "runs/b")

    # The saved models are the trained ones: held-out clips are reconstructed with the loss of the end of training, and
    # the fine-tuned one, evaluated on its own, scores what the run said.
    model = VideoMAEForPreTraining.from_pretrained(tmp_path / "runs/a/pretrained")
    pixel_values = normalize(MotionClips(64, TINY, seed=9).clips)
    loss = model(pixel_values, random_mask("tube", 64, TINY.grid, 0.75)).loss.item()
    assert abs(loss - first["pretrain_loss_last"]) < 0.05
    status, output = train_tiny_command("eval", "--init", "runs/a/finetuned-10", "--test-clips", 64,
                                        "--unlabelled-clips", 500, "--name", "eval", cwd=tmp_path)
    assert status == 0, output
    assert json.loads((tmp_path / "runs/eval/summary.json").read_text())["top1"] == first["finetune_top1"]

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs/a").rglob("*")}
    status, output = train_tiny_command(*SHORT, "--name", "a", cwd=tmp_path)
    assert status != 0 and "--name" in output and "exists already" in output
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs/a").rglob("*")}
    (tmp_path / "runs/mine").mkdir()
    status, output = train_tiny_command(*SHORT, "--name", "mine", "--overwrite", cwd=tmp_path)
    assert status != 0 and (tmp_path / "runs/mine").is_dir(), "only a run of this script is overwritten"


def test_benchmarks_and_findings_run(tmp_path):
    """One short row of the benchmark, whose two sides are the real ones; one run of the findings, in few steps."""
    def run(*arguments):
        done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run(HERE / "benchmarks/bench.py", "--only", "embedded classify fp32 eager", "processor", "--output",
                  tmp_path / "bench")
    rows = json.loads((tmp_path / "bench/results.json").read_text())["rows"]
    assert all(row["seconds"].keys() == {"ours", "transformers"} for row in rows.values()) and len(rows) == 2
    assert rows["embedded classify fp32 eager"]["over_floor"] > 1
    assert f"| {rows['processor']['ratio']:.2f} |" in printed

    code = ("import sys; sys.path.insert(0, sys.argv[1]); import findings\n"
            "short = dict(pretrain_steps=12, finetune_steps=5)\n"
            "for setting in (dict(data='look', mask='random'), dict(pretrain_on='rough textures', decoder_layers=2)):\n"
            "    result = findings.run_once((findings.BASE | setting | short, 0))\n"
            "    assert 0 < result['finetune_top1'] < 100 and 0 < result['loss'] < 2, result\n")
    run("-c", code, HERE / "notebooks")


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "--data: nowhere is not a folder"),
    (["--model", "gigantic"], "preset: got 'gigantic'"),
    (["--mask", "diagonal"], "kind: got 'diagonal'"),
    (["--mask-ratio", "1"], "mask_ratio: 1.0 masks 16 of 16"),
    (["--mask", "random", "--dual-masking"], "masked cubes per clip, expected the same count"),
    (["--drop-path", "1"], "--drop-path: got 1.0, expected 0 to below 1"),
    (["--seeds", "1", "1"], "--seeds: got [1, 1]"),
    (["--pretrain-steps", "0"], "--pretrain-steps: got 0"),
    (["--labels-per-class", "50", "--unlabelled-clips", "100"], "--labels-per-class: 50 asked for"),
    (["--accumulate", "5"], "--pretrain-batch: got 48, expected a multiple of 5"),
    (["--precision", "fp8"], "--precision: got 'fp8'"),
    (["--resume", "nowhere"], "--resume: nowhere has no settings.json"),
    (["eval"], "--init: eval needs a model"),
    (["predict", "--init", "nowhere"], "VIDEO: got 0 for predict"),
    (["finetune"], "--init: finetune needs a model"),
    (["--resume", "runs", "--seeds", "3"], "--resume: takes no other option"),
    (["finetune", "--init", "x/y", "--model", "tiny"], "--model, --position-embedding: with --init"),
    (["--model", "laptop"], "--data: embedded clips of 16 x (112, 112) would take 6 GB"),
    (["finetune", "--init", "nowhere"], "source: nowhere is not a file"),
])
def test_bad_options_stop_the_run_before_it_starts(arguments, message, tmp_path):
    status, output = train_tiny_command(*arguments, cwd=tmp_path)
    assert status != 0 and message in output and "Traceback" not in output, output
    assert not (tmp_path / "runs").exists()


TOY = ["--unlabelled-clips", 96, "--test-clips", 16, "--pretrain-steps", 60, "--finetune-steps", 20,
       "--scratch-full-time-steps", 6, "--labels-per-class", 2, "--pretrain-batch", 16, "--finetune-batch", 16,
       "--drop-path", 0.2, "--checkpoint-every", 4]


def test_killed_at_any_moment_a_run_resumes_to_the_same_losses(tmp_path):
    """kill -9, five times, each after some more steps than the last; then Ctrl-C; then to the end."""
    status, output = train_tiny_command(*TOY, "--name", "whole", cwd=tmp_path)
    assert status == 0, output
    expected = losses(tmp_path / "runs/whole")
    assert len(expected) == 60 + 20 + 20 + 6
    rng = np.random.default_rng()  # another moment in every run of this test
    arguments, metrics = [*TOY, "--name", "killed"], tmp_path / "runs/killed/metrics.jsonl"
    for kill in range(6):
        process = subprocess.Popen([sys.executable, str(HERE / "train_tiny.py"), *map(str, arguments)], cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and not (
                metrics.exists() and len(metrics.read_text().splitlines()) >= min(10 * (kill + 1), 95)):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL if kill < 5 else signal.SIGINT)
        output = process.communicate()[0]
        arguments = ["--resume", "runs/killed"]
    if process.returncode == 130:
        assert "To go on: python train_tiny.py --resume runs/killed" in output, output
        assert (tmp_path / "runs/killed/checkpoint.pt").exists()
    status, output = train_tiny_command(*arguments, cwd=tmp_path)
    assert status == 0, output
    assert losses(tmp_path / "runs/killed") == expected
    whole, killed = (json.loads((tmp_path / f"runs/{name}/summary.json").read_text()) for name in ("whole", "killed"))
    assert whole["results"] == killed["results"]
    for name in ("pretrained", "finetuned-2"):
        assert same_weights(*(load_safetensors(tmp_path / "runs" / run / name / "model.safetensors")
                              for run in ("whole", "killed")))
    assert not list((tmp_path / "runs/killed").glob("*.tmp")), "nothing half-written is left"


def test_two_processes_and_two_parts_give_the_losses_of_one(tmp_path):
    """The same total batch: in two processes (gloo), in two parts, and with activations computed again."""
    options = [*TOY, "--drop-path", 0, "--no-scratch", "--pretrain-steps", 12, "--finetune-steps", 8, "--dual-masking"]
    ways = {"one": ([], 1), "two": ([], 2), "parts": (["--accumulate", 2, "--activation-checkpointing"], 1)}
    for name, (more, processes) in ways.items():
        status, output = train_tiny_command(*options, *more, "--name", name, cwd=tmp_path, processes=processes)
        assert status == 0, output
    one = losses(tmp_path / "runs/one")
    for name in ("two", "parts"):
        other = losses(tmp_path / "runs" / name)
        assert other.keys() == one.keys() and len(one) == 20
        assert max(abs(other[key] / one[key] - 1) for key in one) < 1e-4, name
    assert json.loads((tmp_path / "runs/two/summary.json").read_text())["processes"] == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    status, output = train_tiny_command(*TOY, "--pretrain-lr", 1e30, "--name", "nan", cwd=tmp_path)
    assert status != 0 and "Traceback" not in output
    assert re.search(r"pretrain: the loss is (nan|inf) at step \d+, lr \d", output), output
    assert "none was saved yet" in output or "checkpoint.pt, of step" in output
    assert not (tmp_path / "runs/nan/pretrained").exists()


def write_video(path, frames, rate=25, codec="mpeg4", pix_fmt="yuv420p"):
    """frames (T, H, W, 3) uint8 -> a video file."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = pix_fmt, 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def video_folder(tmp_path):
    """Two classes of motion as real files: 5 scenes each, of odd sizes and lengths, and one broken file."""
    config = VideoMAEConfig.preset("tiny", image_size=64, num_frames=40)
    clips = MotionClips(100, config, seed=6)
    for name, label in (("Left", 0), ("Zoom In", 6)):
        for scene, i in enumerate((clips.labels == label).nonzero()[:5, 0], start=1):
            frames = clips.clips[i].movedim(1, -1).numpy()[: 40 - 8 * scene + 4, : 64 - 4 * scene]  # the last: 4 frames
            suffix = "avi" if scene % 2 else "mp4"
            write_video(tmp_path / f"data/{name}/v_{name}_g{scene:02}_c01.{suffix}", frames)
    (tmp_path / "data/Left/v_Left_g09_c01.mp4").write_bytes(b"not a video")
    return tmp_path / "data"


VIDEOS = ["--frame-stride", 2, "--pretrain-steps", 3, "--pretrain-batch", 4, "--finetune-steps", 2,
          "--finetune-batch", 4, "--scratch-full-time-steps", 2, "--views", 2, "--max-broken", 0.2]


def test_videos_from_a_folder_run_end_to_end(video_folder, tmp_path):
    """All stages on real files; then each on its own; then the fine-tuned model on a new file."""
    options = ["--model", "tiny", *VIDEOS, "--name", "videos"]
    status, output = train_tiny_command("--data", video_folder, *options, cwd=tmp_path)
    assert status == 0, output
    assert "left out" in output and "v_Left_g09_c01.mp4" in output, "the broken file is named"
    assert "train     8 clips: Left 4, Zoom In 4" in output and "held out  2 clips: Left 1, Zoom In 1" in output
    names = {file.name for file in (tmp_path / "runs/videos").iterdir()}
    assert names == FILES | {"finetuned-all", "confusion-all.png"}
    config = json.loads((tmp_path / "runs/videos/finetuned-all/config.json").read_text())
    assert (config["frame_stride"], config["views"], config["id2label"]["1"]) == (2, 2, "Zoom In")
    summary = json.loads((tmp_path / "runs/videos/summary.json").read_text())
    assert summary["majority_top1"] == 50 and 0 <= summary["finetune_balanced"] <= 100
    cached = list((tmp_path / "runs/.cache").iterdir())
    assert len(cached) == 10 and all(file.suffix == ".npy" for file in cached)

    made_by = {"eval": "confusion.png", "reconstruct": "reconstruction.gif", "finetune": "finetuned-all"}
    for stage, made in made_by.items():
        status, output = train_tiny_command(stage, "--data", video_folder, *VIDEOS, "--init", "runs/videos",
                                            "--name", stage, cwd=tmp_path)
        assert status == 0 and (tmp_path / "runs" / stage / made).exists(), output
    evaluated = json.loads((tmp_path / "runs/eval/summary.json").read_text())
    assert evaluated["top1"] == summary["finetune_top1"] and evaluated["views"] == 6
    video = next(video_folder.glob("Left/*.avi"))
    status, output = train_tiny_command("predict", "--init", "runs/videos", video, cwd=tmp_path)
    shares = [float(x) for x in re.findall(r"([\d.]+) %  (?:Left|Zoom In)", output)]
    assert status == 0 and len(shares) == 2 and abs(sum(shares) - 100) < 0.2, output
    status, output = train_tiny_command("predict", "--init", "runs/videos", "Left/v_Left_g09_c01.mp4", cwd=video_folder)
    assert status != 0 and "Traceback" not in output
    options = ["--model", "tiny", *VIDEOS, "--max-broken", 0.01]
    status, output = train_tiny_command("--data", video_folder, *options, cwd=tmp_path)
    assert status != 0 and "--max-broken: 1 of 11 videos cannot be read" in output


def test_published_weights_are_fine_tuned_on_a_folder(video_folder, tmp_path):
    """--init with a directory of transformers: its frames and size are used, the head is new, no pretraining."""
    status, output = train_tiny_command("finetune", "--data", video_folder, *VIDEOS, "--init",
                                        HERE / "golden/hf_pretrain_tiny", "--no-scratch", "--name", "hf", cwd=tmp_path)
    assert status == 0 and "new, to be trained: classifier, fc_norm" in output, output
    model = VideoMAEForVideoClassification.from_pretrained(tmp_path / "runs/hf/finetuned-all")
    assert model.config.id2label == {0: "Left", 1: "Zoom In"} and model.config.hidden_size == 48
    assert not (tmp_path / "runs/hf/pretrained").exists()


def turn(path, degrees):
    """Write a display matrix into an MP4: players turn the frames clockwise by 0 or 90 degrees."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version and flags, times, ids, layer, volume, then nine numbers
    matrix = {90: (0, 1, 0, -1, 0, 0, 0, 0, 0x4000)}[degrees]
    content[at : at + 36] = struct.pack(">9i", *(x << 16 for x in matrix))
    path.write_bytes(content)


def test_odd_videos_are_read_and_broken_ones_named(tmp_path, capsys):
    """What a folder of a real person holds: whatever can be decoded gives a clip, the rest is named."""
    ramp = np.stack([np.full((48, 64, 3), (20 + 4 * t, 120, 200 - 4 * t), dtype=np.uint8) for t in range(40)])
    ramp[:, :24] = 0  # the upper half is black
    folder = tmp_path / "A"
    write_video(folder / "good.avi", ramp)
    write_video(folder / "one frame.mp4", ramp[:1])
    write_video(folder / "five frames.mp4", ramp[:5])
    write_video(folder / "portrait.mp4", ramp.transpose(0, 2, 1, 3))
    write_video(folder / "turned.mp4", ramp)
    turn(folder / "turned.mp4", 90)
    write_video(folder / "grey.mkv", ramp, codec="ffv1", pix_fmt="gray")
    write_video(folder / "16 bit.mkv", ramp, codec="ffv1", pix_fmt="rgb48le")
    write_video(folder / "odd.mkv", ramp[:, :47, :63], codec="ffv1", pix_fmt="yuv444p10le")
    write_video(folder / "Bogenschießen 射箭.avi", ramp)
    whole = (folder / "good.avi").read_bytes()
    (folder / "truncated.avi").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("hello")
    files = sorted(folder.iterdir())
    decoded = train_tiny.decode_all(files, 32, tmp_path / "cache", max_broken=0.5)
    lengths = {file.name: len(np.load(path)) for file, path in decoded.items()}
    assert lengths.pop("truncated.avi") in range(1, 40)
    assert lengths == {"good.avi": 40, "one frame.mp4": 1, "five frames.mp4": 5, "portrait.mp4": 40, "turned.mp4": 40,
                       "grey.mkv": 40, "16 bit.mkv": 40, "odd.mkv": 40, "Bogenschießen 射箭.avi": 40}
    errors = capsys.readouterr().err
    assert "empty.mp4: cannot be decoded" in errors and "text.mp4: cannot be decoded" in errors
    recipe = train_tiny.RECIPES["laptop"]
    clips = VideoClips(["A"], [(file, 0) for file in files], decoded, TINY, recipe)
    for draw in (None, train_tiny.Draw(0, 0, len(clips.labels), slice(None))):
        assert clips.load(torch.arange(len(clips.labels)), draw).shape == (10, 8, 3, 32, 32)
    turned = np.load(decoded[folder / "turned.mp4"])[0].astype(int)
    assert turned.shape[0] > turned.shape[1] and turned[:, -8:].mean() < 30 < turned[:, :8].mean(), "black on the right"


def test_decoded_frames_are_the_video(tmp_path):
    """Colours and order survive the way from a file to a clip; a short video holds its last frame."""
    ramp = np.stack([np.full((48, 64, 3), (20 + 30 * t, 120, 200 - 25 * t), dtype=np.uint8) for t in range(6)])
    write_video(tmp_path / "A/one.mp4", ramp)
    recipe = train_tiny.RECIPES["laptop"] | {"frame_stride": 1}
    file = tmp_path / "A/one.mp4"
    clips = VideoClips(["A"], [(file, 0)], {file: train_tiny.decode(file, 32, tmp_path / "cache")}, TINY, recipe)
    clip = clips.load(torch.tensor([0]))[0]  # (8, 3, 32, 32)
    expected = torch.from_numpy(ramp[[0, 1, 2, 3, 4, 5, 5, 5], 0, 0]).float()
    assert (clip.float().mean(dim=(2, 3)) - expected).abs().max() < 6


def test_sampling_views_and_crops(tmp_path):
    """Which frames and places a clip is made of, read off a video whose colours say time and column."""
    video = np.zeros((50, 32, 96, 3), dtype=np.uint8)
    video[..., 0] = 5 * np.arange(50)[:, None, None]
    video[..., 1] = 2 * np.arange(96)
    np.save(tmp_path / "video.npy", video)

    def clips(**changes):
        self = object.__new__(VideoClips)
        self.frames, self.size, self.videos = 8, 32, [tmp_path / "video.npy"]
        self.recipe = train_tiny.RECIPES["laptop"] | {"frame_stride": 4, "multi_scale_crop": False} | changes
        return self

    def times(clip):
        return (clip[0, :, 0, 0, 0] // 5).tolist()

    zero = torch.tensor([0])
    dense = clips(views=2, crops=3)
    loaded = [dense.load(zero, view=view) for view in range(6)]
    assert [times(x)[0] for x in loaded] == [5, 5, 5, 16, 16, 16]  # a quarter and three quarters of the 22 there are
    assert all(np.diff(times(x)).tolist() == [4] * 7 for x in loaded)
    assert [int(x[0, 0, 1, 0, 0]) // 2 for x in loaded[:3]] == [0, 32, 64]
    assert times(clips(frame_stride=20).load(zero)) == [0, 20, 40, 49, 49, 49, 49, 49]
    segments = clips(sampling="segments")
    for step in range(20):
        drawn = times(segments.load(zero, train_tiny.Draw(0, step, 1, slice(None))))
        assert all(int(i * 6.25) <= t < (i + 1) * 6.25 for i, t in enumerate(drawn)), "one of each eighth"
    starts = {times(dense.load(zero, train_tiny.Draw(0, step, 1, slice(None))))[0] for step in range(200)}
    assert starts == set(range(22)), "every start there is"


def test_augmentations():
    """Each changes what it should and keeps what it must; half a batch sees what it would in the whole one."""
    torch.manual_seed(0)
    clip = torch.randn(64, 2, 3, 8, 8)
    draw = train_tiny.Draw(3, 5, 64, slice(None))
    random = torch.cat([draw.uniform(9), draw.normal(3)], dim=1)
    half = train_tiny.Draw(3, 5, 64, slice(32, 64))
    assert torch.equal(torch.cat([half.uniform(9), half.normal(3)], dim=1), random[32:])

    flipped = train_tiny.flip(clip, random[:, 0])
    mirrored = (flipped == clip.flip(-1)).flatten(1).all(dim=1)
    assert 15 < mirrored.sum() < 49 and torch.equal(flipped[~mirrored], clip[~mirrored])

    recoloured, signs = train_tiny.recolour(clip, random), set()
    for before, after in zip(clip, recoloured, strict=True):  # channel by channel a straight line, alike in time
        channels = np.array([[np.corrcoef(a.flatten(), b.flatten())[0, 1] for a in before.transpose(0, 1)]
                             for b in after.transpose(0, 1)])
        assert (np.abs(channels).round(4) == 1).sum() == 3
        signs.add(tuple(np.sign(channels[np.abs(channels).round(4) == 1]).tolist()))
    assert len(signs) == 8, "each channel has its own sign, as it has its own contrast and shift"
    slopes = [[after[:, c].std() for c in range(3)] for after in recoloured]
    assert np.std(slopes, axis=1).min() > 0.005

    targets = torch.eye(64)
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed, shares = train_tiny.mix(clip, targets, random[:, 1], *alphas)
        assert torch.allclose(shares.sum(dim=1), torch.ones(64))
        share = shares[0, 0]  # of the clip itself; the rest is its mirror place's
        assert torch.allclose(shares[0, 63], 1 - share)
        if alphas[1] == 0:
            assert torch.allclose(mixed, share * clip + (1 - share) * clip.flip(0))
        elif alphas[0] == 0:
            kept = (mixed == clip).float().mean()
            assert torch.allclose(kept, share, atol=1e-3) and ((mixed == clip) | (mixed == clip.flip(0))).all()

    frames = torch.arange(40 * 60, dtype=torch.uint8).view(1, 1, 40, 60).expand(2, 3, -1, -1)
    sizes = [train_tiny.multi_scale_crop(frames, 32, r) for r in torch.rand(50, 3).tolist()]
    assert all(x.shape == (2, 3, 32, 32) for x in sizes) and len({int(x.float().mean()) for x in sizes}) > 5


def test_learning_rates_by_layer_and_step():
    model = VideoMAEForVideoClassification(VideoMAEConfig(**SMALL))  # 3 layers
    names = {id(p): name for name, p in model.named_parameters()}
    groups = train_tiny.parameter_groups(model, 0.05, 0.5)
    found = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["classifier.weight"] == (1, 0.05) and found["classifier.bias"] == (1, 0)
    assert found["videomae.blocks.2.mlp.fc1.weight"] == (0.5, 0.05)
    assert found["videomae.blocks.0.norm1.weight"] == (0.125, 0) and found["videomae.embed.weight"] == (0.0625, 0.05)
    pretraining = VideoMAEForPreTraining(VideoMAEConfig(**SMALL))
    names = {id(p): name for name, p in pretraining.named_parameters()}
    exempt = {names[id(p)] for group in train_tiny.parameter_groups(pretraining, 0.05, 1.0) for p in group["params"]
              if group["weight_decay"] == 0}
    assert "decoder.mask_token" in exempt and "decoder.head.weight" not in exempt
    rates = [train_tiny.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0 and rates[99] < 0.002
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_clips_of_an_epoch_come_once_each():
    subset = torch.arange(100, 110)
    steps = torch.cat([train_tiny.clips_of_step(subset, 4, step, seed=0) for step in range(5)])
    assert sorted(steps[:10].tolist()) == sorted(steps[10:].tolist()) == subset.tolist()
    assert steps[:10].tolist() != steps[10:].tolist()


def test_folders_split_by_scene_by_lists_or_as_they_are(tmp_path):
    for name in ("A", "B"):
        for group in range(1, 7):
            for c in (1, 2):
                file = tmp_path / name / f"v_{name}_g{group:02}_c{c:02}.avi"
                file.parent.mkdir(exist_ok=True)
                file.touch()
    classes, splits = split_folder(tmp_path)
    groups = {split: {(label, file.name[4:7]) for file, label in entries} for split, entries in splits.items()}
    assert classes == ["A", "B"] and not groups["train"] & groups["test"]
    assert (len(splits["train"]), len(splits["test"])) == (16, 8)

    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for split, held_out in ((1, 1), (2, 5)):
        (lists / f"trainlist0{split}.txt").write_text("A/v_A_g02_c01.avi 1\nB/v_B_g02_c01.avi 2\n")
        (lists / f"testlist0{split}.txt").write_text("".join(f"{n}/v_{n}_g0{held_out}_c01.avi\n" for n in "AB"))
        _, splits = split_folder(tmp_path, split)
        assert [(file.name, label) for file, label in splits["test"]] == [
            (f"v_A_g0{held_out}_c01.avi", 0), (f"v_B_g0{held_out}_c01.avi", 1)]
    with pytest.raises(ValueError, match="--split: .*trainlist03.txt is missing"):
        split_folder(tmp_path, 3)

    (tmp_path / "train.csv").write_text("A/v_A_g02_c01.avi 0\nB/v_B_g02_c01.avi 1\n")
    (tmp_path / "val.csv").write_text(f"{tmp_path}/A/v_A_g01_c01.avi 0\nB/v_B_g01_c01.avi 1\n")
    classes, splits = split_folder(tmp_path)
    assert classes == ["A", "B"] and splits["test"] == [
        (tmp_path / "A/v_A_g01_c01.avi", 0), (tmp_path / "B/v_B_g01_c01.avi", 1)]
    (tmp_path / "val.csv").write_text("A/v_A_g01_c01.avi,0\n")
    with pytest.raises(ValueError, match="--data: line 1 of .*val.csv"):
        split_folder(tmp_path)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--data: no video"):
        split_folder(tmp_path)
    (tmp_path / "A").mkdir()
    (tmp_path / "A/one.mp4").touch()
    with pytest.raises(ValueError, match="has one class, A"):
        split_folder(tmp_path)
    (tmp_path / "B").mkdir()
    for name in ("A/two.mp4", "B/one.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="no train video of class B"):
        split_folder(tmp_path)


def test_ucf101_subset_is_downloaded_once_and_unpacked_safely(tmp_path, video_folder):
    """An archive of the subset's layout, from a server on this machine; one that would write elsewhere is refused."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    videos = sorted(video_folder.glob("*/*_g0[1-5]_*"))
    path = "datasets/sayakpaul/ucf101-subset/resolve/main/UCF101_subset.tar.gz"
    for name in ("good", "evil"):
        archive = tmp_path / name / path
        archive.parent.mkdir(parents=True)
        with tarfile.open(archive, "w:gz") as tar:
            for video in videos:
                split = "test" if "_g01_" in video.name else "train"
                tar.add(video, f"UCF101_subset/{split}/{video.parent.name}/{video.name}")
            if name == "evil":
                tar.add(videos[0], "../../outside.avi")
    for name in ("good", "evil"):
        with hub_server(tmp_path / name) as env:
            code = ("import pathlib, train_tiny; folder = train_tiny.download_ucf101_subset(pathlib.Path('cache'));"
                    "classes, splits = train_tiny.split_folder(folder);"
                    "print(classes, {k: len(v) for k, v in splits.items()})")
            home = tmp_path / f"{name} home"
            home.mkdir()
            runs = [subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True,
                                   env=os.environ | env | {"HF_HOME": str(home / "hf"), "PYTHONPATH": str(HERE)})]
        if name == "good":  # the server is gone
            runs.append(subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True,
                                       env=os.environ | env | {"HF_HOME": str(home / "hf2"), "PYTHONPATH": str(HERE)}))
            assert all("['Left', 'Zoom In'] {'train': 8, 'test': 2}" in run.stdout for run in runs), runs
        else:
            assert "could not be unpacked" in runs[0].stderr and not list((home / "cache").glob("*"))
            assert not list(tmp_path.rglob("outside.avi"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")

    def fail_half_way(file):
        file.write(b"new, but")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train_tiny.write_whole(target, fail_half_way)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


UCF101_MINI = HERE.parent / "shared/ucf101_mini"


@pytest.mark.skipif(not UCF101_MINI.is_dir(), reason="needs the real clips in ../shared/ucf101_mini")
def test_real_clips(tmp_path):
    classes, splits = split_folder(UCF101_MINI)
    assert classes == ["Punch", "YoYo"] and [len(splits[split]) for split in ("train", "test")] == [58, 23]
    entries = [splits["test"][0], splits["test"][-1]]
    decoded = train_tiny.decode_all([file for file, _ in entries], 112, tmp_path, max_broken=0)
    clips = VideoClips(classes, entries, decoded, VideoMAEConfig.preset("laptop"), train_tiny.RECIPES["laptop"])
    assert clips.load(torch.arange(2)).shape == (2, 16, 3, 112, 112)
    assert clips.load(torch.arange(2)).float().std() > 20


def test_videomae_alone_needs_torch_numpy_and_einops_only(tmp_path):
    (tmp_path / "videomae.py").write_text((HERE / "videomae.py").read_text())
    code = ("import sys, videomae; "
            "bad = {'transformers', 'safetensors', 'av', 'matplotlib'} & set(sys.modules); "
            "assert not bad, bad; print(videomae.__file__)")
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path) in output.stdout
