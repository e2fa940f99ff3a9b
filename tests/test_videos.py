"""Tests of tiny/ on users' videos: folders and lists, broken files, predictions.

    FUZZ=300 python -m pytest -q -s tests/test_videos.py     300 random lists and damaged videos
"""
import collections
import json
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.helpers import damage, turn_clockwise, write_video
from tiny import predict
from tiny.augment import crop_and_flip
from tiny.evaluate import probabilities
from tiny.folders import find_videos, split_videos
from tiny.videos import VideoClips, decode, decode_all, load_videos, read_frames, read_views, scan
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    denormalize,
    preprocess,
)

HERE = Path(__file__).parent.parent
SHARED = HERE.parent / "shared"
TINY = VideoMAEConfig.preset("tiny")
FUZZ = int(os.environ.get("FUZZ", 0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def ramp(frames):
    """(frames, 48, 64, 3) uint8; the colour of each frame encodes its time."""
    t = np.arange(frames)
    colours = np.stack([20 + 200 * t // frames, np.full(frames, 120), 200 - 150 * t // frames], 1)
    return np.tile(colours[:, None, None].astype(np.uint8), (1, 48, 64, 1))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# --------------------------------------------------------------------------------------------------
# Folders and lists


def split(folder, number=0):
    """-> [{(class name, file name)} of the training videos, and of the test videos]."""
    videos = find_videos(folder, number)
    parts = split_videos(folder, videos, {video.label for video in videos})
    return [{(video.label, video.file.name) for video in part} for part in parts]


def test_folders_split_by_group_by_lists_or_as_they_are(tmp_path, capsys):
    clips = [(g, c) for g in range(1, 7) for c in (1, 2)]
    names = [f"{name}/v_{name}_g{g:02}_c{c:02}.avi" for name in "AB" for g, c in clips]
    touch(tmp_path, *names, "A/notes.txt", "A/._v_A_g01_c01.avi")
    parts = split(tmp_path)
    groups = [{(name, file[4:7]) for name, file in part} for part in parts]
    assert groups[1] == {("A", "g01"), ("A", "g06"), ("B", "g01"), ("B", "g06")}
    assert not groups[0] & groups[1]
    assert [len(part) for part in parts] == [16, 8]
    with pytest.raises(ValueError, match="split: got 1"):
        split(tmp_path, 1)

    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for number, g in ((1, 1), (2, 5)):
        trained = "A/v_A_g02_c01.avi 1\nB/v_B_g02_c01.avi 2\nC/not_here.avi 3\n"
        (lists / f"trainlist0{number}.txt").write_text(trained)
        tested = "".join(f"{name}/v_{name}_g0{g}_c01.avi\n" for name in "AB")
        (lists / f"testlist0{number}.txt").write_text(tested)
        trained = {("A", "v_A_g02_c01.avi"), ("B", "v_B_g02_c01.avi")}
        tested = {("A", f"v_A_g0{g}_c01.avi"), ("B", f"v_B_g0{g}_c01.avi")}
        assert split(tmp_path, number) == [trained, tested]
        assert re.search("skipped: 1 .*C/not_here.avi", capsys.readouterr().out)
    assert split(tmp_path) == split(tmp_path, 1)
    with pytest.raises(ValueError, match="split: got 3"):
        split(tmp_path, 3)

    (tmp_path / "train.csv").write_text("B/v_B_g02_c01.avi 0\n\nA/v_A_g02_c01.avi 1\n")
    (tmp_path / "val.csv").write_text("A/v_A_g01_c01.avi 1\nB/v_B_g01_c01.avi 0\n")
    assert split(tmp_path) == [{("A", "v_A_g02_c01.avi"), ("B", "v_B_g02_c01.avi")},
                               {("A", "v_A_g01_c01.avi"), ("B", "v_B_g01_c01.avi")}]
    with pytest.raises(ValueError, match="split: got 2"):
        split(tmp_path, 2)


@pytest.mark.parametrize("name", ["test.csv", "ucfTrainTestlist", "testTrainMulti_7030_splits"])
def test_lists_that_cannot_be_followed_are_not_passed_over(tmp_path, name):
    """HMDB51's official lists, for instance."""
    touch(tmp_path, *(f"{split}{c}/{i}.avi" for split in ("", "train/", "test/")
                      for c in "AB" for i in (1, 2)))
    assert len(split(tmp_path)[1]) == 4
    touch(tmp_path, name if name.endswith(".csv") else f"{name}/A_test_split1.txt")
    with pytest.raises(ValueError, match=name):
        split(tmp_path)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_named_test_is_a_split_beside_train_and_otherwise_a_class(tmp_path, held_out):
    for name in ("A", held_out):
        touch(tmp_path / "classes", *(f"{name}/{i}.mp4" for i in (1, 2)))
        touch(tmp_path / "splits", f"train/{name}/1.mp4", f"{held_out}/{name}/2.MP4")
    assert split(tmp_path / "classes") == [{("A", "2.mp4"), (held_out, "2.mp4")},
                                           {("A", "1.mp4"), (held_out, "1.mp4")}]
    assert split(tmp_path / "splits") == [{("A", "1.mp4"), (held_out, "1.mp4")},
                                          {("A", "2.MP4"), (held_out, "2.MP4")}]


def test_folders_that_cannot_be_used_are_refused_before_anything_is_printed(tmp_path, capsys):
    def refused(match, folder=tmp_path, config=TINY):
        with pytest.raises(ValueError, match=match):
            load_videos(folder, config, 25.0, cache=tmp_path / "cache")

    refused("nowhere: got no videos", tmp_path / "nowhere")
    touch(tmp_path, "A/one.mp4", "A/two.mp4", "B/one.mp4")
    refused("no train video of class B")
    touch(tmp_path, "B/two.mp4")
    refused("num_channels: got 1", config=VideoMAEConfig.preset("tiny", num_channels=1))
    assert capsys.readouterr().out == "" and not (tmp_path / "cache").exists()


LAYOUTS = {  # {layout: {file: label in train.csv, if any}}
    "flat": {f"{i}.mp4": None for i in range(6)},
    "one class": {f"A/{i}.mp4": None for i in range(6)},
    "nested": {f"{c}/{day}/{i}.mp4": None for c in "AB" for day in "xy" for i in (1, 2)},
    "labels all 0": {f"{c}/{i}.mp4": 0 for c in "AB" for i in range(3)},
    "train and test": {f"{part}/{i}.mp4": None for part in ("train", "test") for i in range(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_videos_without_classes_can_be_pretrained_on(tmp_path, capsys, layout):
    lines = []
    for name, label in LAYOUTS[layout].items():
        write_video(tmp_path / name, ramp(9))
        lines += [f"{name} {label} -1\n"] * (label is not None)  # VideoMAE V2's form
    if lines:
        (tmp_path / "train.csv").write_text("".join(lines))
    clips, test_clips = load_videos(tmp_path, TINY, 25.0, cache=tmp_path / ".cache")
    assert len(clips.classes) < 2 and not clips.labels.any() and not test_clips.labels.any()
    assert len(clips.labels) + len(test_clips.labels) == len(LAYOUTS[layout])
    assert len(test_clips.labels) == {"train and test": 3}.get(layout, 2), "every fifth"
    assert clips.train_clips(torch.arange(3)).shape[:3] == (3, 8, 3)
    assert "pretraining only" in capsys.readouterr().out


def test_files_that_no_layout_uses_are_counted(tmp_path, capsys):
    for name in "AB":
        for i in (1, 2):
            write_video(tmp_path / f"{name}/{i}.mp4", ramp(9))
    touch(tmp_path, "A/3.gif", "A/4.ts", "A/deeper/5.mp4", "0.mp4", "B/6/1.jpg", "B/6/2.jpg",
          "B/6/3.jpg", "README.md", "B/.DS_Store")
    load_videos(tmp_path, TINY, 25.0, cache=tmp_path / ".cache")
    said = capsys.readouterr().out
    assert "4 videos, 2 classes" in said and "every fifth" in said
    others = said.partition("not used: ")[2].splitlines()[0]
    assert sorted(others.split(", ")) == ["1 .gif", "1 .ts", "2 .mp4", "3 .jpg"]


def test_the_class_is_the_label_and_a_folder_may_name_it(tmp_path):
    """Labels that fit their folders one to one are shown as the folders' names."""
    names = [f"{c}/{i}.mp4" for i in range(4) for c in "AB"]
    touch(tmp_path, *names)
    for labels, classes in ((list("01010101"), {"A", "B"}), (list("01010111"), {"0", "1"}),
                            (list("00111100"), {"0", "1"})):
        lines = [f"{name},{label}\n" for name, label in zip(names, labels, strict=True)]
        (tmp_path / "train.csv").write_text("".join(lines[:4]))
        (tmp_path / "test.csv").write_text("".join(lines[4:]))
        parts = split(tmp_path)
        assert {name for name, _ in parts[0]} == {name for name, _ in parts[1]} == classes


def write_lists(rng, folder) -> tuple[list, str]:
    """Write videos, train.csv and test.csv in a random form that docs/videos.md describes -> the
    result expected of `split`, and what the error says instead, "" if the lists are valid."""
    layout = rng.choice(["classes", "classes", "flat", "people", "splits"])
    is_folder = layout == "classes"
    how = rng.choice(["number", "from 1", "name"] + ["same", "none"] * is_folder)
    names = rng.sample(["jump", "golf swing", "Bogenschießen", "射箭", "A", "0"], 3)
    separator = rng.choice([" ", "  ", "\t", ",", ", ", ";", " ; "])
    prefix = rng.choice(["", "", "./", "/data of another/machine/", "C:\\videos\\", f"{folder}/"])
    tail = rng.choice(["", "", " ", separator, f"{separator}-1", f"{separator}0"])
    quote, slash = rng.choice(["", "", '"']), rng.choice("//\\")
    fault = rng.choice(["", "", "", "lost", "garbage", "both", "twice", "third", "bare"])
    if fault in ("twice", "third", "bare") and how in ("same", "none"):
        fault = ""
    if fault == "bare" and is_folder:
        fault = ""  # not a fault in this layout
    victim = rng.choice([number for number in range(3, 24) if number % 4])

    parts, lists, error = [set(), set()], [[], []], ""
    for number in range(24):
        is_test, k, is_bad = number % 4 == 0, number % 3, number == victim
        where = {"classes": names[k], "flat": "videos", "people": f"person {number % 5}",
                 "splits": ("train", "test")[is_test]}[layout]
        stem = rng.choice(["v_", "my clip ", "1.mp4 copy ", "ü,", "a;b #", "é é"])
        name = f"{stem}{number}.avi"
        touch(folder, f"{where}/{name}")
        means = names[k] if is_folder or how == "name" else str(k + (how == "from 1"))
        if not (is_bad and fault == "lost"):
            parts[is_test].add(("0" if how == "same" else means, name))

        path = f"{quote}{prefix}{where}/{name}{quote}".replace("/", slash)
        right, wrong = ({"number": i, "from 1": i + 1, "name": names[i], "same": 0}.get(how)
                        for i in (k, k - 1))
        line = path if right is None else f"{path}{separator}{right}{tail}"
        if is_test and is_folder and how != "same" and tail in ("", " ") and rng.random() < 0.5:
            line = path
        faulty = {
            "lost": line.replace(slash + name, rng.choice(["x", slash]) + slash + "x" + name),
            "bare": path, "third": f"{path}{separator}1{separator}77",
            "twice": f"{path}{separator}{wrong}{tail}", "garbage": "hello 5", "both": line}
        if is_bad and fault in ("lost", "bare", "third"):
            lists[0].append(faulty[fault])
        else:
            lists[is_test].append(line)
            if is_bad and fault:
                lists[fault == "both"].append(faulty[fault])
        if is_bad and fault not in ("", "lost"):
            error = "hello 5" if fault == "garbage" else name

    for file, lines in zip(("train.csv", "test.csv"), lists, strict=True):
        for extra in rng.choices(["", "   ", lines[0]], k=rng.randrange(4)):
            lines.insert(rng.randrange(2, len(lines) + 1), extra)
        if rng.random() < 0.5:
            lines.insert(0, rng.choice(["path,label", "video_name label", "file;class"]))
        text = "".join(line + rng.choice(["", "", " "]) + "\n" for line in lines)
        text = text.replace("\n", rng.choice(["\n", "\r\n"]))
        (folder / file).write_bytes(text.encode(rng.choice(["utf-8", "utf-8-sig"])))
    return parts, error


def test_lists_are_read_as_people_write_them(tmp_path):
    outcomes, wrong = collections.Counter(), []
    for number in range(FUZZ or 100):
        folder = tmp_path / str(number)
        expected, error = write_lists(random.Random(number), folder)
        try:
            got = split(folder)
            is_right, outcome = got == expected and not error, "read"
        except ValueError as refusal:
            got, outcome = str(refusal), "refused with folder and line"
            is_right = error and str(folder) in got and error in got
        outcomes[outcome if is_right else "wrong"] += 1
        if not is_right:
            wrong.append(f"{number}: got {got}, expected {error or expected}\n"
                         f"{(folder / 'train.csv').read_text()}")
    print(dict(outcomes))
    assert not wrong, "\n".join(wrong[:3])


# --------------------------------------------------------------------------------------------------
# Decoding


def test_odd_videos_are_read_and_broken_ones_reported(tmp_path, capsys):
    """Whatever can be decoded gives a clip."""
    video = ramp(40)
    video[:, :24] = 0  # the upper half is black
    folder = tmp_path / "A"
    write_video(folder / "good.avi", video)
    write_video(folder / "old.mpg", video, codec="mpeg1video")
    write_video(folder / "one frame.mp4", video[:1])
    write_video(folder / "five frames.mp4", video[:5])
    write_video(folder / "portrait.mp4", video.transpose(0, 2, 1, 3))
    write_video(folder / "turned.mp4", video)
    turn_clockwise(folder / "turned.mp4")
    write_video(folder / "grey.mkv", video, codec="ffv1", pix_fmt="gray")
    write_video(folder / "16 bit.mkv", video, codec="ffv1", pix_fmt="rgb48le")
    write_video(folder / "odd.mkv", video[:, :47, :63], codec="ffv1", pix_fmt="yuv444p10le")
    write_video(folder / "Bogenschießen 射箭.avi", video)
    whole = (folder / "good.avi").read_bytes()
    (folder / "truncated.avi").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("hello")
    files = [*sorted(folder.iterdir()), folder / "missing.mp4"]

    for height, width in ((32, 32), (32, 64), (48, 32)):
        decoded = decode_all(files, (height, width), 25.0, tmp_path / "cache")
        frames = {file.name: np.load(path) for file, path in decoded.items()}
        config = VideoMAEConfig.preset("tiny", image_size=(height, width))
        for one in frames.values():
            assert one.shape[1] >= height and one.shape[2] >= width, "covers the model's rectangle"
            assert one.shape[1] == height or one.shape[2] == width, "and no more"
        clips = VideoClips(["A"], torch.zeros(len(frames)), list(decoded.values()), config, views=2)
        windows = clips.train_clips(torch.arange(11))
        shared = tuple(np.min([one.shape[1:3] for one in frames.values()], axis=0))
        assert windows.shape == (11, 8, 3, *shared), "the smallest height and width"
        assert clips.prepare(windows).shape == (11, 8, 3, height, width)
        assert clips.test_views(3).shape == (2, 8, 3, height, width)

        lengths = {name: len(one) for name, one in frames.items()}
        assert lengths.pop("truncated.avi") in range(1, 40)
        assert lengths == {
            "good.avi": 40, "old.mpg": 40, "one frame.mp4": 1, "five frames.mp4": 5, "odd.mkv": 40,
            "portrait.mp4": 40, "turned.mp4": 40, "grey.mkv": 40, "16 bit.mkv": 40,
            "Bogenschießen 射箭.avi": 40,
        }
        skipped = re.findall(r"skipped: .*?(\w+\.mp4)", capsys.readouterr().out)
        assert sorted(skipped) == ["empty.mp4", "missing.mp4", "text.mp4"], "each of them once"
    turned = np.load(decode(folder / "turned.mp4", (32, 32), 25.0, tmp_path))[0].astype(int)
    assert turned.shape[0] > turned.shape[1]
    assert turned[:, -8:].mean() < 30 < turned[:, :8].mean(), "black on the right"


def test_decoded_frames_match_the_video(tmp_path):
    """Colours and order survive decoding, and a short video repeats its last frame."""
    write_video(tmp_path / "one.mp4", ramp(6))
    decoded = decode(tmp_path / "one.mp4", (32, 32), 25.0, tmp_path)
    clips = VideoClips(["A"], torch.zeros(1), [decoded], TINY)
    clip = clips.train_clips(torch.tensor([0]))[0]  # (8, 3, 32, 43)
    expected = torch.from_numpy(ramp(6)[[0, 1, 2, 3, 4, 5, 5, 5], 0, 0]).float()
    assert (clip.float().mean(dim=(2, 3)) - expected).abs().max() < 6
    time = decoded.stat().st_mtime_ns
    assert decode(tmp_path / "one.mp4", (32, 32), 25.0, tmp_path) == decoded
    assert decoded.stat().st_mtime_ns == time, "decoded once"


def seconds_seen(path, length, fps):
    """The time of each frame of a video made of `ramp`, read off its colour."""
    red = np.stack(list(read_frames(path, (32, 32), scan(path, fps)[0])))[..., 0].mean(axis=(1, 2))
    return (red - 20) / 200 * length


def test_sampling_follows_time_not_frame_numbers(tmp_path):
    """The same two seconds at 25, 30 and 60 fps, and at a rate that changes, give the same frames,
    to within one frame of the video."""
    for rate in (25, 30, 60):
        write_video(tmp_path / f"{rate}.mp4", ramp(2 * rate), rate=rate)
    stamps = np.concatenate([np.arange(0, 500, 40), np.arange(500, 2000, 100)])  # milliseconds
    frames = ramp(2000)[stamps]
    write_video(tmp_path / "changes.mkv", frames, rate=1000, stamps=stamps)
    for name, slowest in (("25.mp4", 25), ("30.mp4", 30), ("60.mp4", 60), ("changes.mkv", 10)):
        seen = seconds_seen(tmp_path / name, 2.0, 6.25)
        assert len(seen) in (12, 13), name
        expected = np.arange(len(seen)) / 6.25
        assert np.abs(seen - expected).max() < 1 / slowest + 0.04, name  # 0.04 for compression
    assert len(seconds_seen(tmp_path / "25.mp4", 2.0, 50)) in (99, 100), "frames are repeated"


@pytest.mark.parametrize("name, first", [
    ("a.mp4", 0), ("live.mkv", 0), ("a.mpg", 0), ("a.mkv", 2500), ("a.webm", 2500),
    ("a.avi", 2500), ("a.mp4", 2500), ("a.mpg", 2500)])
def test_views_are_spread_evenly_whatever_the_first_timestamp(tmp_path, name, first):
    """Training, testing and `predict` see the same frames of a 20 s video, whether its timestamps
    begin at 0 or at 100 s."""
    path, frames = tmp_path / name, ramp(500)
    codec = {".webm": "libvpx", ".mpg": "mpeg1video"}.get(path.suffix, "mpeg4")
    live = {"live": "1"} if name == "live.mkv" else {}  # the header has no duration
    write_video(path, frames, codec=codec, stamps=np.arange(500) + first, **live)
    views = read_views(path, TINY, 25.0, views=4)  # (4, 8, 3, 32, 32)
    starts = (np.arange(4) + 0.5) / 4 * (500 - 8)
    expected = preprocess(frames[starts.round().astype(int)], TINY)[:, :, 0, 0]
    assert (views[:, 0].mean(dim=(2, 3)) - expected).abs().max() < 0.07

    clips = VideoClips(["A"], torch.zeros(1), [decode(path, (32, 32), 25.0, tmp_path)], TINY, 4)
    assert len(np.load(clips.videos[0])) in range(499, 502)
    assert (clips.test_views(0) - views).abs().max() < 0.07


def test_windows_are_random_and_views_are_not(tmp_path):
    """A video whose colours encode time and column shows what each clip contains."""
    video = np.zeros((50, 32, 96, 3), dtype=np.uint8)
    video[..., 0] = 5 * np.arange(50)[:, None, None]
    video[..., 1] = 2 * np.arange(96)
    np.save(tmp_path / "video.npy", video)
    clips = VideoClips(["A"], torch.zeros(1), [tmp_path / "video.npy"], TINY, views=2, flip=False)
    expected = preprocess(video[10:18], TINY), preprocess(video[32:40], TINY)
    assert torch.equal(clips.test_views(0), torch.stack(expected)), "1/4 and 3/4 of the 43 starts"

    index = torch.zeros(600, dtype=torch.int64)
    windows = clips.train_clips(index)  # (600, 8, 3, 32, 96)
    starts = windows[:, 0, 0, 0, 0] // 5
    assert set(starts.tolist()) == set(range(43)), "every possible start"
    assert (windows[:, :, 0, 0, 0].int().diff(dim=1) == 5).all(), "consecutive frames"
    drawn = 255 * denormalize(clips.prepare(windows).movedim(2, -1))  # (600, 8, 32, 32, 3)
    assert (drawn[..., 0].diff(dim=1) - 5).abs().max() < 1e-3, "all frames are cropped alike"
    columns = drawn[:, 0, 0, :, 1] / 2  # (600, 32)
    assert columns[:, 0].min() < 4 and columns[:, -1].max() > 91, "crops reach both sides"
    assert columns[:, 0].unique().numel() > 40
    assert (columns.diff(dim=1) >= 0).all(), "not mirrored"

    torch.manual_seed(1)
    again = [clips.train_clips(index[:4]), torch.manual_seed(1) and clips.train_clips(index[:4])]
    assert torch.equal(*again), "drawn from torch's global generator"
    clips.flip = True
    mirrored = clips.prepare(windows)[:, 0, 1, 0].diff(dim=1).sum(dim=1) < 0
    assert 240 < mirrored.sum() < 360


def test_crops_are_rectangles_of_the_frame():
    """With x encoded in red and y in green, a crop's colours show which rectangle it is."""
    frames = torch.zeros(2000, 2, 3, 40, 60)
    frames[:, :, 0], frames[:, :, 1] = torch.arange(60) + 0.5, torch.arange(40)[:, None] + 0.5
    for height, width in ((32, 32), (16, 48), (64, 32), (40, 60)):
        crops = crop_and_flip(frames, height, width, flip=False)
        assert crops.shape == (2000, 2, 3, height, width)
        assert torch.equal(crops[:, 0], crops[:, 1]), "all frames are cropped alike"
        x, y = crops[:, 0, 0, 8], crops[:, 0, 1, :, 8]  # (2000, width), (2000, height)
        pixel_w, pixel_h = (x[:, -9] - x[:, 8]) / (width - 17), (y[:, -9] - y[:, 8]) / (height - 17)
        largest = min(40 / height, 60 / width)
        scales = torch.stack([pixel_w, pixel_h], dim=1) / largest
        steps = (scales[..., None] - torch.tensor([1, 0.875, 0.75, 0.66])).abs().min(dim=-1)
        assert steps.values.max() < 1e-3
        assert steps.indices.diff(dim=1).abs().max() == 1
        assert len(steps.indices.unique(dim=0)) == 10, "all pairs of scales at most a step apart"
        left, top = x[:, 8] - 8.5 * pixel_w, y[:, 8] - 8.5 * pixel_h
        room_x, room_y = 60 - width * pixel_w, 40 - height * pixel_h
        for place, room in ((left, room_x), (top, room_y)):
            assert place.min() > -1e-3 and (place - room).max() < 1e-3, "within the frame"
            if room.max() > 1:
                share = (place / room)[room > 1]
                assert share.min() < 0.02 and share.max() > 0.98, "up to its edges"


# --------------------------------------------------------------------------------------------------
# What a header says


def encode(path, frames, codec="mpeg4", pix_fmt="yuv420p", **settings):
    """Like write_video, with settings of PyAV's codec context."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def first_frame(path, image_hw=(48, 48)):
    """-> (H, W, 3) int64."""
    return np.load(decode(path, image_hw, 25.0, path.parent / "cache"))[0].astype(int)


@pytest.mark.parametrize("with_video", [True, False])
def test_cover_art_is_not_the_video(tmp_path, with_video):
    """As the first stream, where FFmpeg lists it if the tags come first, and as the only one."""
    path, frames = tmp_path / "song.mp4", ramp(40)
    with av.open(str(path), "w") as container:
        if with_video:
            video = container.add_stream("mpeg4", rate=25)
            video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        else:
            sound = container.add_stream("aac", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt, cover.disposition = 64, 64, "yuvj420p", 1024
        for frame in frames if with_video else ():
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8), format="rgb24")
        for stream in (cover, video if with_video else sound):
            container.mux(stream.encode(picture) if stream is cover else [])
            container.mux(stream.encode())

    content = path.read_bytes()
    tags = content.index(b"udta") - 4  # move them before the tracks
    first = content.find(b"trak") - 4
    if with_video:
        path.write_bytes(content[:first] + content[tags:] + content[first:tags])
        with av.open(str(path)) as container:
            assert len(container.streams.video) == 2 and container.streams.video[0].disposition
        assert len(np.load(decode(path, (32, 32), 25.0, tmp_path))) == 40
        assert (read_views(path, TINY, 25.0)[:, :, 1] < 1).all(), "not white"
    else:
        with pytest.raises(ValueError, match=f"{path}: got no video"):
            decode(path, (32, 32), 25.0, tmp_path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_pixels_become_square(tmp_path, name):
    """A circle that is stored squeezed comes out round, in the cache and in `predict`."""
    y, x = np.mgrid[:96, :72]
    disc = np.hypot(2 * (x - 35.5), y - 47.5) < 36  # 36 x 72 stored pixels
    frames = np.repeat(255 * disc[None, ..., None].astype(np.uint8), 3, axis=3).repeat(10, axis=0)
    encode(tmp_path / name, frames, sample_aspect_ratio=Fraction(2))
    for height, width in ((48, 48), (48, 72)):
        frame = first_frame(tmp_path / name, (height, width))[..., 1] > 127
        assert frame.shape == (48, 72)
        assert frame.any(axis=0).sum() in (35, 36, 37) and frame.any(axis=1).sum() in (35, 36, 37)
    views = read_views(tmp_path / name, VideoMAEConfig.preset("tiny", image_size=48), 25.0)
    bright = views[0, 0, 1] > 0  # (48, 48)
    assert abs(bright.any(0).sum() - bright.any(1).sum()) <= 1
    encode(tmp_path / name, frames, sample_aspect_ratio=Fraction(40))
    with pytest.raises(ValueError, match=f"{name}: got pixels 40"):
        first_frame(tmp_path / name)


def test_a_frame_is_turned_and_mirrored_as_its_matrix_says(tmp_path):
    """All eight ways in which a phone may store a frame."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:24, :32, 0] = frame[:24, 32:, 1] = frame[24:, :32, 2] = 255  # red, green / blue, black
    write_video(tmp_path / "a.mp4", frame[None])
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"tkhd") + 44  # see turn_clockwise
    for a, b, c, d in ((1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                       (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)):
        content[at : at + 36] = struct.pack(">9i", *(x << 16 for x in (a, b, 0, c, d, 0, 0, 0, 1)))
        path = tmp_path / f"{a} {b} {c} {d}.mp4"
        path.write_bytes(content)
        shown = first_frame(path)
        h, w = shown.shape[:2]
        assert (w > h) == (b == 0)
        for y, x, colour in ((-1, -1, 0), (-1, 1, 1), (1, -1, 2)):  # quarters of the stored frame
            row, column = (h + (b * x + d * y) * h // 2) // 2, (w + (a * x + c * y) * w // 2) // 2
            assert shown[row, column].argmax() == colour and shown[row, column].max() > 150


def test_what_an_editor_trimmed_is_not_seen(tmp_path):
    """An edit list hides the first 0.8 s. They were replaced by copies of the first frame shown."""
    path = tmp_path / "trimmed.mp4"
    write_video(path, ramp(100), codec="libx264", gop=100)
    content = bytearray(path.read_bytes())
    at, scale = content.index(b"elst"), content.index(b"mdhd") + 16
    start = struct.unpack_from(">i", content, at + 16)[0]
    start += int(0.8 * struct.unpack_from(">I", content, scale)[0])
    struct.pack_into(">Ii", content, at + 12, 3200, start)  # milliseconds shown, start
    path.write_bytes(content)
    seen = seconds_seen(path, 4.0, 25.0)
    assert len(seen) == 80 and np.abs(seen - np.arange(20, 100) / 25).max() < 0.08


def test_colours_follow_the_standard_that_the_file_names(tmp_path):
    """BT.709, the standard of HD video, in its usual and in its full range."""
    y, u, v = 0.2126 * 200 + 0.7152 * 60 + 0.0722 * 30, 0, 0
    u, v = (30 - y) / 1.8556, (200 - y) / 1.5748
    for name, levels, color_range in (("tv.mp4", (16 + y * 219 / 255, 128 + u * 224 / 255,
                                                  128 + v * 224 / 255), 1),
                                      ("pc.mp4", (y, 128 + u, 128 + v), 2)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            frame = av.VideoFrame(64, 48, "yuv420p")
            for part in (stream.codec_context, frame):
                part.colorspace, part.color_range = 1, color_range
            for plane, level in zip(frame.planes, levels, strict=True):
                plane.update(bytes([round(level)]) * plane.buffer_size)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert np.abs(first_frame(tmp_path / name) - (200, 60, 30)).max() < 6, name


def test_what_players_treat_differently_is_reported_once(tmp_path, capsys):
    encode(tmp_path / "interlaced.mpg", ramp(20), "mpeg2video", flags=1 << 18)
    encode(tmp_path / "HDR.mp4", ramp(20), "libx264", color_trc=18)
    encode(tmp_path / "transparent.mkv", ramp(20), "ffv1", "yuva420p")
    encode(tmp_path / "ordinary.mp4", ramp(20))
    for path in tmp_path.glob("*.m*"):
        first_frame(path)
        read_views(path, TINY, 25.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for kind in ("interlaced", "HDR", "transparent"):
        assert sum(f"/{kind}.m" in line and f": {kind};" in line for line in lines) == 1


# --------------------------------------------------------------------------------------------------
# Damaged files


CODECS = {"h264.mp4": "libx264", "mpeg4.avi": "mpeg4",
          "vp9.webm": "libvpx-vp9", "vp8.mkv": "libvpx"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{name: a video of 120 frames with a key frame every 30}."""
    folder, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    frames = ramp(120) // 2 + rng.integers(0, 90, (120, 48, 64, 3), dtype=np.uint8)
    for name, codec in CODECS.items():
        write_video(folder / name, frames, codec=codec, gop=30)
    return {name: folder / name for name in CODECS}


def frames_to_the_first_error(path):
    count = 0
    with av.open(str(path)) as container:
        try:
            for _ in container.decode(video=0):
                count += 1
        except av.FFmpegError:
            pass
    return count


def test_damaged_packets_cost_few_frames_and_are_reported(whole, tmp_path, capsys):
    """All frames before the first error are read, and so is every intact group of frames."""
    kinds = {
        "one": lambda i, is_key: i == 50,
        "every 50th": lambda i, is_key: i % 50 == 7,
        "the first": lambda i, is_key: i == 0,
        "a key frame": lambda i, is_key: is_key and 0 < i < 50,
        "some": lambda i, is_key: rng.random() < 0.02,
        "many": lambda i, is_key: rng.random() < 0.3,
    }
    outcomes = collections.Counter()
    for number in range(FUZZ or 24):
        rng, name = random.Random(number), list(CODECS)[number % 4]
        kind = list(kinds)[number // 4 % 6]
        path = tmp_path / f"{number} {name}"
        flags = damage(whole[name], path, kinds[kind])
        starts = [i for i, (is_key, _) in enumerate(flags) if is_key]
        groups = [flags[i:j] for i, j in pairwise([*starts, len(flags)])]
        intact = sum(len(group) for group in groups if not any(bad for _, bad in group))
        before = frames_to_the_first_error(path)
        count = sum(is_damaged for _, is_damaged in flags)
        try:
            frames = np.load(decode(path, (32, 32), 25.0, tmp_path))
        except ValueError as error:
            assert str(path) in str(error) and intact == before == 0
            outcomes[kind, name, "refused"] += 1
            continue
        said = capsys.readouterr().out
        read = 120
        if count:
            reported = re.search(rf"{path}: (\d+) of 120 packets damaged, (\d+) frames read", said)
            assert int(reported[1]) >= count
            read = int(reported[2])
        assert read >= max(intact, before) and len(frames) >= before
        if kind == "one":
            assert "1 of 120 packets damaged, 119 frames read" in said and len(frames) == 120
        outcomes[kind, name, "more" if read > before else "as many as before"] += 1
    if FUZZ:
        print(*outcomes.items(), sep="\n")


def test_a_broken_file_does_not_cost_a_class_its_test_video(tmp_path, capsys):
    """The first readable group of a class is for testing."""
    data = tmp_path / "data"
    for name in "AB":
        for g in (1, 2, 3):
            frames = ramp(4 + g + 3 * (name == "B"))
            write_video(data / f"{name}/v_{name}_g{g:02}_c01.avi", frames)
    broken = data / "B/v_B_g01_c01.avi"
    broken.write_bytes(b"not a video")
    train_clips, test_clips = load_videos(data, TINY, 25.0, cache=tmp_path / "cache")
    assert train_clips.classes == ["A", "B"]
    assert (train_clips.labels.tolist(), test_clips.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert not set(train_clips.videos) & set(test_clips.videos)
    said = capsys.readouterr().out
    assert said.count(str(broken)) == 1 and "5 of 6 videos" in said
    assert "3 of 5 videos have fewer than 8 frames" in said
    (data / "B/v_B_g02_c01.avi").write_bytes(b"nor this one")
    with pytest.raises(ValueError, match="no train video of class B"):
        load_videos(data, TINY, 25.0, cache=tmp_path / "cache")


def test_a_full_disk_is_refused_unless_all_videos_are_cached(tmp_path, monkeypatch):
    for name in "AB":
        write_video(tmp_path / f"{name}/1.mp4", ramp(100))
    files, cache = sorted(tmp_path.glob("*/*")), tmp_path / "cache"
    disk = collections.namedtuple("disk", "free")
    size = 2 * 100 * 32 * 43 * 3
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(size - 1))
    with pytest.raises(ValueError, match=r"cache: got 0.0 GB free, expected 0.0 GB"):
        decode_all(files, (32, 32), 25.0, cache)
    assert not list(cache.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(size))
    decoded = decode_all(files, (32, 32), 25.0, cache)
    assert sum(np.load(path).nbytes for path in decoded.values()) == size, "the estimate was exact"
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(0))
    assert decode_all(files, (32, 32), 25.0, cache) == decoded


def test_memory_does_not_grow_with_the_length(tmp_path):
    write_video(tmp_path / "long.mp4", ramp(3000))
    tracemalloc.start()
    decoded = decode(tmp_path / "long.mp4", (32, 32), 25.0, tmp_path)
    read_views(tmp_path / "long.mp4", TINY, 25.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.load(decoded, mmap_mode="r").nbytes > 12e6 > 6 * peak


def test_a_killed_decode_leaves_no_cache_entry(tmp_path):
    write_video(tmp_path / "long.mp4", ramp(3000))
    code = "from tiny.videos import *; decode(Path('long.mp4'), (32, 32), 25.0, 'cache')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": str(HERE)})
    while not list(tmp_path.glob("cache/*.tmp")):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("cache/*.npy"))
    decoded = decode(tmp_path / "long.mp4", (32, 32), 25.0, tmp_path / "cache")
    assert np.load(decoded, mmap_mode="r").shape == (3000, 32, 43, 3)


# --------------------------------------------------------------------------------------------------
# Predicting


@pytest.fixture
def finetuned(tmp_path):
    """The folder of a run with an untrained classifier of blue and red."""
    names = {0: "blue", 1: "赤"}
    extra = dict(fps=25.0, views=2)
    config = VideoMAEConfig.preset("tiny", id2label=names, use_mean_pooling=True, extra=extra)
    model = VideoMAEForVideoClassification(config)
    model.save_pretrained(tmp_path / "run/finetuned")
    return tmp_path / "run"


def test_predict_goes_on_after_a_broken_video(finetuned, tmp_path, capsys):
    write_video(tmp_path / "good.mp4", ramp(40))
    (tmp_path / "broken.mp4").write_text("hello")
    os.symlink("good.mp4", os.fsencode(tmp_path) + b"/\xff.mp4")
    videos = [*map(str, sorted(tmp_path.glob("*.mp4"))), str(tmp_path / "missing.mp4")]
    command = [sys.executable, "-m", "tiny.predict", finetuned, *videos]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)
    assert done.returncode == 1
    shares = r"\n +\d+\.\d %  .*\n +\d+\.\d %  .*\n"
    assert re.fullmatch(rf".*/good.mp4{shares}.*/\\udcff.mp4{shares}", done.stdout)
    assert done.stdout.count("blue") == done.stdout.count(r"\u8d64") == 2
    assert done.stderr.splitlines() == [
        f"{tmp_path}/broken.mp4: cannot be decoded (Invalid data found when processing input)",
        f"{tmp_path}/missing.mp4: no such file"]


def test_predict_agrees_with_evaluation(finetuned, tmp_path, capsys):
    write_video(tmp_path / "good.mp4", ramp(40))
    assert predict.main(finetuned, str(tmp_path / "good.mp4")) == 0
    said = capsys.readouterr().out
    model = VideoMAEForVideoClassification.from_pretrained(finetuned / "finetuned")
    decoded = decode(tmp_path / "good.mp4", (32, 32), 25.0, tmp_path)
    clips = VideoClips(["blue", "赤"], torch.zeros(1, dtype=torch.int64), [decoded], TINY, views=2)
    shares = probabilities(model, clips)[0]
    for name, share in zip(clips.classes, shares, strict=True):
        assert f"{100 * share:5.1f} %  {name}\n" in said


def test_predict_refuses_a_model_that_is_not_fine_tuned(tmp_path):
    VideoMAEForPreTraining(TINY).save_pretrained(tmp_path / "run/pretrained")
    with pytest.raises(ValueError, match="run/pretrained: got a model without a classifier"):
        predict.main(tmp_path / "run/pretrained", "video.mp4")


@pytest.mark.parametrize("fields", [
    dict(id2label={"0": "ejection"}), dict(problem_type="multi_label_classification")])
def test_predict_refuses_what_is_not_a_choice_between_classes(tmp_path, fields):
    config = VideoMAEConfig.preset("tiny", use_mean_pooling=True)
    VideoMAEForVideoClassification(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | fields))
    with pytest.raises(ValueError, match="num_labels: got 1|problem_type: got 'multi_label"):
        predict.main(tmp_path, "video.mp4")


# --------------------------------------------------------------------------------------------------
# Real clips


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real clips in ../shared")
@pytest.mark.parametrize("name, sizes", [("weizmann", (60, 30)), ("ucf101_mini", (58, 23))])
def test_real_clips(tmp_path, name, sizes):
    train_clips, test_clips = load_videos(SHARED / name, TINY, 12.5, cache=tmp_path)
    assert (len(train_clips.labels), len(test_clips.labels)) == sizes
    clips = train_clips.train_clips(torch.arange(20))
    assert clips.shape[:3] == (20, 8, 3) and min(clips.shape[3:]) == 32 and clips.float().std() > 20
    tested = [video for video in find_videos(SHARED / name) if video.split == "test"]
    for index in (0, 9, -1):
        views = read_views(tested[index].file, TINY, 12.5)
        assert torch.equal(views, test_clips.test_views(index)), "predict uses the test's views"
