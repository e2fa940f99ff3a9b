"""Videos from a folder: found, split, decoded once into a cache, and sampled as clips.

Wrong input raises a ValueError that names the option or the file.
"""
import contextlib
import hashlib
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import write_whole
from tiny.augment import multi_scale_crop
from videomae import VideoMAEConfig

SUFFIXES = ".avi .mp4 .mkv .webm .mov .m4v .mpg .mpeg .wmv .flv .3gp".split()

# A file, whose folder is its class, and its side: "train", "test", or "" if its scene decides.
Video = tuple[Path, str]


def load_videos(config: VideoMAEConfig, recipe) -> list["VideoClips"]:
    """The videos of the recipe's folder, those to train on and those to test on."""
    videos = find_videos(Path(recipe.data), recipe.split)
    classes = sorted({file.parent.name for file, _ in videos})
    if len(classes) < 2:
        raise ValueError(f"--data: got {classes or 'no video'} in {recipe.data}, expected the "
                         f"videos of two classes or more, Class/*{{{','.join(SUFFIXES)}}}")
    split_videos(videos, classes)  # what cannot be split is refused before hours of decoding
    decoded = decode_all(sorted({file for file, _ in videos}), config.image_hw[0], recipe)

    # Split anew without the broken files: one of them could be all that a class has for testing.
    clips = []
    for files in split_videos([video for video in videos if video[0] in decoded], classes):
        labels = torch.tensor([classes.index(file.parent.name) for file in files])
        clips.append(VideoClips(classes, [decoded[file] for file in files], labels, config, recipe))
    return clips


def find_videos(folder: Path, split: int) -> list[Video]:
    """The videos of a folder. The first of these layouts counts:

    1. Class/* and lists: train.csv and test.csv (or val.csv), as the authors have them, but the
       folder says the class, and the number in a line does not
    2. Class/* and UCF101's lists in ucfTrainTestlist/, of which `split` is followed
    3. train/Class/* and test/Class/* (or val/Class/*)
    4. Class/*
    """
    held_out = "test" if any((folder / f"test{end}").exists() for end in ("", ".csv")) else "val"
    official = f"ucfTrainTestlist/{{}}list{split:02}.txt"
    layouts = {  # what is there -> where the two sides are
        "train.csv": ("train.csv", f"{held_out}.csv"),
        "ucfTrainTestlist": (official.format("train"), official.format("test")),
        held_out: ("train", held_out),
    }
    for name, (train, test) in layouts.items():
        if (folder / name).exists():
            sides = {"train": folder / train, "test": folder / test}
            return [(file, side) for side in sides for file in videos_in(sides[side], folder)]
    return [(file, "") for file in videos_in(folder, folder)]


