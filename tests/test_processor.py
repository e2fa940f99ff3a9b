"""processor.py: the same pixels as transformers' processor, from every kind of video."""
import numpy as np
import pytest
import torch

from processor import VideoMAEImageProcessor
from videomae import IMAGENET_MEAN, IMAGENET_STD


@pytest.mark.parametrize("fields", [
    {},
    dict(size={"shortest_edge": 256}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD),
    dict(size={"height": 100, "width": 130}, crop_size={"height": 96, "width": 128}),
    dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 48}, resample=3),
    dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, resample=0),
    dict(do_center_crop=False),
    dict(do_resize=False, crop_size={"height": 80, "width": 100}),
    dict(do_normalize=False),
    dict(do_rescale=False, do_normalize=False),
    dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1] * 3),
], ids=lambda fields: ",".join(fields) or "defaults")
def test_processor_equals_pillow(fields):
    """Against transformers' Pillow processor: within one 8-bit level, 0.01 level in the mean."""
    theirs = pytest.importorskip("transformers.models.videomae.image_processing_pil_videomae",
                                 reason="transformers is not installed")
    theirs, ours = theirs.VideoMAEImageProcessorPil(**fields), VideoMAEImageProcessor(**fields)
    level = np.array(1.0)  # one 8-bit level in the units of the result
    if ours.do_rescale:
        level = level * ours.rescale_factor
    if ours.do_normalize:
        level = level / np.array(ours.image_std).reshape(3, 1, 1)
    rng = np.random.default_rng(0)
    for height, width in [(240, 320), (500, 281), (224, 224), (113, 150)]:
        coarse = rng.integers(0, 256, (4, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        video = list(coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width])
        expected, got = (np.asarray(process(video, return_tensors="np")["pixel_values"], float)
                         for process in (theirs, ours))
        difference = np.abs(got - expected) / level
        assert difference.max() < 1.01 and difference.mean() < 0.01, (height, width)


def test_processor_takes_every_kind_of_video():
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (4, 3, 40, 50), dtype=np.uint8)  # (T, C, H, W)
    last = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
    processor = VideoMAEImageProcessor(size=32, crop_size=32)
    expected = processor(last, return_tensors="pt").pixel_values
    assert expected.shape == (1, 4, 3, 32, 32) and expected.dtype == torch.float32
    for same in (
        first, torch.from_numpy(first), first.astype(np.int64), last[None],
        list(first), list(torch.from_numpy(last)), [list(last)], [torch.from_numpy(first)],
        [Image.fromarray(frame) for frame in last],
    ):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)
    output = processor(last, return_tensors="np").pixel_values
    assert isinstance(output, np.ndarray) and np.array_equal(output, expected.numpy())
    output = processor(last, return_tensors="np", data_format="channels_last").pixel_values
    assert np.array_equal(output.transpose(0, 1, 4, 2, 3), expected.numpy())
    half = processor(last, return_tensors="pt").to(torch.float16).pixel_values
    assert torch.equal(half, expected.half())

    small = rng.integers(0, 256, (4, 33, 60, 3), dtype=np.uint8)
    batch = processor([list(last), list(small)], return_tensors="pt").pixel_values
    assert torch.equal(batch[:1], expected) and batch.shape == (2, 4, 3, 32, 32)
    lists = processor([last[:2], small], do_center_crop=False).pixel_values  # may differ in shape
    assert [x.shape for x in lists] == [(2, 3, 32, 40), (4, 3, 32, 58)]

    grey = VideoMAEImageProcessor(size=32, crop_size=32, image_mean=(0.5,), image_std=(0.5,))
    one = grey(last[..., :1], return_tensors="pt").pixel_values
    assert one.shape == (1, 4, 1, 32, 32)
    pictures = [Image.fromarray(frame[..., 0]) for frame in last]
    for same in (last[..., 0], pictures, first[:, :1]):
        assert torch.equal(grey(list(same), return_tensors="pt").pixel_values, one)

    # Floats in [0, 1] are not rounded to 8 bits, and come out near what is.
    floats = processor(last / 255.0, do_rescale=False, return_tensors="pt").pixel_values
    assert (floats - expected).abs().max() < 1.6 / 255 / 0.5

    # Where either axis could be the channels, the caller has to say which it is.
    narrow = rng.integers(0, 256, (4, 3, 40, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="input_data_format"):
        processor(narrow)
    plain = VideoMAEImageProcessor(
        do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    channels_first = plain(narrow, input_data_format="channels_first").pixel_values[0]
    channels_last = plain(narrow, input_data_format="channels_last").pixel_values[0]
    assert np.array_equal(channels_first, narrow)
    assert np.array_equal(channels_last, narrow.transpose(0, 3, 1, 2))


def test_processor_refuses_wrong_inputs():
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    processor = VideoMAEImageProcessor(size=32, crop_size=32)
    frame = np.zeros((40, 50, 3), dtype=np.uint8)
    video = [frame] * 4
    palette = [Image.fromarray(frame).convert("P")] * 4
    cases = [
        ([], {}, "need at least one array"),
        (frame, {}, r"videos: got frames of shape \(50, 3\)"),  # one image
        ([frame == 0] * 4, {}, "videos: got torch.bool"),
        ([frame + 0.5] * 4, {}, "do_rescale: got floats within"),
        ([frame.astype(int) + 256] * 4, {}, "videos: got torch.int64 up to 256"),
        ([frame[..., :2]] * 4, {}, r"videos: got frames of shape \(40, 50, 2\), .* 1 or 3"),
        (video, dict(input_data_format="channels_first"), "videos.*: got frames of shape"),
        ([frame, frame[:30]], {}, "must have the same shape"),  # NumPy's words
        ([video, video[:3]], dict(return_tensors="pt"), "to be equal size"),  # PyTorch's
        (palette, {}, "videos: got PIL images of mode {'P'}"),
        ([frame[..., :1]] * 4, {}, "image_mean: got .* per channel"),
        (video, dict(crop_size=48), "crop_size: got .* 48}, expected within 32 x 40"),
        (video, dict(resample=1), "resample: got 1"),
        (video, dict(size={"longest_edge": 3}), "size: got"),
        (video, dict(return_tensors="tf"), "return_tensors: got 'tf'"),
        (video, dict(data_format="NCHW"), "data_format: got 'NCHW'"),
    ]
    for videos, options, message in cases:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            processor(videos, **options)


def test_a_crop_does_not_depend_on_the_order_of_its_sides():
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    for crop_size in ({"height": 32, "width": 24}, {"width": 24, "height": 32}):
        processor = VideoMAEImageProcessor(size=32, crop_size=crop_size)
        assert processor(frames, return_tensors="pt").pixel_values.shape == (1, 2, 3, 32, 24)
