"""Decode videos once into a cache and sample clips from them. tiny/folders.py finds the videos.

Memory does not grow with a video's length. Invalid input raises a ValueError with the path.
"""
import contextlib
import functools
import hashlib
import math
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import write_atomic
from tiny.augment import crop_and_flip, cut
from tiny.folders import SUFFIXES, Video, find_videos, split_videos
from videomae import VideoMAEConfig, frame_indices, normalize, preprocess

COVER_ART = av.stream.Disposition.attached_pic
# Damaged tags do no harm. PyAV 19 and later need not be told.
OPEN = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
print_once = functools.cache(print)


def load_videos(folder, config: VideoMAEConfig, fps: float, split: int = 0, views: int = 5,
                flip: bool = True, cache="runs/.cache") -> tuple["VideoClips", "VideoClips"]:
    """A folder of videos -> training clips and test clips, at `fps` frames per second. With fewer
    than two classes, they are for pretraining only.

    split: 1 to 3, for UCF101. views: per test video. flip: mirror training clips at random."""
    videos = find_videos(Path(folder), split)
    names = {video.label for video in videos}
    classes = sorted(names, key=lambda name: (len(name) * name.isdigit(), name))  # 2 before 10
    if not videos:
        raise ValueError(f"{folder}: got no videos, expected some that end in {' '.join(SUFFIXES)}")
    if config.num_channels != 3:
        raise ValueError(f"num_channels: got {config.num_channels}, expected 3 for videos")
    split_videos(folder, videos, classes)  # fails on a bad split before hours of decoding
    print(describe(Path(folder), videos, classes))
    decoded = decode_all([video.file for video in videos], config.image_hw, fps, cache)

    # Split again without the broken files, which may include a class's only test video.
    clips = []
    readable = [video for video in videos if video.file in decoded]
    for part in split_videos(folder, readable, classes):
        labels = torch.tensor([classes.index(video.label) for video in part])
        files = [decoded[video.file] for video in part]
        clips.append(VideoClips(classes, labels, files, config, views, flip))
    lengths = [len(np.load(path, mmap_mode="r")) for path in decoded.values()]
    if short := sum(length < config.num_frames for length in lengths):
        print(f"{short} of {len(lengths)} videos have fewer than {config.num_frames} frames at "
              f"{fps:g} fps; their last frame is repeated")
    return tuple(clips)


def describe(folder: Path, videos: list[Video], classes: list[str]) -> str:
    """What was found in a folder, how it was split, and which files have no place in its layout."""
    found = f"{len(classes)} classes from {classes[0]} to {classes[-1]}"
    if len(classes) < 2:
        found = "no classes, which is enough for pretraining only"
    how = "as its lists or folders say" if videos[0].split else "every fifth group for testing"
    used = {video.file.resolve() for video in videos}
    unused = Counter(file.suffix for file in folder.rglob("[!.]*.*")
                     if file.suffix not in (".csv", ".txt", ".md") and file.is_file()
                     and file.resolve() not in used)
    others = ", ".join(f"{count:,} {suffix}" for suffix, count in unused.most_common())
    return f"{folder}: {len(videos):,} videos, {found}; split: {how}; not used: {others or 'none'}"


# ---- Decoding -----------------------------------------------------------------------------------

def decode_all(files: list[Path], image_hw, fps: float, cache) -> dict[Path, Path]:
    """Videos -> {video: .npy file of its frames}. Those that cannot be decoded are skipped."""
    def missing(file):
        """Bytes that a video will add to the cache."""
        if cache_path(file, image_hw, fps, cache).exists():
            return 0
        times, (h, w) = scan(file, fps)
        return 3 * len(times) * math.prod(cover(h, w, *image_hw))

    sizes = for_each(missing, files, "measuring")
    Path(cache).mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()) / 1e9, shutil.disk_usage(cache).free / 1e9
    if new := sum(size > 0 for size in sizes.values()):
        print(f"decoding {new} of {len(files)} videos into {cache}/: needs about "
              f"{needed:.2f} GB, {free:.1f} GB free")
    if needed > free:
        raise ValueError(f"{cache}: got {free:.1f} GB free, expected {needed:.1f} GB for decoded "
                         "frames; use fewer videos or a lower fps")
    return for_each(lambda file: decode(file, image_hw, fps, cache), list(sizes), "decoding")


