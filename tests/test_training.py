"""Tests of train_tiny.py: the loop alone; killed, distributed and video runs; wrong options."""
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train_tiny
from tests.helpers import write_video
from tiny.evaluate import accuracies, probabilities
from tiny.muon import Muon
from tiny.synthetic import TEST_SEED, SyntheticClips
from tiny.videos import VideoClips
from train_tiny import Batches, fit, make_optimizers, running_cell
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    normalize,
    random_mask,
    reconstruct,
    split_mask,
)

HERE = Path(__file__).parent.parent
TINY = VideoMAEConfig.preset("tiny")


# --------------------------------------------------------------------------------------------------
# The loop


def line(count=12, dropout=0.1):
    """-> a model, batches and a loss that `fit` can train in no time: y = x @ w with dropout."""
    torch.manual_seed(0)
    x, w = torch.randn(count, 8, 5), torch.randn(5, 1)
    layers = nn.Linear(5, 64), nn.Linear(64, 64), nn.Dropout(dropout), nn.Linear(64, 1)
    batches = list(zip(x, x @ w, strict=True))
    return nn.Sequential(*layers), batches, lambda m, x, y: (m(x) - y).square().mean()


def test_fit_trains_any_model(tmp_path, monkeypatch):
    """`fit` takes any model, batches and loss, and writes no files."""
    monkeypatch.chdir(tmp_path)
    model, batches, loss_of = line(200)
    losses = fit(model, batches, loss_of, 200, 1e-2)
    assert losses.shape == (200,) and losses[-20:].mean() < 0.1 * losses[:5].mean()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_running_cell_predicts_each_position_equally_often(every):
    config = VideoMAEConfig.preset("tiny", image_size=48, tubelet_size=1)  # grid 8 x 6 x 6
    _, masked = split_mask(random_mask("tube", 5, config.grid, 0.7))  # 25 of 36 positions
    chosen = running_cell(masked, config.grid, every)
    assert all(set(few.tolist()) <= set(many.tolist())
               for few, many in zip(chosen, masked, strict=True))
    times, places = chosen // 36, chosen % 36
    for clip, everywhere in zip(places, masked[:, :25], strict=True):
        counts = clip.bincount(minlength=36)[everywhere]
        assert counts.sum() == pytest.approx(200 / every, abs=1)
        assert counts.min() >= 8 // every and counts.max() <= -(-8 // every)
    assert (times.diff(dim=1) >= 0).all() and len(times.unique()) == 8


def test_extend_goes_on_from_before_the_fall(tmp_path, monkeypatch, capsys):
    """A run that is extended from 24 to 28 steps equals one of 28 steps."""
    monkeypatch.chdir(tmp_path)
    few = [*map(str, TOY), "--finetune-steps", "0", "--scratch-steps", "0", "--pretrain-steps"]
    train_tiny.main([*few, "24", "--name", "short"])
    train_tiny.main([*few, "28", "--name", "long", "--extend", "runs/short"])
    assert "resumes after step 19" in capsys.readouterr().out
    train_tiny.main([*few, "28", "--name", "whole"])
    long, whole = (read_results(Path("runs", name)) for name in ("long", "whole"))
    assert long["results"]["pretraining"]["losses"] == whole["results"]["pretraining"]["losses"]
    with pytest.raises(ValueError, match="--seed: got 1, expected 0"):
        train_tiny.main([*few, "60", "--name", "x", "--extend", "runs/short", "--seed", "1"])


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path, capsys):
    path = tmp_path / "line.pt"
    model, batches, loss_of = line()
    expected = fit(model, batches, loss_of, 12, 1e-2)
    broken = [(x, y * (1 if i < 7 else torch.nan)) for i, (x, y) in enumerate(batches)]
    with pytest.raises(FloatingPointError, match="not finite after 10 steps"):
        fit(line()[0], broken, loss_of, 12, 1e-2, path=path, save_every=5)
    resumed = line()[0]
    assert torch.equal(fit(resumed, batches, loss_of, 12, 1e-2, path=path, save_every=5), expected)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "line: resumes after step 5" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"line.pt.* 12 steps.* 8"):
        fit(line()[0], batches, loss_of, 8, 1e-2, path=path)


def test_every_clip_is_used_once_per_epoch_by_one_process():
    whole, *halves = (Batches(None, torch.arange(100, 110), 4, rank=rank, world=world)
                      for rank, world in ((0, 1), (0, 2), (1, 2)))
    steps = [whole.indices(step).tolist() for step in range(5)]
    first, second = np.concatenate(steps).reshape(2, 10)
    assert sorted(first) == sorted(second) == list(range(100, 110))
    assert first.tolist() != second.tolist()
    for step, expected in enumerate(steps):
        rows = torch.cat([half.indices(step) for half in halves])
        assert sorted(rows.tolist()) == sorted(expected)


