"""Tests of processor.py: its pixels equal transformers' for every kind of video."""
import copy
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from processor import BatchFeature, VideoMAEImageProcessor
from test_videomae import GOLDEN
from videomae import IMAGENET_MEAN, IMAGENET_STD

PIL = pytest.importorskip("PIL", reason="Pillow is not installed")
Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
FIRST = RNG.integers(0, 256, (4, 3, 40, 50), dtype=np.uint8)  # (T, C, H, W)
LAST = np.ascontiguousarray(FIRST.transpose(0, 2, 3, 1))
SMALL = dict(size=32, crop_size=32)


def their_processor(**fields):
    module = pytest.importorskip("transformers.models.videomae.image_processing_pil_videomae",
                                 reason="transformers is not installed")
    return module.VideoMAEImageProcessorPil(**fields)


def pixels(videos, **options):
    return VideoMAEImageProcessor(**SMALL)(videos, return_tensors="pt", **options).pixel_values


@pytest.mark.parametrize("fields", [
    {},
    dict(size={"shortest_edge": 256}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD),
    dict(size={"height": 100, "width": 130}, crop_size={"height": 96, "width": 128}),
    dict(size=(60, 200), crop_size=[50, 190]),
    dict(size={"shortest_edge": 64}, crop_size={"width": 48, "height": 64}, resample=2),
    dict(do_center_crop=False),
    dict(do_resize=False, crop_size={"height": 80, "width": 100}),
    dict(do_normalize=False),
    dict(do_rescale=False, do_normalize=False),
    dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1] * 3),
], ids=lambda fields: ",".join(fields) or "defaults")
def test_processor_equals_pillow(fields):
    """Within one 8-bit level of transformers' Pillow processor, and 0.01 levels on average. Pillow
    13 rounds more pixels to the other side: 0.2 levels."""
    on_average = 0.01 if int(PIL.__version__.split(".")[0]) < 13 else 0.2
    theirs, ours = their_processor(**fields), VideoMAEImageProcessor(**fields)
    level = np.array(1.0)  # one 8-bit level in the units of the result
    if ours.do_rescale:
        level = level * ours.rescale_factor
    if ours.do_normalize:
        level = level / np.reshape(ours.image_std, (3, 1, 1))
    for height, width in [(240, 320), (500, 281), (224, 224), (113, 150)]:
        coarse = RNG.integers(0, 256, (4, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        video = list(coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width])
        expected, got = (np.asarray(process(video, return_tensors="np")["pixel_values"], float)
                         for process in (theirs, ours))
        difference = np.abs(got - expected) / level
        assert difference.max() < 1.01 and difference.mean() < on_average, (height, width)


def test_every_kind_of_video():
    expected = pixels(LAST)
    assert expected.shape == (1, 4, 3, 32, 32) and expected.dtype == torch.float32
    images = [Image.fromarray(frame) for frame in LAST]
    flipped = LAST[..., ::-1].copy()[..., ::-1]  # negative strides, as from BGR to RGB
    for same in (
        FIRST, torch.from_numpy(FIRST), LAST[None], list(FIRST), tuple(torch.from_numpy(LAST)),
        [list(LAST)], [torch.from_numpy(FIRST)], images, [images], list(flipped),
        *(LAST.astype(dtype) for dtype in (np.int64, np.uint16)), torch.from_numpy(FIRST).int(),
    ):
        assert torch.equal(pixels(same), expected)
    assert torch.equal(pixels(None, images=LAST), expected)
    processor = VideoMAEImageProcessor(**SMALL)
    assert torch.equal(processor.preprocess(LAST, return_tensors="pt").pixel_values, expected)
    output = processor(LAST, return_tensors="np").pixel_values
    assert np.array_equal(output, expected.numpy())

    # Videos, but not the frames of one, may differ in size.
    small = RNG.integers(0, 256, (4, 33, 60, 3), dtype=np.uint8)
    assert torch.equal(pixels([list(LAST), list(small)]), torch.cat([expected, pixels(small)]))
    lists = processor([LAST[:2], small], do_center_crop=False).pixel_values
    assert [x.shape for x in lists] == [(2, 3, 32, 40), (4, 3, 32, 58)]


def test_floats_are_what_the_settings_expect():
    """0 to 255, or 0 to 1 with do_rescale=False, or any range if do_normalize is False too."""
    expected, unit = pixels(LAST), LAST / np.float32(255)
    close = pixels(unit, do_rescale=False)  # not rounded to 8 bits
    for same in (unit.astype(np.float64), torch.from_numpy(unit) * (1 + 1e-7)):
        assert (pixels(same, do_rescale=False) - close).abs().max() < 1e-5
    assert (close - expected).abs().max() < 1.6 / 255 / 0.5
    assert (pixels(LAST.astype(np.float32)) - close).abs().max() < 1e-5
    half = pixels(torch.from_numpy(unit).half(), do_rescale=False)
    assert (half - close).abs().max() < 0.01

    dark = (LAST > 200).astype(np.float32)  # 0 and 1 on the 0 to 255 scale
    assert (pixels(dark) - pixels(np.uint8(dark))).abs().max() < 1.01 / 255 / 0.5
    assert pixels(dark * 0).unique().tolist() == [-1]
    normalized = (unit - 0.45) / 0.225
    as_they_are = pixels(normalized, do_rescale=False, do_normalize=False)
    assert as_they_are.min() < -1 and as_they_are.max() > 1

    for frames, options, pattern in (
        (unit, {}, "videos.* 0 to 1, .*do_rescale=False"),
        (2 * unit - 1, {}, "videos.* -1 to 1,"),
        (normalized, {}, "videos.* -2 to "),
        (normalized, dict(do_rescale=False), "videos.* -2 to .*do_normalize=False"),
        (LAST, dict(do_rescale=False), "videos.* 0 to 255, .* 0 to 1;"),
        (LAST.astype(float) * 2, {}, "videos.* 0 to 510,"),
        (unit * np.nan, {}, "videos.* nan"),
    ):
        with pytest.raises(ValueError, match=pattern):
            pixels(frames, **options)


def test_processor_refuses_wrong_inputs():
    """Each error names the argument or the field, and what came."""
    frame, video = LAST[0], list(LAST)
    image = Image.fromarray(frame)
    cases = [
        ([], {}, "videos"),
        ([[]], {}, "videos"),
        ("clip.mp4", {}, "videos.*str"),
        (["a.png", "b.png"], {}, r"videos.*\(\)"),
        (None, {}, "videos.*NoneType"),
        (image, {}, "videos.*Image"),
        (frame, {}, r"videos.*\(50, 3\)"),  # a single image
        ([frame, None, frame], {}, r"videos.*\(\)"),
        ([video, frame], {}, "videos"),
        ([frame, frame[:30]], {}, r"videos.*\(30, 50, 3\).*\(40, 50, 3\)"),
        ([frame == 0] * 4, {}, "videos.*bool"),
        ([frame.astype(np.uint16) + 256] * 4, {}, "videos.*uint16.* 511"),
        ([frame.astype(int) - 256] * 4, {}, "videos.*int64"),
        ([frame[..., 0]] * 4, {}, r"videos.*\(40, 50\)"),
        ([frame[..., :2]] * 4, {}, r"videos.*\(40, 50, 2\)"),
        ([frame[:0]] * 4, {}, r"videos.*\(0, 50, 3\)"),
        ([frame[:3]] * 4, {}, r"videos.*\(3, 50, 3\)"),  # which axis has the channels?
        *(([image.convert(mode)] * 4, {}, f"videos.*{mode}") for mode in ("P", "RGBA", "LAB")),
        (video, dict(image_std=[0, 1, 1]), r"image_std.*\[0, 1, 1\]"),
        (video, dict(image_mean=0.5), "image_mean.* 0.5"),
        (video, dict(crop_size=48), "crop_size.* 48 x 48.* 32 x 40"),
        (video, dict(crop_size=(1, 2, 3)), r"crop_size.*\(1, 2, 3\)"),
        (video, dict(resample=3), "resample.* 3.* 2 .*do_resize=False"),
        (video, dict(size={"longest_edge": 3}), "size.*longest_edge"),
        (video, dict(size=0), "size.* 0"),
        (video, dict(return_tensors="tf"), "return_tensors.*'tf'"),
        (video, dict(data_format="channels_last"), "data_format.*docs/transformers.md"),
        (video, dict(do_pad=True), "do_pad.*docs/transformers.md"),
    ]
    for videos, options, pattern in cases:
        with pytest.raises((ValueError, TypeError), match=pattern):
            VideoMAEImageProcessor(**SMALL)(videos, **options)
    with pytest.raises(RuntimeError, match="equal size"):  # PyTorch's
        pixels([video, video[:3]])


def test_batch_feature():
    """Keys are attributes; `to` moves all tensors and casts floats, as in transformers."""
    inputs = VideoMAEImageProcessor(**SMALL)([LAST, LAST], return_tensors="pt")
    inputs["labels"], inputs["name"] = torch.tensor([1, 2]), "clip"
    inputs["bool_masked_pos"] = torch.tensor([True, False])
    assert inputs.to(torch.float16) is inputs and inputs.to(device="cpu") is inputs
    assert inputs.pixel_values.dtype == torch.float16 and inputs.labels.dtype == torch.int64
    assert inputs.bool_masked_pos.dtype == torch.bool and inputs.name == "clip"
    assert inputs.to("meta", dtype=torch.float32).pixel_values.dtype == torch.float32
    assert {inputs.pixel_values.device.type, inputs.labels.device.type,
            inputs.bool_masked_pos.device.type} == {"meta"}
    assert not hasattr(inputs, "mask")
    feature = BatchFeature(x=1)
    assert copy.deepcopy(feature).x == pickle.loads(pickle.dumps(feature)).x == 1


def test_processor_is_saved_and_loaded(tmp_path):
    source = GOLDEN / "hf_classify_tiny"
    processor = VideoMAEImageProcessor.from_pretrained(
        source, do_center_crop=False, use_fast=False, revision="main")
    assert processor.size == {"shortest_edge": 32} and not processor.do_center_crop
    assert processor.crop_size == {"height": 32, "width": 32}
    assert tuple(processor.image_mean) == IMAGENET_MEAN
    processor.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "preprocessor_config.json"):
        assert VideoMAEImageProcessor.from_pretrained(path) == processor
    processor.save_pretrained(tmp_path)  # the same content is no conflict
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        replace(processor, do_center_crop=True).save_pretrained(tmp_path)

    theirs = type(their_processor()).from_pretrained(tmp_path)
    same = {name: x for name, x in theirs.to_dict().items() if name in processor.to_dict()}
    assert {**same, "image_mean": list(same["image_mean"]), "image_std": list(same["image_std"])
            } == processor.to_dict()
    theirs.save_pretrained(tmp_path / "theirs")
    again = VideoMAEImageProcessor.from_pretrained(tmp_path / "theirs")
    frames = RNG.integers(0, 256, (2, 60, 50, 3), dtype=np.uint8)
    expected = theirs(list(frames), return_tensors="pt").pixel_values
    for ours in (processor, again):
        difference = ours(frames, return_tensors="pt").pixel_values - expected
        assert difference.abs().max() < 1.01 / 255 / 0.2


def test_fields_that_would_change_the_numbers_are_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    values = VideoMAEImageProcessor().to_dict()
    for name, x in (
        ("do_pad", True), ("do_flip_channel_order", True), ("do_convert_rgb", True),
        ("do_sample_frames", True), ("offset", True), ("default_to_square", True), ("resample", 3),
        ("image_mean", 0.5), ("image_mean", [0.5]), ("size", {"longest_edge": 224}),
        ("image_processor_type", "VivitImageProcessor"),
        ("feature_extractor_type", "CLIPFeatureExtractor"),
    ):
        path.write_text(json.dumps(values | {name: x}))
        with pytest.raises(ValueError, match=f"{path}: {name}: .*{re.escape(str(x))}"):
            VideoMAEImageProcessor.from_pretrained(tmp_path)
    harmless = dict(do_pad=False, do_convert_rgb=None, data_format="channels_first", mine=[1])
    types = dict(feature_extractor_type="VideoMAEFeatureExtractor",
                 image_processor_type="VideoMAEImageProcessorPil")
    path.write_text(json.dumps(values | harmless | types))
    assert VideoMAEImageProcessor.from_pretrained(tmp_path).extra == harmless
