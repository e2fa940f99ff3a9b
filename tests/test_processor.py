"""Tests of processor.py: its pixels equal transformers' for every kind of video."""
import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from processor import BatchFeature, VideoMAEImageProcessor
from test_videomae import GOLDEN
from videomae import IMAGENET_MEAN, IMAGENET_STD

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
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
    dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 48}, resample=3),
    dict(size={"shortest_edge": 64}, crop_size={"width": 64, "height": 48}, resample=0),
    dict(size={"shortest_edge": 64}, crop_size=64, resample=1),
    dict(do_center_crop=False),
    dict(do_resize=False, crop_size={"height": 80, "width": 100}),
    dict(do_normalize=False),
    dict(do_rescale=False, do_normalize=False),
    dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1] * 3),
    dict(image_mean=0.5, image_std=0.25),
], ids=lambda fields: ",".join(fields) or "defaults")
def test_processor_equals_pillow(fields):
    """Within one 8-bit level of transformers' Pillow processor, and 0.01 levels on average."""
    theirs, ours = their_processor(**fields), VideoMAEImageProcessor(**fields)
    level = np.array(1.0)  # one 8-bit level in the units of the result
    if ours.do_rescale:
        level = level * ours.rescale_factor
    if ours.do_normalize:
        level = level / np.resize(ours.image_std, (3, 1, 1))
    for height, width in [(240, 320), (500, 281), (224, 224), (113, 150)]:
        coarse = RNG.integers(0, 256, (4, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        video = list(coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width])
        expected, got = (np.asarray(process(video, return_tensors="np")["pixel_values"], float)
                         for process in (theirs, ours))
        difference = np.abs(got - expected) / level
        assert difference.max() < 1.01 and difference.mean() < 0.01, (height, width)


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
    output = processor(LAST, return_tensors="np", data_format="channels_last").pixel_values
    assert np.array_equal(output.transpose(0, 1, 4, 2, 3), expected.numpy())
    for one in (LAST[0], FIRST[0], images[0], [LAST[0]]):  # an image is a video of one frame
        assert torch.equal(pixels(one), expected[:, :1])

    # Videos, and frames, may differ in size.
    small = RNG.integers(0, 256, (4, 33, 60, 3), dtype=np.uint8)
    assert torch.equal(pixels([list(LAST), list(small)]), torch.cat([expected, pixels(small)]))
    mixed = pixels([LAST[0], small[1], LAST[2], small[3]])
    assert torch.equal(mixed[:, ::2], expected[:, ::2])
    assert torch.equal(mixed[:, 1::2], pixels(small)[:, 1::2])
    lists = processor([LAST[:2], small], do_center_crop=False).pixel_values
    assert [x.shape for x in lists] == [(2, 3, 32, 40), (4, 3, 32, 58)]

    # If either axis could be the channels, the caller must pass input_data_format.
    narrow = RNG.integers(0, 256, (4, 3, 40, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="input_data_format"):
        processor(narrow)
    off = dict(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    expected = dict(channels_first=narrow, channels_last=narrow.transpose(0, 3, 1, 2))
    for layout, same in expected.items():
        got = processor(narrow, input_data_format=layout, **off).pixel_values[0]
        assert np.array_equal(got, same)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels(channels):
    """One channel equals transformers; 2 or 4 are resized one by one, and none as transparency."""
    video = np.ascontiguousarray(np.resize(LAST, (4, 40, 50, channels)))
    layout = dict(input_data_format="channels_last")
    for statistics in (0.5, (0.5,) * channels):
        options = dict(image_mean=statistics, image_std=statistics)
        got = pixels(video, **options, **layout)
        theirs = their_processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        expected = theirs(list(video), return_tensors="pt", **options, **layout).pixel_values
        assert got.shape == expected.shape == (1, 4, channels, 32, 32)
        if channels == 1:
            assert (got - expected).abs().max() < 1.01 / 255 / 0.5
    each = [pixels(list(video[..., i]), image_mean=0.5, image_std=0.5) for i in range(channels)]
    assert torch.equal(got, torch.cat(each, dim=2))
    if channels == 1:
        greys = [Image.fromarray(frame[..., 0]) for frame in video]
        for same in (list(video[..., 0]), greys, video.transpose(0, 3, 1, 2)):
            assert torch.equal(pixels(same, **options), got)
    if channels == 4:
        assert torch.equal(pixels([Image.fromarray(x, "RGBA") for x in video], **options), got)


def test_floats_are_what_the_settings_expect():
    """0 to 255, or 0 to 1 with do_rescale=False, or any range if do_normalize is False too."""
    expected, unit = pixels(LAST), LAST / np.float32(255)
    close = pixels(unit, do_rescale=False)  # not rounded to 8 bits
    for same in (unit.astype(np.float64), torch.from_numpy(unit) * (1 + 1e-7)):
        assert (pixels(same, do_rescale=False) - close).abs().max() < 1e-5
    assert (close - expected).abs().max() < 1.6 / 255 / 0.5
    assert (pixels(LAST.astype(np.float32)) - close).abs().max() < 1e-5
    bicubic = pixels(unit, do_rescale=False, resample=3)
    assert (bicubic.clamp(-1, 1) - pixels(LAST, resample=3)).abs().mean() < 0.01
    half = pixels(torch.from_numpy(unit).bfloat16(), do_rescale=False)
    assert (half - close).abs().max() < 0.01

    dark = (LAST > 200).astype(np.float32)  # 0 and 1 on the 0 to 255 scale
    assert (pixels(dark) - pixels(np.uint8(dark))).abs().max() < 1.01 / 255 / 0.5
    assert pixels(dark * 0).unique().tolist() == [-1]
    normalized = (unit - 0.45) / 0.225
    as_they_are = pixels(normalized, do_rescale=False, do_normalize=False)
    assert as_they_are.min() < -1 and as_they_are.max() > 1

    for frames, options, message in (
        (unit, {}, "videos: got numbers from 0 to 1, expected 0 to 255; pass do_rescale=False"),
        (2 * unit - 1, {}, "videos: got numbers from -1 to 1, expected 0 to 255"),
        (normalized, {}, "videos: got numbers from -2 to .*, expected 0 to 255"),
        (normalized, dict(do_rescale=False), "from -2 to .*, expected 0 to 1;.*do_normalize=False"),
        (LAST, dict(do_rescale=False), "videos: got numbers from 0 to 255, expected 0 to 1"),
        (LAST.astype(float) * 2, {}, "videos: got numbers from 0 to 510, expected 0 to 255"),
        (unit * np.nan, {}, "videos: got numbers from nan to nan"),
    ):
        with pytest.raises(ValueError, match=message):
            pixels(frames, **options)


def test_processor_refuses_wrong_inputs():
    frame, video = LAST[0], list(LAST)
    palette = [Image.fromarray(frame).convert("P")] * 4
    cases = [
        ([], {}, "videos: got no frames"),
        ([[]], {}, "videos: got no frames"),
        ("clip.mp4", {}, "videos: got 'clip.mp4' for a frame"),
        (["a.png", "b.png"], {}, "videos: got 'a.png' for a frame"),
        (None, {}, "videos: got None for a frame"),
        ([frame, None, frame], {}, "videos: got None for a frame"),
        ([video, frame], {}, "videos: got a frame of shape"),
        ([frame == 0] * 4, {}, "videos: got bool"),
        ([frame.astype(np.uint16) + 256] * 4, {}, "videos: got uint16 up to 511"),
        ([frame.astype(int) - 256] * 4, {}, "videos: got int64"),
        ([frame[..., :2]] * 4, {}, r"videos: got a frame of shape \(40, 50, 2\), .* 1, 3 or 4"),
        ([frame[:0]] * 4, {}, r"videos: got a frame of shape \(0, 50, 3\)"),
        (video, dict(input_data_format="channels_first"), "videos: got a frame of shape"),
        ([frame, frame[:30]], dict(do_resize=False, do_center_crop=False), "Sizes of tensors must"),
        ([video, video[:3]], dict(return_tensors="pt"), "to be equal size"),  # PyTorch's
        (palette, {}, "videos: got a PIL image of mode P"),
        ([frame[..., :1]] * 4, {}, "expected one number, or one for each of 1 channels"),
        (video, dict(image_std=[0, 1, 1]), "image_std: got"),
        (video, dict(crop_size=48), "crop_size: got 48 x 48, expected at most 32 x 40"),
        (video, dict(crop_size=(1, 2, 3)), r"crop_size: got \(1, 2, 3\)"),
        (video, dict(resample=6), "resample: got 6"),
        (video, dict(size={"longest_edge": 3}), "size: got"),
        (video, dict(size=0), "size: got"),
        (video, dict(return_tensors="tf"), "return_tensors: got 'tf'"),
        (video, dict(data_format="NCHW"), "data_format: got 'NCHW'"),
        (video, dict(do_pad=True), "unknown options .'do_pad'.; see docs/transformers.md"),
    ]
    for videos, options, message in cases:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            VideoMAEImageProcessor(**SMALL)(videos, **options)


def test_batch_feature():
    """Keys are attributes; `to` moves all tensors and casts floats, as in transformers."""
    inputs = VideoMAEImageProcessor(**SMALL)([LAST, LAST], return_tensors="pt")
    inputs["labels"], inputs["name"] = torch.tensor([1, 2]), "clip"
    inputs["bool_masked_pos"] = [torch.tensor([True, False])]
    assert inputs.to(torch.float16) is inputs and inputs.to(device="cpu") is inputs
    assert inputs.pixel_values.dtype == torch.float16 and inputs.labels.dtype == torch.int64
    assert inputs.bool_masked_pos[0].dtype == torch.bool and inputs.name == "clip"
    assert inputs.to("meta", dtype=torch.float32).pixel_values.dtype == torch.float32
    assert {inputs.pixel_values.device.type, inputs.labels.device.type,
            inputs.bool_masked_pos[0].device.type} == {"meta"}
    assert not hasattr(inputs, "mask")
    feature = BatchFeature(x=1)
    assert copy.deepcopy(feature).x == pickle.loads(pickle.dumps(feature)).x == 1


def test_processor_is_saved_and_loaded(tmp_path):
    source = GOLDEN / "hf_classify_tiny"
    processor = VideoMAEImageProcessor.from_pretrained(
        source, resample=3, use_fast=False, revision="main")
    assert processor.size == {"shortest_edge": 32} and processor.resample == 3
    assert processor.crop_size == {"height": 32, "width": 32}
    assert tuple(processor.image_mean) == IMAGENET_MEAN
    processor.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "preprocessor_config.json"):
        assert VideoMAEImageProcessor.from_pretrained(path) == processor
    processor.save_pretrained(tmp_path)  # the same content is no conflict
    with pytest.raises(ValueError, match="preprocessor_config.json already exists"):
        replace(processor, resample=2).save_pretrained(tmp_path)

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