@pytest.mark.parametrize("stage", ["pretraining", "fine-tuning"])
def test_every_tensor_is_made_on_the_models_device(stage):
    """The meta device catches operations that mix two devices, without needing a GPU."""
    config = VideoMAEConfig.preset("tiny", num_labels=8, use_mean_pooling=stage == "fine-tuning",
                                   drop_path_rate=0.5, hidden_dropout_prob=0.1)
    frames = torch.empty(4, 8, 3, 32, 32, dtype=torch.uint8, device="meta")
    prepare = partial(VideoClips.prepare, Namespace(config=config, flip=True))
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    if stage == "pretraining":
        model = VideoMAEForPreTraining(config).to("meta")
        mask = random_mask("tube", 4, config.grid, 0.75)
        model(normalize(frames), mask, output_hidden_states=True)
        reconstruct(model, normalize(frames), mask)
        loss = train_tiny.reconstruction_loss(model, frames, labels, grid=config.grid, mask="tube",
                                              mask_ratio=0.75, prepare=prepare)
    else:
        model = VideoMAEForVideoClassification(config).to("meta")
        model(normalize(frames), output_hidden_states=True)
        loss = train_tiny.classification_loss(model, frames, labels, jitter=True,
                                              prepare=prepare)
    loss.backward()
    optimizers = make_optimizers(model, "muon", (0.9, 0.95), 0.75)
    for group in optimizers["adamw"].param_groups:
        group["fused"] = False  # not supported on meta
    train_tiny.update(model, optimizers.values(), 1e-3)
    assert loss.device.type == "meta"


def test_learning_rates_by_layer_and_step():
    def groups(model, kind, layer_decay):
        """-> {parameter name: (optimizer name, learning rate scale, weight decay)}."""
        names = {id(p): name for name, p in model.named_parameters()}
        optimizers = make_optimizers(model, kind, (0.9, 0.95), layer_decay)
        return {names[id(p)]: (kind, group["scale"], group["weight_decay"])
                for kind, optimizer in optimizers.items()
                for group in optimizer.param_groups for p in group["params"]}

    model = VideoMAEForVideoClassification(VideoMAEConfig.preset("tiny", num_hidden_layers=3))
    found = groups(model, "adamw", 0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["classifier.weight"] == ("adamw", 1, 0.05)
    assert found["classifier.bias"] == ("adamw", 1, 0)
    assert found["videomae.encoder.blocks.2.mlp.fc1.weight"] == ("adamw", 0.5, 0.05)
    assert found["videomae.encoder.blocks.0.norm1.weight"] == ("adamw", 0.125, 0)
    assert found["videomae.encoder.patch_embed.weight"] == ("adamw", 0.0625, 0.05)
    found = groups(VideoMAEForPreTraining(TINY), "muon", 1.0)
    assert found["decoder.mask_token"] == found["decoder.norm.bias"] == ("adamw", 1, 0)
    assert found["decoder.head.weight"] == ("muon", 3, 0.05)
    assert found["videomae.encoder.blocks.0.attn.qkv.weight"] == ("muon", 3, 0.05)

    rates = [train_tiny.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0]), "rises over 5 %"
    assert set(rates[4:91]) == {2.0}
    assert rates[91:] == pytest.approx([0.2 * left for left in range(9, 0, -1)])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch 2.9")
@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 160)])
def test_muon_matches_torchs_up_to_rounding(shape):
    """Rounding to bfloat16 (3 digits) makes a difference of less than 5 %."""
    start, generator = torch.randn(shape), torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = dict(lr=0.1, weight_decay=0.05)
    optimizers = [Muon([ours], **options),
                  torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)]
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    moved = ours - start
    assert (ours - theirs).norm() < 0.05 * moved.norm()


# --------------------------------------------------------------------------------------------------
# Runs on synthetic clips


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Run train_tiny.main(...) in an empty directory -> the contents of results.json."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, name):
        train_tiny.main([*map(str, arguments), "--name", name])
        return read_results(tmp_path / "runs" / name)

    return run