def for_each(function, files: list[Path], text: str) -> dict:
    """-> {file: function(file)}, in threads. Files that cannot be read are reported and skipped."""
    def attempt(file):
        try:
            return file, function(file)
        except (ValueError, FileNotFoundError) as error:
            print(f"skipped: {error}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(pool.map(attempt, files), text, len(files), leave=False, disable=None)
        return dict(filter(None, results))


def cache_path(file: Path, image_hw, fps: float, cache) -> Path:
    """The path of a video's decoded frames, which changes whenever the video does. 2 is the version
    of what `decode` writes."""
    stat = file.stat()
    key = repr((2, file.resolve(), stat.st_size, stat.st_mtime_ns, image_hw, float(fps)))
    return Path(cache, hashlib.blake2b(key.encode(), digest_size=12).hexdigest() + ".npy")


def decode(file: Path, image_hw, fps: float, cache="runs/.cache") -> Path:
    """Decode a video, once, into a .npy file of (frames, H, W, 3) uint8 at `fps` frames per second,
    scaled to just cover image_hw."""
    def write(out):
        count = 0
        out.seek(128)  # the size of numpy's header, which holds the number of frames
        for frame in read_frames(file, image_hw, scan(file, fps)[0]):
            out.write(frame)
            count += 1
        if not count:
            raise ValueError(f"{file}: no frame can be decoded")
        out.seek(0)
        header = dict(descr="|u1", fortran_order=False, shape=(count, *frame.shape))
        np.lib.format.write_array_header_1_0(out, header)

    path = cache_path(file, image_hw, fps, cache)
    if not path.exists():
        write_atomic(path, write)
    return path


@contextlib.contextmanager
def open_video(file: Path):
    """-> PyAV's container, the video stream that a player shows, its frame rate, which a header may
    get wrong, and the width / height of its pixels."""
    if not os.path.exists(file):
        raise ValueError(f"{file}: no such file")
    try:
        with av.open(str(file), **OPEN) as container:
            stream = container.streams.best("video")
            if not stream or not stream.codec_context or stream.disposition & COVER_ART:
                raise ValueError(f"{file}: got no video stream that can be decoded")
            pixel = round(float(stream.sample_aspect_ratio or 1), 2)  # 1.003 is a rounding error
            if not 0.2 < pixel < 5:
                raise ValueError(f"{file}: got pixels {pixel} times as wide as high")
            yield container, stream, max(1.0, float(stream.average_rate or 25)), pixel
    except av.FFmpegError as error:
        raise ValueError(f"{file}: cannot be decoded ({error.strerror})") from error


def packets_of(container, stream):
    """The packets of a stream, up to where the file is cut off."""
    with contextlib.suppress(av.FFmpegError):
        yield from container.demux(stream)


def scan(file: Path, fps: float) -> tuple[np.ndarray, tuple[int, float]]:
    """Find, without decoding, the times in seconds that sample a file at `fps` frames per second,
    and the frames' (H, W). The first time need not be 0. Gaps of over a second are skipped."""
    with open_video(file) as (container, stream, rate, pixel):
        # Packets to discard hold what an editor has trimmed.
        stamps = [packet.dts if packet.pts is None else packet.pts
                  for packet in packets_of(container, stream)
                  if packet.size and not packet.is_discard]
        unit, size = float(stream.time_base), (stream.height, stream.width * pixel)
    if not stamps:
        raise ValueError(f"{file}: got no frames")
    times = np.sort([i / rate if x is None else x * unit for i, x in enumerate(stamps)])
    steps = np.diff(times, prepend=times[:1])
    elapsed = np.where(steps > 1, 1 / rate, steps).cumsum()
    count = int((elapsed[-1] + 0.5 / rate) * fps) + 1
    return np.interp(np.arange(count) / fps, elapsed, times), size


def cover(h: float, w: float, height: int, width: int) -> tuple[int, int]:
    """The size of a frame (h, w) scaled to just cover (height, width)."""
    scale = max(height / h, width / w)
    return max(height, round(scale * h)), max(width, round(scale * w))


def read_frames(file: Path, image_hw, times: np.ndarray, seek: bool = False):
    """Yield the frame shown at each time, (H, W, 3) uint8, all of one size, upright and with square
    pixels.

    seek: start at the key frame before the first time, not at the beginning. Without an index, this
    may end at a later key frame. Then nothing is yielded."""
    reformatter = av.video.reformatter.VideoReformatter()  # reuse makes it six times as fast
    done, size = 0, None
    with open_video(file) as (container, stream, rate, pixel):
        if seek:
            with contextlib.suppress(av.FFmpegError):
                container.seek(int(times[0] * av.time_base))
        for number, frame in enumerate(frames_of(file, container, stream)):
            time = number / rate if frame.time is None else frame.time
            if seek and number == 0 and (frame.time is None or time > times[0] + 0.5 / rate):
                return
            done = max(done, np.searchsorted(times, time - 1))
            count = np.searchsorted(times, time + 0.5 / rate, side="right") - done
            if count <= 0:
                continue
            if size is None:
                report(file, frame, stream)
                # Phones store how they were held: x' = a x + c y, y' = b x + d y.
                matrix = frame.side_data.get("DISPLAYMATRIX", np.eye(3, dtype=np.int32))
                a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
                turned = abs(b) > abs(a)
                across, down = (c, b) if turned else (a, d)
                size = cover(frame.height, frame.width * pixel, *image_hw[:: -1 if turned else 1])
            pixels = reformatter.reformat(frame, size[1], size[0], "rgb24").to_ndarray()
            pixels = pixels.swapaxes(0, 1) if turned else pixels
            pixels = pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
            yield from count * [np.ascontiguousarray(pixels)]
            done += count


def frames_of(file: Path, container, stream):
    """Yield PyAV's frames. Damaged packets are skipped and reported."""
    packets = frames = damaged = 0
    try:
        for packet in packets_of(container, stream):
            packets += packet.size > 0
            try:
                for frame in packet.decode():
                    frames += 1
                    yield frame
            except av.FFmpegError:
                damaged += 1
    finally:
        if damaged:
            print(f"{file}: {damaged} of {packets} packets damaged, {frames} frames read")


def report(file: Path, frame, stream):
    """Say, once, what players treat differently."""
    kinds = {
        "interlaced": frame.interlaced_frame,
        "transparent": any(part.is_alpha for part in frame.format.components),
        "HDR": stream.codec_context.color_trc in (16, 18),  # PQ and HLG
    }
    if found := [kind for kind, is_found in kinds.items() if is_found]:
        print_once(f"{file}: {', '.join(found)}; the pixels are used as they are stored")


# ---- Sampling -----------------------------------------------------------------------------------

@dataclass
class VideoClips:
    """Clips of decoded videos, a data set as described in tiny/__init__.py."""

    classes: list[str]
    labels: Tensor  # (videos,) int64
    videos: list[Path]  # .npy files
    config: VideoMAEConfig
    views: int = 5
    flip: bool = True

    def train_clips(self, indices: Tensor) -> Tensor:
        """(B,) -> (B, T, 3, h, w) uint8: random windows. Different shapes are cropped, at a
        random place, to the smallest height and width."""
        windows = [self.window(index, torch.rand(()).item()) for index in indices.tolist()]
        height, width = (min(x.shape[dim] for x in windows) for dim in (-2, -1))
        return torch.stack([cut(window, height, width) for window in windows])

    def prepare(self, frames: Tensor) -> Tensor:
        """(B, T, 3, h, w) uint8 -> (B, T, 3, H, W) pixel_values, cropped and mirrored at random."""
        return crop_and_flip(normalize(frames), *self.config.image_hw, self.flip)

    def test_views(self, index: int) -> Tensor:
        """-> (V, T, 3, H, W) pixel_values of windows spread evenly over the video."""
        starts = (np.arange(self.views) + 0.5) / self.views  # 0.1, 0.3, 0.5, 0.7, 0.9
        windows = [self.window(index, start) for start in starts]
        return torch.stack([preprocess(frames, self.config) for frames in windows])

    def window(self, index: int, start: float) -> Tensor:
        """-> (T, 3, h, w) uint8. start: 0 for the earliest window to 1 for the latest."""
        frames = np.load(self.videos[index], mmap_mode="r")  # only the window is read
        chosen = frame_indices(len(frames), self.config.num_frames, stride=1, start=start)
        return torch.from_numpy(frames[chosen.numpy()]).permute(0, 3, 1, 2)


def read_views(file: Path, config: VideoMAEConfig, fps: float, views: int = 5) -> Tensor:
    """A video of any length -> (V, T, 3, H, W) pixel_values as from VideoClips.test_views, decoding
    only around their frames. Views that cannot be decoded are skipped."""
    def decoded(wanted, seek):
        frames = read_frames(file, config.image_hw, wanted, seek)
        return list(islice(frames, config.num_frames))

    times, clips = scan(file, fps)[0], []
    for start in (np.arange(views) + 0.5) / views:
        wanted = times[frame_indices(len(times), config.num_frames, 1, start).numpy()]
        # Some files can only be read from their beginning.
        if frames := decoded(wanted, seek=True) or decoded(wanted, seek=False):
            chosen = frame_indices(len(frames), config.num_frames, stride=1)
            clips.append(preprocess([frames[i] for i in chosen], config))
    if not clips:
        raise ValueError(f"{file}: no frame can be decoded")
    return torch.stack(clips)
