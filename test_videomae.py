"""The proof: the same numbers as the published implementations, masks that keep their promises, errors instead of
silence, clips whose label is motion only, and a training run from start to end.

    python -m pytest -q

Needs no network. Tests that need transformers or safetensors (the test extra installs both) or the real clips in
../shared are skipped where those are missing, and say so.
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_tiny
import videomae
from train_tiny import MOTIONS, MotionClips, VideoClips, move_textures, split_folder
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEModel,
    convert_state_dict,
    normalize,
    patchify,
    random_mask,
    split_mask,
    unpatchify,
)

HERE = Path(__file__).parent
TOLERANCE = 1e-5  # relative, float32


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs|, over all numbers of a tensor."""
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


# ----------------------------------------------------------------------------------------------------------------------
# Same numbers as transformers, live, on random weights

SMALL = dict(image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
             intermediate_size=96, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
             decoder_intermediate_size=64)
CONFIGS = {
    "small": SMALL,
    "final norm": {**SMALL, "use_mean_pooling": False},
    "raw pixels": {**SMALL, "norm_pix_loss": False, "layer_norm_eps": 1e-6},
    "no bias, relu": {**SMALL, "qv_bias": False, "hidden_act": "relu"},
    "tubelet 4, patch 16": {**SMALL, "tubelet_size": 4, "patch_size": 16, "hidden_act": "gelu_new"},
    "one channel": {**SMALL, "num_channels": 1, "hidden_act": "selu", "use_mean_pooling": False},
    "long": {**SMALL, "num_frames": 16, "image_size": 48, "decoder_num_hidden_layers": 1},
    "ViT-B": dict(use_mean_pooling=False),
}