def command(*arguments, processes=1):
    """The command that runs train_tiny.py in a new process."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher * (processes > 1), str(HERE / "train_tiny.py"),
            *map(str, arguments)]


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def files(folder):
    return {file.name for file in folder.iterdir()}


FILES = {"results.json", "table.md", "curves.png", "reconstruction.gif", "pretrained", "finetuned",
         train_tiny.BEFORE_FALL}
TOY = ["--unlabelled-clips", 96, "--test-clips", 32, "--pretrain-steps", 40, "--finetune-steps", 12,
       "--scratch-steps", 6, "--pretrain-batch", 16, "--drop-path", 0.2, "--save-every", 4]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        train_tiny.main([*map(str, TOY), "--name", "whole"])
        return Path("runs/whole").absolute()


def test_a_run_learns_and_leaves_its_models(whole):
    assert files(whole) == FILES
    losses = read_results(whole)["results"]["pretraining"]["losses"]
    assert len(losses) == 40 and np.mean(losses[-5:]) < losses[0] - 0.2
    check_pretrained(whole)
    model = VideoMAEForVideoClassification.from_pretrained(whole / "finetuned")
    test_clips = SyntheticClips(32, model.config, TEST_SEED)
    predictions = probabilities(model, test_clips).argmax(dim=1)
    found = read_results(whole)["results"]["fine-tuning"]
    assert found.items() >= accuracies(predictions, test_clips.labels).items()


def check_pretrained(folder):
    """The saved model's loss is close to the last training loss."""
    model = VideoMAEForPreTraining.from_pretrained(folder / "pretrained")
    clips = SyntheticClips(64, model.config, seed=9).clips
    loss = model(normalize(clips), random_mask("tube", 64, model.config.grid, 0.75)).loss.item()
    assert abs(loss - read_results(folder)["results"]["pretraining"]["losses"][-1]) < 0.1


def test_a_finished_run_is_shown_and_not_run_again(whole, monkeypatch, capsys):
    monkeypatch.chdir(whole.parent.parent)
    monkeypatch.setattr(train_tiny, "run", None)
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    train_tiny.main([*map(str, TOY), "--name", "whole"])
    said = capsys.readouterr().out
    assert "| 1 label per class | top-1, % | seconds |" in said and "(40 steps), fine-tuned" in said
    with pytest.raises(ValueError, match="--name: runs/whole holds a run with other settings"):
        train_tiny.main([*map(str, TOY), "--seed", "1", "--name", "whole"])
    assert before == {file: file.stat().st_mtime_ns for file in whole.rglob("*")}