def videos_in(place: Path, folder: Path) -> list[Path]:
    """Sorted: the files Class/* of a place or, where it is a list, those it names in `folder`."""
    if place.suffix in (".csv", ".txt"):
        # A line is a path, and perhaps a space and the number of the class.
        names = re.findall(r"^(.+?)(?: \d+)? *$", place.read_text(), re.MULTILINE)
        files = [folder / name for name in names]
        return sorted(file for file in files if file.parent.is_dir())  # of the classes here
    return [file for file in sorted(place.glob("*/*"))
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def split_videos(videos: list[Video], classes: list[str]) -> tuple[list[Path], list[Path]]:
    """-> files to train on and files to test on. Without lists, every fifth scene of a class is for
    testing. A scene is a UCF101 group, `_g07_` in the names, or else a single file."""
    sides, scenes = {"train": [], "test": []}, defaultdict(dict)
    for file, side in videos:
        group = re.search(r"_g\d+_", file.name)
        known = scenes[file.parent.name]
        number = known.setdefault(group[0] if group else file.name, len(known))
        sides[side or ("train" if number % 5 else "test")].append(file)
    for side, files in sides.items():
        if missing := set(classes) - {file.parent.name for file in files}:
            raise ValueError(f"--data: no {side} video of class {', '.join(sorted(missing))} that "
                             "can be read, expected one at least (a class needs two scenes)")
    return sides["train"], sides["test"]


def decode_all(files: list[Path], short_side: int, recipe) -> dict[Path, Path]:
    """Every readable file -> {file: its decoded frames}. Broken ones are named and left out."""
    seconds = [duration(file) for file in files]
    used = sum(min(x, 60 * recipe.max_minutes) for x in seconds)
    gigabytes = 4 * short_side**2 * used * recipe.fps / 1e9  # 3 bytes a pixel, if they are 4:3
    print(f"cache: {recipe.cache}/, about {gigabytes:.2f} GB for {used / 60:.1f} of "
          f"{sum(seconds) / 60:.1f} minutes of video, the first {recipe.max_minutes:g} of each")
    if gigabytes > recipe.cache_gb:
        raise ValueError(f"--cache-gb: got {recipe.cache_gb}, but {gigabytes:.1f} GB of frames are "
                         "expected; fewer videos, --fps or --max-minutes make it less")

    def attempt(file):
        try:
            return file, decode(file, short_side, recipe)
        except (ValueError, FileNotFoundError) as error:
            print(f"left out: {error}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = tqdm(pool.map(attempt, files), "decoding", len(files), leave=False, disable=None)
        return dict(filter(None, done))


def decode(file: Path, short_side: int, recipe) -> Path:
    """A video -> a .npy file of its frames, (frames, H, W, 3) uint8 with min(H, W) = short_side, as
    many a second as the recipe says. It is decoded once: the cache knows its path, size and time.
    """
    stat = file.stat()
    key = file.resolve(), stat.st_size, stat.st_mtime_ns, short_side, recipe.fps, recipe.max_minutes
    name = hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()
    cached = Path(recipe.cache, f"{name}.npy")

    def write(out):
        frames = read_frames(file, short_side, recipe.fps)
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{file}: cannot be decoded, expected a video")
        # The number of frames is known at the end: numpy leaves room for it in the header.
        header = dict(descr="|u1", fortran_order=False, shape=(0, *first.shape))
        np.lib.format.write_array_header_1_0(out, header)
        frames = islice(chain([first], frames), round(60 * recipe.max_minutes * recipe.fps))
        for count, frame in enumerate(frames, start=1):
            out.write(frame)
            header["shape"] = count, *first.shape
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, header)

    if not cached.exists():
        write_whole(cached, write)
    return cached


def read_frames(file: Path, short_side: int, fps: float, start: float = 0.0):
    """Yield the frames on screen `start`, start + 1 / fps, ... seconds into a video, each (H, W, 3)
    uint8; a truncated file yields what can be decoded."""
    reformatter = av.video.reformatter.VideoReformatter()  # one for all frames: six times as fast
    with contextlib.suppress(av.FFmpegError, IndexError), open_video(file) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:  # an unknown codec: decoding would crash
            return
        rate, origin = float(stream.average_rate or 25), (stream.start_time or 0) * stream.time_base
        if start:
            container.seek(int((start + origin) * av.time_base))  # to a key frame before it
        wanted, size = start, None
        for number, frame in enumerate(container.decode(stream)):
            time = number / rate if frame.time is None else float(frame.time - origin)
            if time + 0.5 / rate < wanted:
                continue
            if size is None:
                sides = frame.width, frame.height
                size = [max(short_side, round(short_side * x / min(sides))) for x in sides]
            pixels = reformatter.reformat(frame, *size, "rgb24").to_ndarray()
            # A phone held upright stores lying frames, and by how many degrees to turn them.
            pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
            wanted = max(wanted, time - 1)  # a jump in time is not filled
            while wanted <= time + 0.5 / rate:
                yield pixels
                wanted += 1 / fps


def open_video(file: Path):
    """PyAV's container. Texts in it, such as titles, are not used and may be damaged."""
    return av.open(str(file), metadata_errors="ignore")


def duration(file: Path) -> float:
    """Seconds; 0 for what is no video."""
    with contextlib.suppress(av.FFmpegError, IndexError), open_video(file) as container:
        if container.duration:
            return container.duration / av.time_base
        packets = container.demux(container.streams.video[0])  # a recorder did not write it down
        return max((float(p.pts * p.time_base) for p in packets if p.pts is not None), default=0.0)
    return 0.0


class VideoClips:
    """Clips of a config's frames and size, from decoded videos (.npy files)."""

    def __init__(self, classes: list[str], videos: list[Path], labels: Tensor,
                 config: VideoMAEConfig, recipe):
        self.classes, self.videos, self.labels = classes, videos, labels
        self.size, self.num_frames = config.image_hw[0], config.num_frames
        self.views, self.crops = recipe.views, recipe.crops
        self.num_views = recipe.views * recipe.crops

    def load(self, indices: Tensor, random: Tensor | None = None, view: int = 0) -> Tensor:
        """indices (B,) -> (B, T, 3, H, W) uint8.

        random (B, 4), in [0, 1]: the scale, top, left and start time of a crop, for training.
        None: one of the views for testing, the whole shorter side at `views` times and at `crops`
        places along the longer side.
        """
        if random is None:
            time, place = divmod(view, self.crops)
            place = place / (self.crops - 1) if self.crops > 1 else 0.5
            crops = [(0.0, place, place, (time + 0.5) / self.views)] * len(indices)
        else:
            crops = random.tolist()
        clips = [multi_scale_crop(self.window(self.videos[index], time), self.size, crop)
                 for index, (*crop, time) in zip(indices.tolist(), crops, strict=True)]
        return torch.stack(clips)

    def window(self, video: Path, time: float) -> Tensor:
        """-> (T, 3, H, W). time is from 0, the first possible start, to 1, the last."""
        frames = np.load(video, mmap_mode="r")  # only what is used is read
        start = round(time * max(0, len(frames) - self.num_frames))
        return hold_last(frames[start : start + self.num_frames], self.num_frames)


class LongVideo(VideoClips):
    """One video to classify, of any length: only its windows are decoded."""

    def __init__(self, file: Path, config: VideoMAEConfig, recipe):
        super().__init__([""], [file], torch.zeros(1, dtype=torch.int64), config, recipe)
        self.fps, self.seconds = recipe.fps, duration(file)
        self.window = cache(self.window)  # its crops share it

    def window(self, video: Path, time: float) -> Tensor:
        """-> (T, 3, H, W), likewise."""
        start = time * max(0.0, self.seconds - self.num_frames / self.fps)
        for second in (start, 0.0):  # a truncated video is shorter than it says
            frames = read_frames(video, self.size, self.fps, second)
            if frames := list(islice(frames, self.num_frames)):
                return hold_last(frames, self.num_frames)
        raise ValueError(f"{video}: cannot be decoded, expected a video")


def hold_last(frames, count: int) -> Tensor:
    """Frames (H, W, 3) -> (count, 3, H, W); the last is held where they are too few."""
    index = np.minimum(np.arange(count), len(frames) - 1)
    return torch.from_numpy(np.stack(frames)[index]).permute(0, 3, 1, 2)
