"""Find the videos of a folder, their classes, and the split into training and test videos.

Lists may take any of the forms in common use that are not ambiguous; see docs/videos.md.
"""
import os
import re
from collections import Counter, defaultdict
from pathlib import Path, PurePath
from typing import NamedTuple

SUFFIXES = ".avi .mp4 .mkv .webm .mov .m4v .mpg .mpeg .wmv .flv .3gp".split()
ENDINGS = "|".join(map(re.escape, SUFFIXES))

# A line of a list holds a path and usually a label, as in `A/1.avi 0`. Commas or tabs may separate
# them, and there may be quotes, a third column or a comment.
LINE = re.compile(rf"""["']?(.+(?:{ENDINGS}))["']?(?:[\s,;]+(.*?))?[\s,;]*(?:\s#.*)?""", re.I)


class Video(NamedTuple):
    """One video file of a folder."""
    file: Path
    label: str  # its class
    split: str  # "train", "test", or "" if its group decides
    place: tuple[Path, int] | None = None  # list file, line number


def find_videos(folder: Path, split: int = 1) -> list[Video]:
    """The videos of a folder, in the first of these layouts that it has:

    1. train.csv and test.csv (or val.csv): the authors' lists
    2. ucfTrainTestlist/: UCF101's lists; `split` is their number
    3. train/Class/* and test/Class/* (or val/Class/*)
    4. Class/*
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    train, test, val = (folder / f"{name}.csv" for name in ("train", "test", "val"))
    if train.exists() or test.exists() or val.exists():
        return read_lists(folder, train, val if val.exists() and not test.exists() else test)
    official = folder / "ucfTrainTestlist"
    if official.is_dir():
        train, test = (official / f"{name}list{split:02}.txt" for name in ("train", "test"))
        return read_lists(folder, train, test)
    for name in ("test", "val"):
        if (folder / "train").is_dir() and (folder / name).is_dir():
            return videos_in(folder / "train", "train") + videos_in(folder / name, "test")
    return videos_in(folder)


def videos_in(folder: Path, split: str = "") -> list[Video]:
    """The videos in Class/* of a folder."""
    return [Video(file, file.parent.name, split) for file in sorted(folder.glob("*/*"))
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def split_videos(folder: Path, videos: list[Video], classes) -> tuple[list[Video], list[Video]]:
    """-> the videos to train on and those to test on.

    Unless lists or folders decide, every fifth group of a class is for testing. A group is a single
    file, or the files that share a `_g07_` in their names, as in UCF101."""
    train, test, groups = [], [], defaultdict(dict)
    for video in videos:
        match, known = re.search(r"_g\d+_", video.file.name), groups[video.label]
        number = known.setdefault(match[0] if match else video.file.name, len(known))
        is_test = video.split == "test" or not video.split and number % 5 == 0
        (test if is_test else train).append(video)
    for name, part in (("train", train), ("test", test)):
        if missing := sorted(set(classes) - {video.label for video in part}):
            names = ", ".join(missing)
            raise ValueError(f"{folder}: no {name} video of class {names} can be read, "
                             "expected at least one (without lists or train and test folders, "
                             "two groups per class)")
    return train, test


# ---- Lists --------------------------------------------------------------------------------------

def read_lists(folder: Path, train: Path, test: Path) -> list[Video]:
    """The videos in two lists, without duplicates.

    A video's class is its folder, or its label if each list has all its files in one folder or if
    most labels do not follow the folders."""
    listed = read_list(folder, train, "train") + read_list(folder, test, "test")
    videos = {}
    pairs = [(video, videos.setdefault(video.file.resolve(), video)) for video in listed]
    refuse("files are in both lists", [x for x, y in pairs if x.split != y.split], listed)
    refuse("files have two labels", [x for x, y in pairs if x.label != y.label], listed)

    videos = list(videos.values())
    odd, folders = odd_labels(videos), {(video.split, video.file.parent) for video in videos}
    if len(folders) > 2 and 2 * len(odd) <= len(videos):
        refuse("labels do not fit the folders of their files", odd, videos)
        return [video._replace(label=video.file.parent.name) for video in videos]
    refuse("files have no label", [video for video in videos if not video.label], videos)
    return videos


def odd_labels(videos: list[Video]) -> list[Video]:
    """Those whose label is unusual for their folder, or whose folder is unusual for their label."""
    pairs = Counter((video.file.parent.name, video.label) for video in videos if video.label)
    usual = [pair for pair, _ in pairs.most_common()][::-1]  # in a dict, the last entry wins
    label_of, folder_of = dict(usual), {label: name for name, label in usual}
    if len(folder_of) == 1:
        return []  # VideoMAE V2's pretraining lists label every video 0
    return [video for video in videos if video.label
            and (label_of[video.file.parent.name] != video.label
                 or folder_of[video.label] != video.file.parent.name)]


def read_list(folder: Path, path: Path, split: str) -> list[Video]:
    """The videos in a list, with its labels."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a list of {split} videos")
    lines = path.read_text("utf-8-sig", "surrogateescape").splitlines()
    lines = [Video(line.strip(), "", split, (path, i)) for i, line in enumerate(lines, start=1)]
    lines = [line for line in lines if line.file and not line.file.startswith("#")]
    if lines and not re.search(r"[\d/\\.]", lines[0].file):
        del lines[0]  # a header

    matches = [LINE.fullmatch(line.file) for line in lines]
    unclear = [line for line, match in zip(lines, matches, strict=True) if not match]
    refuse(f"lines do not start with a path ({' '.join(SUFFIXES)})", unclear, lines)
    columns = [re.split(r"\s*[,;\t]\s*|\s+(?=-?\d)", match[2] or "") for match in matches]
    odd = [line for line, x in zip(lines, columns, strict=True) if x[1:] != columns[0][1:]]
    refuse("lines differ from the first in their third column", odd, lines)

    files = [locate(match[1], folder) for match in matches]
    lost = [line for line, file in zip(lines, files, strict=True) if not file]
    # UCF101's lists cover all its classes, but many people download only some.
    if lost and path.suffix == ".txt" and not any((folder / x.file).parent.is_dir() for x in lost):
        print(f"skipped: {describe('files belong to classes without a folder', lost, lines)}")
        lost = []
    refuse("files not found", lost, lines)
    labels = [re.sub(r"^0*(\d+)(\.0*)?$", r"\1", x[0].strip("\"'")) for x in columns]  # 1.0 is 1
    return [line._replace(file=file, label=label)
            for line, file, label in zip(lines, files, labels, strict=True) if file]


def locate(name: str, folder: Path) -> Path | None:
    """The file for a path in a list, even one from another machine: FOLDER/A/1.avi for
    /data/videos/A/1.avi."""
    parts = PurePath(name.replace("\\", "/")).parts
    files = (folder.joinpath(*parts[i:]) for i in range(len(parts)))
    return next(filter(os.path.isfile, files), None)


def refuse(reason: str, bad: list[Video], listed: list[Video]):
    """Raise ValueError if a list has bad lines."""
    if bad:
        raise ValueError(describe(reason, bad, listed))


def describe(reason: str, bad: list[Video], listed: list[Video]) -> str:
    """A message with the number of bad lines in a list, and the first of them."""
    path, number = bad[0].place
    count, total = (sum(video.place[0] == path for video in part) for part in (bad, listed))
    return f"{path}: {count} of {total} {reason}; the first is line {number}: {bad[0].file}"
