"""Memory and time for long videos: decoding into the cache, a batch of clips, `predict`.

    python benchmarks/long_videos.py          2, 20 and 60 minutes; they are made first

Videos of 320 x 240 at 25 frames per second, H.264, of a wall that a camera pans over; clips of the
`laptop` recipe, 16 frames of 112 x 112. Memory is the peak of a process, libraries included.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import resource, sys, time
from pathlib import Path
import torch
from tiny.videos import LongVideo, VideoClips, decode
from tiny.evaluate import probabilities
from train_tiny import Recipe
from videomae import VideoMAEConfig, VideoMAEForVideoClassification

what, video, config = sys.argv[1], Path(sys.argv[2]), VideoMAEConfig.preset("laptop")
if what == "batch":
    decoded = decode(video, 112, Recipe())
start = time.perf_counter()
if what == "decode":
    size = decode(video, 112, Recipe()).stat().st_size / 1e6
    print(f"cache {size:.0f} MB,", end=" ")
elif what == "batch":
    clips = VideoClips(["A"], [decoded], torch.zeros(1, dtype=torch.int64), config, Recipe())
    clips.load(torch.zeros(16, dtype=torch.int64), torch.rand(16, 4))
else:
    model = VideoMAEForVideoClassification(config).eval()
    probabilities(model, LongVideo(video, config, Recipe()))
seconds = time.perf_counter() - start
print(f"{seconds:.2f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
"""


def make_video(path: Path, minutes: int):
    rng = np.random.default_rng(0)
    wall = Image.fromarray(rng.integers(0, 256, (80, 110, 3), dtype=np.uint8)).resize((1100, 800))
    wall = np.asarray(wall)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(minutes * 60 * 25):
            x, y = int(390 + 380 * np.sin(i / 40)), int(280 + 270 * np.sin(i / 61))
            picture = np.ascontiguousarray(wall[y : y + 240, x : x + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def main():
    print("| minutes | decode | 16 clips to train on | predict, 5 times x 3 crops |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for minutes in (2, 20, 60):
            video, cells = Path(folder, f"{minutes}.mp4"), []
            make_video(video, minutes)
            for what in ("decode", "batch", "predict"):
                done = subprocess.run([sys.executable, "-c", CODE, what, video], cwd=folder,
                                      env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                cells.append(re.sub(r"\s+", " ", done.stdout).strip())
            print(f"| {minutes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
