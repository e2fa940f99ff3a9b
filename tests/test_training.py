"""train_tiny.py as a user runs it: repeated, killed, in several processes, on videos, misused."""
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_tiny
from tests.helpers import write_video
from tiny.evaluate import percent
from tiny.muon import Muon
from tiny.synthetic import HELD_OUT_SEEDS, SyntheticClips
from train_tiny import Recipe
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    normalize,
    random_mask,
)

HERE = Path(__file__).parent.parent
TINY = VideoMAEConfig.preset("tiny")


def command(*arguments, cwd, processes=1):
    """-> (exit status, stdout + stderr)."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher * (processes > 1), HERE / "train_tiny.py", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def succeed(*arguments, **options):
    status, output = command(*arguments, **options)
    assert status == 0, output
    return output


def losses(folder):
    """metrics.jsonl -> {(stage, step): loss}; every step is there once."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {(m["stage"], m["step"]): m["loss"] for m in metrics}
    assert len(result) == len(metrics)
    return result


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text())


SHORT = ["--unlabelled-clips", 128, "--test-clips", 64, "--pretrain-steps", 60,
         "--pretrain-batch", 16, "--finetune-steps", 3, "--scratch-steps", 4]
FILES = {"summary.json", "metrics.jsonl", "settings.json", "table.md", "curves.png",
         "reconstruction.gif", "pretrained", "finetuned"}