def their_model(name, kind, **fields):
    """A transformers model with weights large enough that every part of it matters, and biases that are not 0."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(len(name))
    transformers.activations.ACT2FN["selu"] = torch.nn.SELU  # documented for VideoMAE, missing there
    config = transformers.VideoMAEConfig(**{**CONFIGS[name], **fields})
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def check_same(theirs, ours, inputs):
    """Every output both give, and the gradient of every parameter, agree; -> the largest relative error."""
    def convert(tensors):
        tensors = convert_state_dict(tensors)
        if isinstance(ours, VideoMAEModel):
            tensors = {name.removeprefix("videomae."): tensor for name, tensor in tensors.items()}
        return tensors

    ours.load_state_dict(convert(theirs.state_dict()))
    ours.eval()
    their_output, our_output = theirs(**inputs), ours(**inputs)
    names = [name for name in ("loss", "logits", "last_hidden_state") if getattr(our_output, name, None) is not None]
    errors = {name: relative_error(getattr(our_output, name), their_output[name]) for name in names}
    for output in (their_output, our_output):
        (output.loss if "loss" in names else output.last_hidden_state.square().mean()).backward()
    # Gradients are laid out as weights are, so the weights' conversion serves them too.
    their_gradients = convert({name: p.grad for name, p in theirs.named_parameters()})
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert their_gradients.keys() == our_gradients.keys()
    errors |= {name: relative_error(our_gradients[name], g) for name, g in their_gradients.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.1e}"
    return errors[worst]


def clip_and_mask(config, batch_size=2, kind="random", mask_ratio=0.75):
    torch.manual_seed(1)
    pixel_values = torch.randn(batch_size, config.num_frames, config.num_channels, *config.image_hw)
    return pixel_values, random_mask(kind, batch_size, config.grid, mask_ratio)


@pytest.mark.parametrize("name", CONFIGS)
def test_pretraining_equals_transformers(name):
    config = VideoMAEConfig(**CONFIGS[name])
    pixel_values, mask = clip_and_mask(config, batch_size=1 if name == "ViT-B" else 2)
    error = check_same(their_model(name, "VideoMAEForPreTraining"), VideoMAEForPreTraining(config),
                       dict(pixel_values=pixel_values, bool_masked_pos=mask))
    print(f"\npretraining, {name}: largest relative error {error:.1e}")


@pytest.mark.parametrize("name", CONFIGS)
def test_classifier_equals_transformers(name):
    config = VideoMAEConfig(**CONFIGS[name], num_labels=5)
    pixel_values, _ = clip_and_mask(config, batch_size=1 if name == "ViT-B" else 2)
    labels = torch.arange(len(pixel_values)) + 1
    theirs = their_model(name, "VideoMAEForVideoClassification", num_labels=5)
    error = check_same(theirs, VideoMAEForVideoClassification(config), dict(pixel_values=pixel_values, labels=labels))
    print(f"\nclassifier, {name}: largest relative error {error:.1e}")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ViT-B"])
def test_encoder_equals_transformers(name, masked):
    config = VideoMAEConfig(**CONFIGS[name])
    pixel_values, mask = clip_and_mask(config)
    inputs = dict(pixel_values=pixel_values, bool_masked_pos=mask if masked else None)
    theirs = their_model(name, "VideoMAEModel")
    error = check_same(theirs, VideoMAEModel(config), inputs)
    print(f"\nencoder, {name}: largest relative error {error:.1e}")


# ----------------------------------------------------------------------------------------------------------------------
# Same numbers as the published code, from files it made (golden/)


def test_pretraining_equals_the_authors_code():
    golden = torch.load(HERE / "golden/mcg_nju_pretrain_tiny.pt", weights_only=True)
    config = VideoMAEConfig(**golden["config"], use_mean_pooling=False, head_norm_eps=1e-6)
    model = VideoMAEForPreTraining(config)
    model.load_state_dict(convert_state_dict(golden["checkpoint"]["model"]))
    pixel_values, mask = normalize(golden["frames"]), golden["bool_masked_pos"]
    output = model(pixel_values, mask)
    model.config.norm_pix_loss = False
    errors = {
        "encoder": relative_error(model.videomae(pixel_values, mask).last_hidden_state, golden["encoder_output"]),
        "logits": relative_error(output.logits, golden["logits"]),
        "loss": abs(output.loss.item() / golden["loss_normalized"] - 1),
        "raw loss": abs(model(pixel_values, mask).loss.item() / golden["loss_raw"] - 1),
    }
    print(f"\nauthors, pretraining: {errors}")
    assert max(errors.values()) <= TOLERANCE


def test_classifier_equals_the_authors_code():
    golden = torch.load(HERE / "golden/mcg_nju_finetune_tiny.pt", weights_only=True)
    model = VideoMAEForVideoClassification(VideoMAEConfig(**golden["config"], head_norm_eps=1e-6))
    model.load_state_dict(convert_state_dict(golden["checkpoint"]["module"]))
    pixel_values = normalize(golden["frames"])
    features = model.fc_norm(model.videomae(pixel_values).last_hidden_state.mean(dim=1))
    errors = {
        "features": relative_error(features, golden["pooled_features"]),
        "logits": relative_error(model(pixel_values).logits, golden["logits"]),
    }
    print(f"\nauthors, classifier: {errors}")
    assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize("name, kind", [("hf_pretrain_tiny", VideoMAEForPreTraining),
                                        ("hf_classify_tiny", VideoMAEForVideoClassification)])
def test_equals_transformers_4(name, kind):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    golden = torch.load(HERE / f"golden/{name}/golden.pt", weights_only=True)
    fields = json.loads((HERE / f"golden/{name}/config.json").read_text())
    known = {key: value for key, value in fields.items() if key in VideoMAEConfig.__dataclass_fields__}
    model = kind(VideoMAEConfig(**known, num_labels=len(fields.get("id2label", [0, 1]))))
    model.load_state_dict(convert_state_dict(safetensors.load_file(HERE / f"golden/{name}/model.safetensors")))
    output = model(**golden["inputs"])
    assert relative_error(output.loss, golden["loss"]) <= TOLERANCE
    assert relative_error(output.logits, golden["logits"]) <= TOLERANCE


def test_position_table_is_the_published_one():
    """Compared with the formula of the paper's code, written out with NumPy in float64."""
    config = VideoMAEConfig()
    position, j = np.arange(1568)[:, None], np.arange(768)
    angle = position / np.power(10000, 2 * (j // 2) / 768)
    expected = np.where(j % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
    assert np.array_equal(videomae.position_table(config, 768).numpy(), expected)


def test_processor_equals_pillow():
    """Shortest edge, centre crop, mean and std, against transformers' Pillow processor, within one 8-bit level."""
    processing = pytest.importorskip("transformers.models.videomae.image_processing_pil_videomae",
                                     reason="transformers is not installed")
    theirs, ours = processing.VideoMAEImageProcessorPil(), VideoMAEImageProcessor()
    rng = np.random.default_rng(0)
    for height, width in [(240, 320), (500, 281), (224, 224), (113, 150)]:
        coarse = rng.integers(0, 256, (4, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        video = list(coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width])
        expected = theirs(video, return_tensors="pt")["pixel_values"]
        levels = (ours(video)["pixel_values"] - expected).abs() * 0.5 * 255  # std 0.5
        assert levels.max() < 1.01, (height, width)
        assert levels.mean() < 0.01, (height, width)


# ----------------------------------------------------------------------------------------------------------------------
# Cubes and masks

sizes = st.integers(1, 4)


@given(batch=sizes, t=sizes, h=sizes, w=sizes, tubelet=st.integers(1, 3), patch=st.integers(1, 4), c=st.integers(1, 4))
@settings(deadline=None)
def test_unpatchify_undoes_patchify(batch, t, h, w, tubelet, patch, c):
    video = torch.randn(batch, t * tubelet, c, h * patch, w * patch)
    cubes = patchify(video, tubelet, patch)
    assert cubes.shape == (batch, t * h * w, tubelet * patch * patch * c)
    assert torch.equal(unpatchify(cubes, (t, h, w), tubelet, patch), video)
    # The last cube is the last corner of the clip, channels innermost.
    corner = video[:, -tubelet:, :, -patch:, -patch:].movedim(2, -1)
    assert torch.equal(cubes[:, -1], corner.flatten(1))


@given(kind=st.sampled_from(["tube", "random", "frame"]), batch=sizes, t=st.integers(2, 8), h=st.integers(2, 6),
       w=st.integers(2, 6), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_masks(kind, batch, t, h, w, ratio, seed):
    units = {"tube": h * w, "random": t * h * w, "frame": t}[kind]

    def draw():
        return random_mask(kind, batch, (t, h, w), ratio, torch.Generator().manual_seed(seed))

    if not 0 < int(ratio * units) < units:
        with pytest.raises(ValueError, match="mask_ratio"):
            draw()
        return
    mask = draw()
    assert mask.dtype == torch.bool and mask.shape == (batch, t * h * w)
    assert torch.equal(mask, draw()), "the same seed gives the same mask"
    assert (mask.sum(dim=1) == int(ratio * units) * (t * h * w // units)).all(), "the same count in every clip"
    grid = mask.view(batch, t, h * w)
    if kind == "tube":
        assert (grid == grid[:, :1]).all(), "the same places at every time"
    if kind == "frame":
        assert (grid == grid[:, :, :1]).all(), "whole frames"
    visible, masked = split_mask(mask, *mask.shape)
    assert not mask.gather(1, visible).any() and mask.gather(1, masked).all()
    for index in (visible, masked):
        assert (index.diff(dim=1) > 0).all(), "in increasing order"


def test_every_tube_is_masked_equally_often():
    masks = random_mask("tube", 4000, (2, 4, 4), 0.75, torch.Generator().manual_seed(0))
    assert ((masks.float().mean(dim=0) - 0.75).abs() < 0.03).all()


def test_encoder_does_not_see_masked_pixels_and_loss_does_not_see_visible_ones():
    config = VideoMAEConfig(**SMALL)
    model = VideoMAEForPreTraining(config)
    pixel_values, mask = clip_and_mask(config, kind="tube")
    cubes = patchify(pixel_values, 2, 8)
    noise = torch.randn_like(cubes)
    hidden_changed = unpatchify(torch.where(mask[..., None], noise, cubes), config.grid, 2, 8)
    visible_changed = unpatchify(torch.where(mask[..., None], cubes, noise), config.grid, 2, 8)
    output = model(pixel_values, mask)
    assert torch.equal(model(hidden_changed, mask).logits, output.logits)
    target = model.target(cubes[mask].view(2, -1, config.cube_size))
    other = model(visible_changed, mask)
    assert torch.allclose(other.loss, (other.logits - target).square().mean())


def test_reconstruction_keeps_visible_pixels_and_draws_predictions():
    """With the truth as prediction, the picture is the original: the normalization is undone exactly."""
    for norm_pix_loss in (True, False):
        config = VideoMAEConfig(**{**SMALL, "norm_pix_loss": norm_pix_loss})
        model = VideoMAEForPreTraining(config)
        frames = torch.randint(256, (2, 8, 3, 32, 32), dtype=torch.uint8)
        pixel_values = normalize(frames)
        mask = random_mask("tube", 2, config.grid, 0.75)
        truth = model.target(patchify(pixel_values, 2, 8)[mask].view(2, -1, config.cube_size))
        model.decoder.forward = lambda *_, truth=truth: truth
        pictures = model.reconstruct(pixel_values, mask)
        assert torch.allclose(pictures.original, frames / 255, atol=1e-5)
        assert torch.allclose(pictures.reconstruction, pictures.original, atol=1e-5)
        assert torch.equal(patchify(pictures.masked, 2, 8)[~mask], patchify(pictures.original, 2, 8)[~mask])
        assert (patchify(pictures.masked, 2, 8)[mask] == 0.5).all()
        assert pictures.borrows_truth == norm_pix_loss


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    block = VideoMAEModel(VideoMAEConfig(**SMALL, drop_path_rate=0.5)).blocks[-1]
    x = torch.ones(4000, 1, 1)
    dropped = block.branch(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean().item() - 1) < 0.06
    assert torch.equal(block.eval().branch(x), x)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: an error that names the argument, before any work is done


@pytest.mark.parametrize("fields, named", [
    (dict(image_size=30), "image_size"), (dict(image_size=224.0), "image_size"),
    (dict(num_frames=15), "num_frames"), (dict(hidden_size=100), "hidden_size"),
    (dict(decoder_hidden_size=100), "decoder_hidden_size"), (dict(num_channels=0), "num_channels"),
    (dict(num_hidden_layers=2.0), "num_hidden_layers"), (dict(hidden_act="swish"), "hidden_act"),
    (dict(hidden_dropout_prob=1.5), "hidden_dropout_prob"), (dict(layer_norm_eps=0), "layer_norm_eps"),
    (dict(position_embedding="learned"), "position_embedding"), (dict(drop_path_rate=-0.1), "drop_path_rate"),
])
def test_config_names_the_bad_field(fields, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        VideoMAEConfig(**fields)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: got 'giant2', expected one of small, base"):
        VideoMAEConfig.preset("giant2")


def test_models_refuse_wrong_inputs():
    config = VideoMAEConfig(**SMALL)
    model = VideoMAEForPreTraining(config)
    clip, mask = clip_and_mask(config)
    uneven = mask.clone()
    first_masked = mask[0].nonzero()[0, 0]
    uneven[0, first_masked], uneven[1, (~mask[1]).nonzero()[0, 0]] = False, True  # the total still divides
    cases = [
        ((clip.to(torch.uint8), mask), TypeError, "pixel_values: got torch.uint8"),
        ((clip.numpy(), mask), TypeError, "pixel_values: got ndarray"),
        ((clip.transpose(1, 2), mask), ValueError, "pixel_values: got shape"),
        ((clip[:, :, :1], mask), ValueError, "pixel_values: got shape"),
        ((clip[:, :6], mask), ValueError, "pixel_values: got shape"),
        ((clip[..., :24], mask), ValueError, "pixel_values: got shape"),
        ((clip[0], mask), ValueError, "pixel_values: got shape"),
        ((clip, mask.int()), TypeError, "bool_masked_pos: got torch.int32"),
        ((clip, None), TypeError, "bool_masked_pos: got NoneType"),
        ((clip, mask[:1]), ValueError, "bool_masked_pos: got shape"),
        ((clip, mask[:, 1:]), ValueError, "bool_masked_pos: got shape"),
        ((clip, uneven), ValueError, r"bool_masked_pos: got \[47, 49\] masked cubes"),
        ((clip, torch.ones_like(mask)), ValueError, "bool_masked_pos: every cube"),
        ((clip, torch.zeros_like(mask)), ValueError, "bool_masked_pos: no cube"),
    ]
    for inputs, error, message in cases:
        with pytest.raises(error, match=message):
            model(*inputs)
    with pytest.raises(ValueError, match="labels: got torch.float32"):
        VideoMAEForVideoClassification(config)(clip, labels=torch.zeros(2))
    with pytest.raises(TypeError, match="frames: got torch.float32"):
        normalize(clip)
    with pytest.raises(ValueError, match="state_dict: no cube embedding"):
        convert_state_dict({"model": clip})
    with pytest.raises(ValueError, match="kind: got 'checkerboard'"):
        random_mask("checkerboard", 2, config.grid, 0.75)


def test_processor_refuses_wrong_inputs():
    processor = VideoMAEImageProcessor(size=32, crop_size=32)
    frame = np.zeros((40, 50, 3), dtype=np.uint8)
    cases = [
        ([], ValueError, "videos: got none"),
        ([frame / 255.0] * 4, TypeError, "videos: got frames of float64"),
        ([frame[..., :1]] * 4, ValueError, r"videos: got frames of shapes \[\(40, 50, 1\)\]"),
        ([frame, frame[:30]], ValueError, r"videos: got frames of shapes \[\(30, 50, 3\), \(40, 50, 3\)\]"),
        ([[frame] * 4, [frame] * 3], ValueError, r"videos: got clips of \[4, 3\] frames"),
    ]
    for videos, error, message in cases:
        with pytest.raises(error, match=message):
            processor(videos)
    with pytest.raises(ValueError, match="crop_size: 48 x 48"):
        VideoMAEImageProcessor(size=32, crop_size=48)([frame] * 4)


# ----------------------------------------------------------------------------------------------------------------------
# The embedded clips: the label is the motion, and no single frame gives it away

TINY = VideoMAEConfig.preset("tiny")


def test_the_middle_frame_does_not_depend_on_the_label():
    """The same draws with another label: the middle frame is the same to the last bit, the others are not."""
    textures = train_tiny.make_textures(8, 64, torch.Generator().manual_seed(0))
    clips = torch.stack([
        move_textures(textures, torch.full((64,), label), 8, 32, torch.Generator().manual_seed(1))
        for label in range(len(MOTIONS))
    ])  # (8, 64, T, 3, H, W)
    middle = TINY.num_frames // 2
    assert (clips[:, :, middle] == clips[:1, :, middle]).all()
    for frame in set(range(TINY.num_frames)) - {middle}:
        assert all((clips[i, :, frame] != clips[j, :, frame]).any() for i in range(8) for j in range(i))


def test_a_single_frame_gives_at_most_zoom_in_from_zoom_out_away():
    """The best cue in one frame is how fine it is. Learned on other clips, it says nothing of the middle frame, and of
    the first frame less than a zoom's direction for the two zooms would (2 of 8 classes more than chance)."""
    train_clips, test_clips = MotionClips(3000, TINY, seed=11), MotionClips(3000, TINY, seed=12)

    def fineness(clips, frame):
        return (clips.clips[:, frame].float().diff(dim=-1).square().mean(dim=(1, 2, 3)) + 1).log()

    top1 = {}
    for frame in (0, TINY.num_frames // 2):
        energy, test_energy = fineness(train_clips, frame), fineness(test_clips, frame)
        edges = energy.quantile(torch.linspace(0, 1, 21)[1:-1])  # 20 bins, each with its most frequent label
        counts = torch.zeros(20, len(MOTIONS))
        counts.index_put_((torch.bucketize(energy, edges), train_clips.labels), torch.ones(3000), accumulate=True)
        predictions = counts.argmax(dim=1)[torch.bucketize(test_energy, edges)]
        top1[frame] = train_tiny.percent(predictions == test_clips.labels)
    print(f"\ntop-1 from the fineness of one frame: {top1}")
    assert top1[TINY.num_frames // 2] < 15.5 and top1[0] < 30


def motion_by_optical_flow(clips):
    """(B, T, C, H, W) uint8 -> (B,) MOTIONS index, without learning: least squares of I_t + u . grad I = 0.

    u = shift + rotation * (-y, x) + zoom * (x, y); each part is compared with the slowest motion of its kind.
    """
    video = clips.float()
    average = (video[:, 1:] + video[:, :-1]) / 2
    dt = (video[:, 1:] - video[:, :-1])[..., 1:-1, 1:-1]
    dx = (average[..., 1:-1, 2:] - average[..., 1:-1, :-2]) / 2
    dy = (average[..., 2:, 1:-1] - average[..., :-2, 1:-1]) / 2
    y, x = torch.meshgrid(torch.arange(30) - 14.5, torch.arange(30) - 14.5, indexing="ij")
    # A motion about another centre is the same rotation or zoom plus a shift, so the shift is free here.
    columns = torch.stack([dx, dy, dy * x - dx * y, dx * x + dy * y], dim=-1)
    solution = torch.linalg.lstsq(columns.flatten(1, -2), -dt.flatten(1)[..., None]).solution[..., 0]
    shift_x, shift_y, rotation, zoom = solution.unbind(dim=1)
    turning = torch.stack([rotation, -rotation, zoom * 2.2, -zoom * 2.2], dim=1)  # zooms are 0.5 as fast as turns
    straight = torch.stack([-shift_x, shift_x, -shift_y, shift_y], dim=1)
    strongest, turn = turning.max(dim=1)
    return torch.where(strongest > 0.1, 4 + turn, straight.argmax(dim=1))


def test_motion_gives_the_label_and_reversed_clips_have_the_opposite_one():
    clips = MotionClips(1000, TINY, seed=3)
    opposite = clips.labels ^ 1
    right = (motion_by_optical_flow(clips.clips) == clips.labels).float().mean()
    reversed_right = (motion_by_optical_flow(clips.clips.flip(1)) == opposite).float().mean()
    assert right > 0.7 and reversed_right > 0.7, (right, reversed_right)


def test_a_network_reads_the_motion_and_not_the_middle_frame(monkeypatch):
    """Trained on whole clips it knows the motions: of a clip run backwards it says the opposite, of the middle frame
    held still it knows nothing. The textures repeat sooner than train_tiny.py's, so that it learns in seconds."""
    make_textures = train_tiny.make_textures
    monkeypatch.setattr(train_tiny, "make_textures", lambda count, size, generator:
                        make_textures(count, size // 2, generator).tile(2, 2))
    clips, test_clips = MotionClips(3000, TINY, seed=4), MotionClips(512, TINY, seed=5)
    config = VideoMAEConfig.preset("tiny", num_labels=len(MOTIONS))
    recipe = dict(train_tiny.RECIPES["embedded"], finetune_batch=32, recolour=False)
    model = train_tiny.finetune(clips, torch.arange(3000), config, None, recipe, 250, 1e-3, 0, torch.device("cpu"),
                                lambda **_: None, "test")
    moving = train_tiny.percent(train_tiny.predict(model, test_clips, "cpu") == test_clips.labels)
    checks = train_tiny.motion_checks(model, test_clips, "cpu")
    print(f"\nwhole clips {moving} %, {checks} (chance 12.5 %)")
    assert moving > 60 and checks["middle_frame_top1"] < 20 and checks["reversed_as_opposite"] > 50


# ----------------------------------------------------------------------------------------------------------------------
# train_tiny.py from start to end, as a user runs it


def train_tiny_command(*arguments, cwd):
    """-> (exit status, stdout + stderr)."""
    process = subprocess.run([sys.executable, str(HERE / "train_tiny.py"), *map(str, arguments)], cwd=cwd,
                             capture_output=True, text=True, timeout=120)
    return process.returncode, process.stdout + process.stderr


SHORT = ["--unlabelled-clips", 500, "--test-clips", 64, "--pretrain-steps", 60, "--finetune-steps", 3,
         "--scratch-full-time-steps", 4]
FILES = {"summary.json", "metrics.jsonl", "curves.png", "reconstruction.png", "table.md", "pretrained.pt"}


def test_short_run_learns_leaves_its_files_and_repeats(tmp_path):
    summaries = []
    for name in ("a", "b"):
        status, output = train_tiny_command(*SHORT, "--name", name, cwd=tmp_path)
        assert status == 0, output
        names = {file.name for file in (tmp_path / "runs" / name).iterdir()}
        assert names == FILES | {"finetuned-2.pt", "finetuned-10.pt"}
        summaries.append(json.loads((tmp_path / "runs" / name / "summary.json").read_text()))
    first, second = summaries
    assert first["pretrain_loss_last"] < first["pretrain_loss_first"] - 0.2
    assert [result["labels_per_class"] for result in first["results"]] == [2, 10]
    assert first.keys() >= {"finetune_top1", "scratch_top1", "scratch_full_time_top1", "linear_probe_top1", "device",
                            "labels_per_class", "seed", "seconds", "middle_frame_top1", "reversed_as_opposite"}
    for summary in summaries:
        del summary["seconds"], summary["total_seconds"]
    assert first == second, "the same seed gives the same numbers"

    # The saved model is the trained one: it reconstructs held-out clips with the loss of the end of training.
    saved = torch.load(tmp_path / "runs/a/pretrained.pt", weights_only=True)
    model = VideoMAEForPreTraining(VideoMAEConfig(**saved["config"]))
    model.load_state_dict(saved["state_dict"])
    pixel_values = normalize(MotionClips(64, TINY, seed=9).clips)
    loss = model(pixel_values, random_mask("tube", 64, TINY.grid, 0.75)).loss.item()
    assert abs(loss - first["pretrain_loss_last"]) < 0.05

    before = {file: file.read_bytes() for file in (tmp_path / "runs/a").iterdir()}
    status, output = train_tiny_command(*SHORT, "--name", "a", cwd=tmp_path)
    assert status != 0 and "--name" in output and "exists already" in output
    assert before == {file: file.read_bytes() for file in (tmp_path / "runs/a").iterdir()}


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "--data: nowhere is not a folder"),
    (["--model", "gigantic"], "preset: got 'gigantic'"),
    (["--mask", "diagonal"], "kind: got 'diagonal'"),
    (["--mask-ratio", "1"], "mask_ratio: 1.0 masks 16 of 16"),
    (["--drop-path", "1"], "drop_path_rate: got 1.0"),
    (["--seeds", "1", "1"], "--seeds: got [1, 1]"),
    (["--pretrain-steps", "0"], "--pretrain-steps: got 0"),
    (["--labels-per-class", "50", "--unlabelled-clips", "100"], "--labels-per-class: 50 asked for"),
])
def test_bad_options_stop_the_run_before_it_starts(arguments, message, tmp_path):
    status, output = train_tiny_command(*arguments, cwd=tmp_path)
    assert status != 0 and message in output and "Traceback" not in output, output
    assert not (tmp_path / "runs").exists()


def write_video(path, frames, rate=25):
    """frames (T, H, W, 3) uint8 -> an MPEG-4 file."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def video_folder(tmp_path):
    """Two classes of motion as real files: 5 scenes each, of odd sizes and lengths, and one broken file."""
    config = VideoMAEConfig.preset("tiny", image_size=64, num_frames=40)
    clips = MotionClips(100, config, seed=6)
    for name, label in (("Left", 0), ("Zoom In", 6)):
        for scene, i in enumerate((clips.labels == label).nonzero()[:5, 0], start=1):
            frames = clips.clips[i].movedim(1, -1).numpy()[: 40 - 8 * scene + 4, : 64 - 4 * scene]  # the last: 4 frames
            suffix = "avi" if scene % 2 else "mp4"
            write_video(tmp_path / f"data/{name}/v_{name}_g{scene:02}_c01.{suffix}", np.ascontiguousarray(frames))
    (tmp_path / "data/Left/v_Left_g09_c01.mp4").write_bytes(b"not a video")
    return tmp_path / "data"


def test_videos_from_a_folder_run_end_to_end(video_folder, tmp_path):
    arguments = ["--data", video_folder, "--model", "tiny", "--frame-stride", 2, "--pretrain-steps", 3,
                 "--finetune-steps", 2, "--scratch-full-time-steps", 2, "--name", "videos"]
    status, output = train_tiny_command(*arguments, cwd=tmp_path)
    assert status == 0, output
    assert "left out" in output and "v_Left_g09_c01.mp4" in output, "the broken file is named"
    assert "train     8 clips: Left 4, Zoom In 4" in output and "held out  2 clips: Left 1, Zoom In 1" in output
    assert {file.name for file in (tmp_path / "runs/videos").iterdir()} == FILES | {"finetuned-all.pt"}
    summary = json.loads((tmp_path / "runs/videos/summary.json").read_text())
    assert summary["majority_top1"] == 50 and 0 <= summary["finetune_balanced"] <= 100
    cached = list((tmp_path / "runs/.cache").iterdir())
    assert len(cached) == 10 and all(file.suffix == ".npy" for file in cached)


def test_decoded_frames_are_the_video(tmp_path):
    """Colours and order survive the way from a file to a clip; a short video holds its last frame."""
    ramp = np.stack([np.full((48, 64, 3), (20 + 30 * t, 120, 200 - 25 * t), dtype=np.uint8) for t in range(6)])
    write_video(tmp_path / "A/one.mp4", ramp)
    config = VideoMAEConfig.preset("tiny")
    clips = VideoClips(["A"], [(tmp_path / "A/one.mp4", 0)], config, 1, tmp_path / "cache")
    clip = clips.load(torch.tensor([0]))[0]  # (8, 3, 32, 32)
    expected = torch.from_numpy(ramp[[0, 1, 2, 3, 4, 5, 5, 5], 0, 0]).float()
    assert (clip.float().mean(dim=(2, 3)) - expected).abs().max() < 6
    random_clip = clips.load(torch.tensor([0, 0]), torch.Generator().manual_seed(0))
    assert random_clip.shape == (2, 8, 3, 32, 32) and random_clip.dtype == torch.uint8


def test_folders_split_by_scene_or_by_the_official_lists(tmp_path):
    for name in ("A", "B"):
        for group in range(1, 7):
            for c in (1, 2):
                file = tmp_path / name / f"v_{name}_g{group:02}_c{c:02}.avi"
                file.parent.mkdir(exist_ok=True)
                file.touch()
    classes, splits = split_folder(tmp_path)
    groups = {split: {(label, file.name[4:7]) for file, label in entries} for split, entries in splits.items()}
    assert classes == ["A", "B"] and not groups["train"] & groups["test"]
    assert (len(splits["train"]), len(splits["test"])) == (16, 8)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("".join(f"{n}/v_{n}_g02_c01.avi {i}\n" for i, n in enumerate("AB", 1)))
    (lists / "testlist01.txt").write_text("".join(f"{n}/v_{n}_g01_c01.avi\n" for n in "AB"))
    _, splits = split_folder(tmp_path)
    assert [(file.name, label) for file, label in splits["test"]] == [("v_A_g01_c01.avi", 0), ("v_B_g01_c01.avi", 1)]


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--data: no video"):
        split_folder(tmp_path)
    (tmp_path / "A").mkdir()
    (tmp_path / "A/one.mp4").touch()
    with pytest.raises(ValueError, match="has one class, A"):
        split_folder(tmp_path)
    (tmp_path / "B").mkdir()
    for name in ("A/two.mp4", "B/one.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="no train video of class B"):
        split_folder(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")

    def fail_half_way(file):
        file.write(b"new, but")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train_tiny.write_whole(target, fail_half_way)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


UCF101_MINI = HERE.parent / "shared/ucf101_mini"


@pytest.mark.skipif(not UCF101_MINI.is_dir(), reason="needs the real clips in ../shared/ucf101_mini")
def test_real_clips(tmp_path):
    classes, splits = split_folder(UCF101_MINI)
    assert classes == ["Punch", "YoYo"] and [len(splits[split]) for split in ("train", "test")] == [58, 23]
    clips = VideoClips(classes, [splits["test"][0], splits["test"][-1]], VideoMAEConfig.preset("laptop"), 4, tmp_path)
    assert clips.load(torch.arange(2)).shape == (2, 16, 3, 112, 112)
    assert clips.load(torch.arange(2)).float().std() > 20


def test_videomae_alone_needs_torch_numpy_and_einops_only(tmp_path):
    (tmp_path / "videomae.py").write_text((HERE / "videomae.py").read_text())
    code = ("import sys, videomae; "
            "bad = {'transformers', 'safetensors', 'av', 'matplotlib'} & set(sys.modules); "
            "assert not bad, bad; print(videomae.__file__)")
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path) in output.stdout
