"""Fuzz tests: every corrupted file gives a sound result, or an error that names the file.

    python -m pytest -q tests/test_fuzz.py                    takes seconds
    FUZZ=10000 python -m pytest -q -s tests/test_fuzz.py      10,000 mutations; takes minutes

A mutation changes bytes, truncates the file, removes or repeats a part of it, or gives a field of a
JSON file a value of the wrong type or an absurd size.
"""
import collections
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from processor import VideoMAEImageProcessor
from tests.helpers import write_video
from tiny.videos import decode, read_views
from videomae import VideoMAEConfig, VideoMAEForPreTraining, normalize, random_mask

COUNT = int(os.environ.get("FUZZ", 400))
GOLDEN = Path(__file__).parent / "golden"
ODD_VALUES = [None, True, -1, 0, 1, 3, 0.5, 7.5, 10**6, 10**12, 1e308, float("nan"), "", "gelu",
              "7", [], [4], [4, 4, 4], {}, {"a": 1}, {"height": 0, "width": -3}, [[1]], "\ud800"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """-> the folder, and {name of a file to mutate: the function that reads it}."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(GOLDEN / "hf_pretrain_tiny", folder / "model")
    golden = torch.load(GOLDEN / "mcg_nju_pretrain_tiny.pt", weights_only=True)
    config = VideoMAEConfig(**golden["config"], use_mean_pooling=False)
    torch.save(golden["checkpoint"], folder / "new.pth")
    torch.save(golden["checkpoint"], folder / "old.pth", _use_new_zipfile_serialization=False)
    frames = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    for name in ("video.avi", "video.mp4"):
        write_video(folder / name, frames)

    def model(path):
        run(VideoMAEForPreTraining.from_pretrained(path.parent))

    def authors_file(path):
        run(VideoMAEForPreTraining.from_pretrained(path, config=config))

    def processor(path):
        processor = VideoMAEImageProcessor.from_pretrained(path.parent)
        clip = processor(list(frames), return_tensors="pt").pixel_values
        assert clip.dtype == torch.float32 and clip.ndim == 5

    def video(path):
        config = VideoMAEConfig.preset("tiny")
        decoded = np.load(decode(path, config.image_hw, 25.0, path.parent / "cache"))
        assert decoded.dtype == np.uint8 and decoded.shape[3] == 3 and min(decoded.shape) > 0
        clips = read_views(path, config, 25.0, views=2)
        assert len(clips) in (1, 2) and clips.isfinite().all()  # a damaged view is skipped
        assert clips.shape[1:] == (8, 3, 32, 32)

    return folder, {
        "model/model.safetensors": model, "model/config.json": model, "new.pth": authors_file,
        "old.pth": authors_file, "model/preprocessor_config.json": processor,
        "video.avi": video, "video.mp4": video}


@torch.no_grad()
def run(model):
    """Run a clip through the model, because a model that loads must also work."""
    config = model.config
    clip = torch.zeros(1, config.num_frames, config.num_channels, *config.image_hw)
    mask = random_mask("tube", 1, config.grid, 0.5)
    if config.num_channels == 3:
        clip = normalize(clip.byte())
    assert model(clip, mask).logits.shape[-1] == config.patch_dim


def mutate(content: bytes, is_json: bool, rng: random.Random) -> bytes:
    if is_json and rng.random() < 0.7:
        values = json.loads(content)
        names = [*values, "num_labels", "qv_bias", "position_grid", "layer_norm_eps", "extra",
                 "pruned_heads", "do_pad", "image_processor_type"]
        for _ in range(rng.choice((1, 1, 2))):
            values[rng.choice(names)] = rng.choice(ODD_VALUES)
        return json.dumps(values).encode()
    out = bytearray(content)
    # Damage matters most in headers, so two thirds of the mutations are near an end.
    near = rng.choice((len(out), 300, 3000))
    at = rng.randrange(min(near, len(out))) if rng.random() < 0.8 else -rng.randrange(
        1, min(near, len(out)))
    kind = rng.randrange(5)
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        part = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        out[at : at + len(part)] = part
    elif kind == 2:
        del out[at:]
    elif kind == 3:
        del out[at : at + rng.randrange(1, 40)]
    else:
        out[at:at] = out[at : at + rng.randrange(1, 40)]
    return bytes(out)


def test_every_mutation_is_read_or_refused(sources, tmp_path):
    folder, readers = sources
    outcomes, wrong = collections.Counter(), []
    for number in range(COUNT):
        name = list(readers)[number % len(readers)]
        rng = random.Random(f"{number} {os.environ.get('FUZZ_SEED', 0)}")
        work = tmp_path / str(number)
        work.mkdir()
        path = work / Path(name).name
        if "/" in name:
            shutil.copytree(folder / "model", work, dirs_exist_ok=True)
        path.write_bytes(mutate((folder / name).read_bytes(), name.endswith("json"), rng))
        start = time.perf_counter()
        try:
            readers[name](path)
            outcome = "read"
        except (ValueError, TypeError) as error:
            text = str(error)
            outcome = "refused"
            is_named = str(path) in text or f"{work}: " in text or text.startswith("crop_size: ")
            if not is_named:
                outcome = f"does not name the file: {type(error).__name__}: {text[:200]}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        if time.perf_counter() - start > 15:
            outcome = "took over 15 s"
        outcomes[name, outcome if outcome in ("read", "refused") else "wrong"] += 1
        if outcome not in ("read", "refused"):
            wrong.append(f"{number} {name}: {outcome}")
        shutil.rmtree(work)
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{name}: {count} {outcome}")
    assert not wrong, "\n".join(wrong[:40])