def test_a_run_learns_leaves_its_files_and_repeats(tmp_path):
    summaries = []
    for name in ("a", "b"):
        succeed(*SHORT, "--name", name, cwd=tmp_path)
        names = {file.name for file in (tmp_path / "runs" / name).iterdir()}
        assert names == FILES
        summaries.append(read_summary(tmp_path / "runs" / name))
    first, second = summaries
    assert first["pretrain_loss_last"] < first["pretrain_loss_first"] - 0.1
    assert first.keys() >= {"finetune_top1", "scratch_full_time_top1", "linear_probe_top1",
                            "pretrain_loss_last", "seconds", "device", "majority_top1"}
    for summary in summaries:
        del summary["seconds"], summary["recipe"]["name"]
    assert first == second, "the same seed gives the same numbers"
    assert losses(tmp_path / "runs/a") == losses(tmp_path / "runs/b")

    # The saved models are the trained ones.
    model = VideoMAEForPreTraining.from_pretrained(tmp_path / "runs/a/pretrained")
    clips = SyntheticClips(64, model.config, seed=9).clips
    mask = random_mask("frame", 64, model.config.grid, 0.75)
    loss = model(normalize(clips), mask).loss.item()
    assert abs(loss - first["pretrain_loss_last"]) < 0.08
    classifier = VideoMAEForVideoClassification.from_pretrained(tmp_path / "runs/a/finetuned")
    test_clips = SyntheticClips(64, model.config, HELD_OUT_SEEDS["test"])
    predictions = classifier(normalize(test_clips.clips)).logits.argmax(dim=1)
    assert percent(predictions == test_clips.labels) == first["finetune_top1"]

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs/a").rglob("*")}
    status, output = command(*SHORT, "--name", "a", cwd=tmp_path)
    assert status != 0 and "--name" in output and "exists already" in output
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs/a").rglob("*")}


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "--data: got no video in nowhere"),
    (["--model", "gigantic"], "preset: got 'gigantic'"),
    (["--mask", "diagonal"], "kind: got 'diagonal'"),
    (["--mask-ratio", "0.01"], "mask_ratio: 0.01 masks 0"),
    (["--pretrain-steps", "0"], "--pretrain-steps: got 0"),
    (["--labels-per-class", "50", "--unlabelled-clips", "100"], "--labels-per-class: got 50"),
    (["--accumulate", "7"], "-batch: got"),
    (["--accumulate", "0"], "--accumulate: got 0"),
    (["--precision", "fp8"], "--precision: got 'fp8'"),
    (["--optimizer", "sgd"], "--optimizer: got 'sgd'"),
    (["--resume", "nowhere"], "nowhere/settings.json"),
    (["--resume", "runs", "--seed", "3"], "--resume: takes no other option"),
    (["--validate", "--data", "videos"], "--validate: a folder has no validation clips"),
    (["finetune"], "--init: finetune needs a model"),
    (["predict", "--init", "nowhere"], "VIDEO: got 0"),
    (["--init", "x/y", "--model", "tiny"], "--init: its weights say the model"),
    (["--init", "x/y", "--image-size", "64"], "--init: its weights say the model and its size"),
    (["finetune", "--init", "nowhere"], "source: nowhere is neither here nor on the hub"),
])
def test_bad_options_stop_the_run_before_it_starts(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train_tiny.main(arguments)
    assert not (tmp_path / "runs").exists()


def test_a_run_does_not_take_the_folder_of_one_started_meanwhile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_data, other = train_tiny.load_data, tmp_path / "runs/synthetic-1"

    def while_another_run_starts(*arguments):
        other.mkdir(parents=True)
        return load_data(*arguments)

    monkeypatch.setattr(train_tiny, "load_data", while_another_run_starts)
    with pytest.raises(FileExistsError, match="synthetic-1"):
        train_tiny.main(list(map(str, SHORT)))
    assert not any(other.iterdir())


TOY = ["--unlabelled-clips", 96, "--test-clips", 16, "--pretrain-steps", 30, "--finetune-steps", 12,
       "--scratch-steps", 6, "--pretrain-batch", 16,
       "--finetune-batch", 16, "--drop-path", 0.2, "--checkpoint-every", 4]


def test_killed_at_any_moment_a_run_resumes_to_the_same_losses(tmp_path):
    """kill -9, three times, each some steps after the last; then Ctrl-C; then to the end."""
    succeed(*TOY, "--name", "whole", cwd=tmp_path)
    expected = losses(tmp_path / "runs/whole")
    assert len(expected) == 30 + 12 + 6
    rng = np.random.default_rng()  # another moment in every run of this test
    arguments, metrics = [*TOY, "--name", "killed"], tmp_path / "runs/killed/metrics.jsonl"
    for kill in range(4):
        process = subprocess.Popen(
            [sys.executable, HERE / "train_tiny.py", *map(str, arguments)], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and not (
            metrics.exists() and len(metrics.read_text().splitlines()) >= 10 * (kill + 1)
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL if kill < 3 else signal.SIGINT)
        output = process.communicate()[0]
        arguments = ["--resume", "runs/killed"]
    if process.returncode == 130:
        assert "To go on: python train_tiny.py --resume runs/killed" in output, output
    succeed(*arguments, cwd=tmp_path)
    assert losses(tmp_path / "runs/killed") == expected
    folders = tmp_path / "runs/whole", tmp_path / "runs/killed"
    whole, killed = map(read_summary, folders)
    for summary in (whole, killed):
        del summary["seconds"], summary["recipe"]["name"]
    assert whole == killed
    for name in ("pretrained", "finetuned"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in folders)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert {file.name for file in (tmp_path / "runs/killed").iterdir()} == FILES, "nothing else"
    output = succeed("--resume", "runs/killed", cwd=tmp_path)
    assert "pretrain: loss" not in output and "fine-tuned" in output, "it was finished"


def test_two_processes_and_two_parts_give_the_losses_of_one(tmp_path):
    """The same total batch: in two processes, in two parts, and with activations computed again."""
    options = [*TOY, "--drop-path", 0, "--scratch-steps", 0, "--pretrain-steps", 12,
               "--finetune-steps", 8]
    ways = {"one": ([], 1), "two": ([], 2),
            "parts": (["--accumulate", 2, "--activation-checkpointing"], 1)}
    for name, (more, processes) in ways.items():
        succeed(*options, *more, "--name", name, cwd=tmp_path, processes=processes)
    one = losses(tmp_path / "runs/one")
    for name in ("two", "parts"):
        other = losses(tmp_path / "runs" / name)
        assert other.keys() == one.keys() and len(one) == 20
        assert max(abs(other[key] / one[key] - 1) for key in one) < 1e-4, name
    assert read_summary(tmp_path / "runs/two")["processes"] == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    status, output = command(*TOY, "--pretrain-lr", 1e30, "--name", "nan", cwd=tmp_path)
    assert status != 0 and "Traceback" not in output
    assert re.search(r"pretrain: a loss or a weight before step \d+ is not finite", output)
    assert not (tmp_path / "runs/nan/pretrained").exists()
    state = torch.load(tmp_path / "runs/nan/pretrain.pt", weights_only=True)
    assert all(x.isfinite().all() for x in state["model"].values())


@pytest.fixture
def video_folder(tmp_path):
    """Two classes of motion as real files: 5 scenes each, of odd sizes and lengths; one broken."""
    config = VideoMAEConfig.preset("tiny", image_size=64, num_frames=40)
    clips = SyntheticClips(100, config, seed=6)
    for name, label in (("Left", 0), ("Zoom In", 6)):
        for scene, i in enumerate((clips.labels == label).nonzero()[:5, 0], start=1):
            frames = clips.clips[i].movedim(1, -1).numpy()
            frames = frames[: 44 - 8 * scene, : 64 - 4 * scene]  # the last has 4 frames
            suffix = "avi" if scene % 2 else "mp4"
            write_video(tmp_path / f"data/{name}/v_{name}_g{scene:02}_c01.{suffix}", frames)
    (tmp_path / "data/Left/v_Left_g09_c01.mp4").write_bytes(b"not a video")
    return tmp_path / "data"


VIDEOS = ["--fps", 12.5, "--pretrain-steps", 3, "--pretrain-batch", 4, "--finetune-steps", 2,
          "--finetune-batch", 4, "--scratch-steps", 2, "--views", 2]


def test_videos_from_a_folder_run_end_to_end(video_folder, tmp_path):
    """All stages on real files; then each on its own; then the fine-tuned model on a new file."""
    data = ["--data", video_folder]
    output = succeed(*data, "--model", "tiny", *VIDEOS, "--name", "videos", cwd=tmp_path)
    assert "v_Left_g09_c01.mp4" in output, "the broken file is named"
    assert "8 clips to train on, 8 with labels of 2 classes; 2 held out" in output
    names = {file.name for file in (tmp_path / "runs/videos").iterdir()}
    assert names == FILES
    config = json.loads((tmp_path / "runs/videos/finetuned/config.json").read_text())
    assert (config["fps"], config["views"]) == (12.5, 2)
    assert config["id2label"]["1"] == "Zoom In"
    summary = read_summary(tmp_path / "runs/videos")
    assert summary["majority_top1"] == 50 and 0 <= summary["finetune_balanced"] <= 100

    init = ["--init", "runs/videos"]
    succeed("finetune", *data, *VIDEOS, *init, "--name", "again", cwd=tmp_path)
    again = read_summary(tmp_path / "runs/again")
    assert again["finetune_loss_last"] == summary["finetune_loss_last"], "the same encoder and seed"

    output = succeed("predict", *init, next(video_folder.glob("Left/*.avi")), cwd=tmp_path)
    shares = [float(x) for x in re.findall(r"([\d.]+) %  (?:Left|Zoom In)", output)]
    assert len(shares) == 2 and abs(sum(shares) - 100) < 0.2, output
    broken = video_folder / "Left/v_Left_g09_c01.mp4"
    status, output = command("predict", *init, broken, cwd=tmp_path)
    assert status != 0 and broken.name in output and "Traceback" not in output

    # A folder that has changed could move clips that were trained on to the test side.
    (tmp_path / "runs/videos/summary.json").unlink()  # as if the run had been interrupted
    shutil.copy(next(video_folder.glob("Left/*.avi")), video_folder / "Left/v_Left_g00_c01.avi")
    status, output = command("--resume", "runs/videos", cwd=tmp_path)
    assert status != 0 and "had other videos" in output and "Traceback" not in output


def test_published_weights_are_fine_tuned_on_a_folder(video_folder, tmp_path):
    """--init with a directory of transformers: its frames and size are used, the head is new."""
    output = succeed("finetune", "--data", video_folder, *VIDEOS, "--scratch-steps", 0, "--init",
                     HERE / "golden/hf_pretrain_tiny", "--name", "hf", cwd=tmp_path)
    assert "new, to be trained: ['classifier.', 'fc_norm.']" in output
    model = VideoMAEForVideoClassification.from_pretrained(tmp_path / "runs/hf/finetuned")
    assert model.config.id2label == {0: "Left", 1: "Zoom In"} and model.config.hidden_size == 48
    assert not (tmp_path / "runs/hf/pretrained").exists()


@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_every_tensor_is_made_on_the_models_device(task, monkeypatch):
    """The meta device finds without a GPU what a GPU would: an operation on two devices fails."""
    meta = torch.device("meta")
    monkeypatch.setattr(train_tiny, "DEVICE", meta)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has no meta
    recipe = Recipe(optimizer="muon", drop_path=0.5, accumulate=2, colour_jitter=True)
    config = VideoMAEConfig.preset("tiny", num_labels=8, use_mean_pooling=task == "classify",
                                   drop_path_rate=0.5, hidden_dropout_prob=0.1)
    cls, grid = {"pretrain": (VideoMAEForPreTraining, config.grid),
                 "classify": (VideoMAEForVideoClassification, None)}[task]
    model = cls(config).to(meta)
    batch = train_tiny.Batches(SyntheticClips(8, TINY, 0), torch.arange(8), 4, recipe, grid)[0]
    scaler = torch.amp.GradScaler("meta", enabled=False)
    optimizers = train_tiny.make_optimizers(model, recipe, (0.9, 0.95), 0.75)
    for group in optimizers["adamw"].param_groups:
        group["fused"] = False  # has no meta
    loss = train_tiny.backward(model, batch, recipe, scaler)
    train_tiny.update(model, optimizers.values(), scaler, 1e-3, 1.0)
    assert loss.device == meta
    pixel_values = torch.empty(2, 8, 3, 32, 32, device=meta)
    options = dict(output_attentions=True, output_hidden_states=True, head_mask=torch.ones(4))
    if task == "pretrain":
        mask = random_mask("tube", 2, config.grid, 0.75)
        model(pixel_values, mask, **options)
        model.reconstruct(pixel_values, mask)
    else:
        model(pixel_values, **options)


def test_learning_rates_by_layer_and_step():
    model = VideoMAEForVideoClassification(VideoMAEConfig.preset("tiny", num_hidden_layers=3))
    def groups(model, recipe, layer_decay):
        """-> {a parameter's name: (the optimizer's, scale of the learning rate, decay)}."""
        names = {id(p): name for name, p in model.named_parameters()}
        optimizers = train_tiny.make_optimizers(model, recipe, (0.9, 0.95), layer_decay)
        return {names[id(p)]: (kind, group["scale"], group["weight_decay"])
                for kind, optimizer in optimizers.items()
                for group in optimizer.param_groups for p in group["params"]}

    found = groups(model, Recipe(), 0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["classifier.weight"] == ("adamw", 1, 0.05)
    assert found["classifier.bias"] == ("adamw", 1, 0)
    assert found["videomae.blocks.2.mlp.fc1.weight"] == ("adamw", 0.5, 0.05)
    assert found["videomae.blocks.0.norm1.weight"] == ("adamw", 0.125, 0)
    assert found["videomae.patch_embed.weight"] == ("adamw", 0.0625, 0.05)
    found = groups(VideoMAEForPreTraining(TINY), Recipe(optimizer="muon"), 1.0)
    assert found["decoder.mask_token"] == found["decoder.norm.bias"] == ("adamw", 1, 0)
    assert found["decoder.head.weight"] == ("muon", 3, 0.05)
    assert found["videomae.blocks.0.attn.qkv.weight"] == ("muon", 3, 0.05)
    rates = [train_tiny.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0 and rates[99] < 0.002
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 160)])
def test_muon_is_torchs_but_for_its_precision(shape):
    """Rounding to bfloat16, 3 digits, makes more of a difference than 1 %, and not of 5 %."""
    start, generator = torch.randn(shape), torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = dict(lr=0.1, weight_decay=0.05)
    optimizers = [Muon([ours], **options),
                  torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)]
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    moved = ours - start
    assert (ours - theirs).norm() < 0.05 * moved.norm()


def test_every_clip_comes_once_in_an_epoch():
    batches = train_tiny.Batches(None, torch.arange(100, 110), 4, Recipe())
    steps = torch.cat([batches.clips_of(step) for step in range(5)])
    assert sorted(steps[:10].tolist()) == sorted(steps[10:].tolist()) == list(range(100, 110))
    assert steps[:10].tolist() != steps[10:].tolist()