def test_a_run_interrupted_early_refuses_other_settings(main, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_tiny, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(*TOY, name="run")
    for other in (["--seed", 1], ["--mask", "frame"]):
        with pytest.raises(ValueError, match="--name: runs/run holds a run with other settings"):
            main(*TOY, *other, name="run")


def test_a_run_killed_at_any_moment_resumes_to_bit_identical_results(whole, tmp_path):
    """kill -9 at three random moments, then run to the end."""
    rng, folder = np.random.default_rng(), tmp_path / "runs/whole"

    def changes():
        """The modification times of the folder's files."""
        return sorted(file.stat().st_mtime_ns for file in folder.glob("*.[pj]*"))

    for _ in range(3):
        start = changes()
        process = subprocess.Popen(command(*TOY, "--name", "whole"), cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and changes() == start:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command(*TOY, "--name", "whole"), cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr

    results = [read_results(run)["results"] for run in (whole, folder)]
    for result in (*results[0].values(), *results[1].values()):
        result.pop("seconds", None)
    assert results[0] == results[1]
    for name in ("pretrained", "finetuned"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (whole, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert files(folder) == FILES


def test_two_processes_train_together(whole, tmp_path):
    """Each process draws its own masks, so the losses only come close to those of one process."""
    done = subprocess.run(command(*TOY, "--scratch-steps", 0, "--name", "two", processes=2),
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Everything is in runs/two/") == 1, "only one process prints"
    folder = tmp_path / "runs/two"
    assert files(folder) == FILES and read_results(folder)["processes"] == 2
    ours, theirs = (read_results(run)["results"]["pretraining"]["losses"]
                    for run in (whole, folder))
    assert ours != theirs and np.abs(np.subtract(ours, theirs)).max() < 0.1
    check_pretrained(folder)  # fails if the processes' weights drift apart


# --------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("arguments, message", [
    (["--epochs", "3"], "unknown option --epochs"),
    (["pretrain"], "unknown option pretrain"),
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--model", "gigantic"], "preset: got 'gigantic'"),
    (["--mask-ratio", "0.01"], "mask_ratio: 0.01 masks 0"),
    (["--pretrain-steps", "0"], "--pretrain-steps: got 0, expected at least 1"),
    (["--label-smoothing", "1.5"], "--label-smoothing: got 1.5, expected at most 1"),
    (["--labels-per-class", "50", "--unlabelled-clips", "100",
      "--test-clips", "1"], "--labels-per-class: got 50"),
    (["--fps", "3"], "--fps: is for runs with --data"),
    (["--split", "2"], "--split: is for runs with --data"),
    (["--init", "a", "--mask", "frame"], "--mask: is for runs without --init"),
    (["--init", "nowhere"], "nowhere: not a local path"),
])
def test_wrong_options_stop_the_run_before_it_starts(arguments, message, tmp_path, monkeypatch,
                                                     capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train_tiny.main(arguments)
    assert not (tmp_path / "runs").exists()
    if "--data" in arguments:
        assert not capsys.readouterr().out, "nothing is printed before the error"


def test_options_have_help_and_name_the_folder(capsys):
    for more, views in ([], 1), (["--data", "x"], 5):
        with pytest.raises(SystemExit):
            train_tiny.read_command([*more, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert f"predictions are averaged (default: {views})" in said
    with pytest.raises(SystemExit):
        train_tiny.read_command(["--mask", "diagonal"])
    assert "argument --mask: invalid choice: 'diagonal'" in capsys.readouterr().err
    for options, name in {
        "": "synthetic", "--seed 0": "synthetic", "--seed 1 --no-colour-jitter":
        "synthetic,seed=1,colour-jitter=False", "--data some/UCF101_subset/ --mask random":
        "UCF101_subset,mask=random", "--init a/b": "synthetic,init=a-b", "--name c": "c",
    }.items():
        assert train_tiny.read_command(options.split())[1] == Path("runs", name)


# --------------------------------------------------------------------------------------------------
# Runs on videos


@pytest.fixture
def video_folder(tmp_path):
    """Videos of two motions, 5 groups each, of odd sizes and lengths, and a broken file."""
    config = VideoMAEConfig.preset("tiny", image_size=64, num_frames=40)
    clips = SyntheticClips(100, config, seed=6)
    for name, label in (("Left", 0), ("Zoom In", 6)):
        for group, i in enumerate((clips.labels == label).nonzero()[:5, 0], start=1):
            frames = clips.clips[i].movedim(1, -1).numpy()
            frames = frames[: 44 - 8 * group, : 64 - 4 * group]  # the last has 4 frames
            suffix = "avi" if group % 2 else "mp4"
            write_video(tmp_path / f"data/{name}/v_{name}_g{group:02}_c01.{suffix}", frames)
    (tmp_path / "data/Left/v_Left_g09_c01.mp4").write_bytes(b"not a video")
    return tmp_path / "data"


VIDEOS = ["--fps", 12.5, "--finetune-steps", 2, "--finetune-batch", 4, "--scratch-steps", 2,
          "--views", 2]
PRETRAIN = ["--pretrain-steps", 3, "--pretrain-batch", 4]


def test_videos_from_a_folder(main, video_folder, tmp_path, capsys):
    """A full run on videos, another from its pretrained weights, and a folder that has changed."""
    data = ["--data", video_folder, *VIDEOS]
    results = main(*data, *PRETRAIN, name="videos")
    said = capsys.readouterr().out
    assert "v_Left_g09_c01.mp4" in said, "the broken file is reported"
    assert "8 training clips (8 labelled, 2 classes), 2 test clips" in said
    assert "| all labels | top-1, % | mean class accuracy, % | seconds |" in said
    assert files(tmp_path / "runs/videos") == FILES
    config = json.loads((tmp_path / "runs/videos/finetuned/config.json").read_text())
    assert (config["fps"], config["views"]) == (12.5, 2) and config["id2label"]["1"] == "Zoom In"
    assert results["results"]["majority class"]["top1"] == 50

    again = main(*data, "--init", "runs/videos/pretrained", name="again")
    ours, theirs = (run["results"]["fine-tuning"]["losses"] for run in (results, again))
    assert ours == theirs, "the same encoder and seed"
    assert "pretraining" not in again["results"]

    # Without classes, a run pretrains and says how to go on.
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in video_folder.glob("Left/*_c01.avi"):
        shutil.copy(file, flat)
    results = main("--data", flat, "--fps", 12.5, *PRETRAIN, name="flat")
    assert "--init runs/flat/pretrained" in capsys.readouterr().out
    assert results["results"].keys() == {"pretraining"}
    again = main(*data, "--init", "runs/flat/pretrained", name="fine-tuned")
    assert "fine-tuning" in again["results"]

    # A changed folder could move training clips to the test split.
    (tmp_path / "runs/videos/table.md").unlink()  # as if the run had been interrupted
    shutil.copy(next(video_folder.glob("Left/*.avi")), video_folder / "Left/v_Left_g00_c01.avi")
    with pytest.raises(ValueError, match="runs/videos was started with other clips"):
        main(*data, *PRETRAIN, name="videos")


def test_published_weights_are_fine_tuned_on_a_folder(main, video_folder, tmp_path, caplog):
    """--init with a transformers directory keeps its frames and size and adds a new head."""
    main("--data", video_folder, *VIDEOS, "--scratch-steps", 0, "--init",
         HERE / "tests/golden/hf_pretrain_tiny", name="hf")
    assert "classifier." in caplog.text and "fc_norm." in caplog.text
    model = VideoMAEForVideoClassification.from_pretrained(tmp_path / "runs/hf/finetuned")
    assert model.config.id2label == {0: "Left", 1: "Zoom In"} and model.config.hidden_size == 48
    assert not (tmp_path / "runs/hf/pretrained").exists()
