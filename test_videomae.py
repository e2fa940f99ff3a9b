"""Parity tests of outputs against the published implementations, and of gradients against
transformers; then tests of masks, preprocessing, error messages, and typical research changes.

    python -m pytest -q test_videomae.py

Tests that need transformers (the test extra installs it) are skipped, with a reason, if it is
missing. Tests of checkpoint files and the image processor are in tests/.
"""
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import videomae
from checkpoints import convert_state_dict
from videomae import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    frame_indices,
    mask_highest,
    normalize,
    patchify,
    preprocess,
    random_mask,
    reconstruct,
    split_mask,
    take,
    unpatchify,
)

GOLDEN = Path(__file__).parent / "tests" / "golden"
TOLERANCE = 1e-5  # relative, float32
DEVICE = os.environ.get("VIDEOMAE_DEVICE", "cpu")  # for the equality tests; `make gpu` sets cuda


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs|, over all numbers of a tensor."""
    ours, theirs = ours.cpu(), torch.as_tensor(theirs).cpu()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def check_same(title, pairs):
    """Print the largest relative error of {name: (ours, theirs)}; it must be within TOLERANCE."""
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    worst = max(errors, key=errors.get)
    print(f"\n{title}: largest relative error {errors[worst]:.1e}, of {worst}")
    assert errors[worst] <= TOLERANCE


# --------------------------------------------------------------------------------------------------
# Parity with transformers, run live on random weights

SMALL = dict(
    image_size=32, patch_size=8, num_frames=8,
    hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
    decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
    decoder_intermediate_size=64,
)
FIRST_TOKEN = dict(use_mean_pooling=False)
CONFIGS = {
    "small": SMALL,
    "final norm": SMALL | FIRST_TOKEN,
    "raw pixels": SMALL | dict(norm_pix_loss=False, layer_norm_eps=1e-6),
    "no bias, relu": SMALL | dict(qv_bias=False, hidden_act="relu"),
    "tubelet 4, patch 16": SMALL | dict(tubelet_size=4, patch_size=16, hidden_act="gelu_new"),
    "one channel": SMALL | dict(num_channels=1, hidden_act="selu") | FIRST_TOKEN,
    "long": SMALL | dict(num_frames=16, image_size=48, decoder_num_hidden_layers=1),
    "wide": SMALL | dict(image_size=(32, 64), num_attention_heads=2) | FIRST_TOKEN,
    "no bias, raw, token 0": SMALL | dict(qv_bias=False, norm_pix_loss=False) | FIRST_TOKEN,
    "ViT-S": videomae.PRESETS["small"] | dict(use_mean_pooling=True, head_norm_eps=1e-5),
    "ViT-B": videomae.PRESETS["base"] | dict(head_norm_eps=1e-5),
}


def their_model(name, kind, **fields):
    """A transformers model with weights large enough that each matters, and nonzero biases."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(len(name))
    transformers.activations.ACT2FN["selu"] = nn.SELU  # documented for VideoMAE, but missing
    fields = {**CONFIGS[name], **fields, "attn_implementation": "eager"}  # which returns attentions
    model = getattr(transformers, kind)(transformers.VideoMAEConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def check_same_model(title, ours, theirs, inputs):
    """With the same weights, all outputs, including optional ones, and all gradients agree."""

    def convert(tensors):
        tensors = convert_state_dict(tensors)
        if isinstance(ours, VideoMAEModel):
            tensors = {name.removeprefix("videomae."): x for name, x in tensors.items()}
        return tensors

    ours.load_state_dict(convert(theirs.state_dict()))
    ours.eval().to(DEVICE)
    theirs.to(DEVICE)
    inputs = {name: x if x is None else x.to(DEVICE) for name, x in inputs.items()}
    our_output, their_output = ours(**inputs), theirs(**inputs)
    names = our_output._fields
    pairs = {name: (getattr(our_output, name), their_output[name]) for name in names}

    for output in (our_output, their_output):
        (output.loss if "loss" in names else output.last_hidden_state.square().mean()).backward()
    # Gradients are laid out as weights are, so the same conversion applies to them.
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    their_gradients = convert({name: p.grad for name, p in theirs.named_parameters()})
    assert our_gradients.keys() == their_gradients.keys()
    pairs |= {name: (our_gradients[name], g) for name, g in their_gradients.items()}

    more = dict(output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        our_output, their_output = ours(**inputs, **more), theirs(**inputs, **more)
        plain, named = ours(**inputs, return_dict=False), ours(**inputs)
    for name in (*names, "hidden_states", "attentions"):
        x, y = getattr(our_output, name), their_output[name]
        x, y = (x, y) if isinstance(x, tuple) else ([x], [y])
        for i, pair in enumerate(zip(x, y, strict=True)):
            pairs[f"{name} {i}, all requested"] = pair
    check_same(title, pairs)
    assert type(plain) is tuple and len(plain) == len(names)
    assert all(torch.equal(x, getattr(named, name)) for x, name in zip(plain, names, strict=True))


def clip_and_mask(config, kind="random", mask_ratio=0.75):
    torch.manual_seed(1)
    batch_size = 1 if config.hidden_size > 100 else 2
    shape = (batch_size, config.num_frames, config.num_channels, *config.image_hw)
    return torch.randn(shape), random_mask(kind, batch_size, config.grid, mask_ratio)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ViT-S"])
def test_pretraining_equals_transformers(name):
    ours = VideoMAEForPreTraining(VideoMAEConfig(**CONFIGS[name]))
    theirs = their_model(name, "VideoMAEForPreTraining")
    clip, mask = clip_and_mask(ours.config)
    inputs = dict(pixel_values=clip, bool_masked_pos=mask)
    check_same_model(f"pretraining, {name}", ours, theirs, inputs)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ViT-B"])
def test_classifier_equals_transformers(name):
    """To save time, a ViT takes only 8 frames."""
    fields = dict(num_labels=5) | (dict(num_frames=8) if name.startswith("ViT") else {})
    ours = VideoMAEForVideoClassification(VideoMAEConfig(**CONFIGS[name] | fields))
    theirs = their_model(name, "VideoMAEForVideoClassification", **fields)
    clip, _ = clip_and_mask(ours.config)
    inputs = dict(pixel_values=clip, labels=torch.tensor([1, 2])[: len(clip)])
    check_same_model(f"classifier, {name}", ours, theirs, inputs)


@pytest.mark.parametrize("name, masked", [("small", True), ("wide", False), ("one channel", True)])
def test_encoder_equals_transformers(name, masked):
    ours = VideoMAEModel(VideoMAEConfig(**CONFIGS[name]))
    theirs = their_model(name, "VideoMAEModel")
    clip, mask = clip_and_mask(ours.config)
    inputs = dict(pixel_values=clip, bool_masked_pos=mask if masked else None)
    check_same_model(f"encoder, {name}, masked: {masked}", ours, theirs, inputs)


# --------------------------------------------------------------------------------------------------
# Parity with the published code, from files it wrote (golden/)


AUTHORS = dict(layer_norm_eps=1e-6, head_norm_eps=1e-6)


def test_pretraining_equals_the_authors_code():
    golden = torch.load(GOLDEN / "mcg_nju_pretrain_tiny.pt", weights_only=True)
    config = VideoMAEConfig(**golden["config"] | AUTHORS | FIRST_TOKEN)
    model = VideoMAEForPreTraining(config).eval().to(DEVICE)
    model.load_state_dict(convert_state_dict(golden["checkpoint"]["model"]))
    clip, mask = normalize(golden["frames"]).to(DEVICE), golden["bool_masked_pos"]
    output = model(clip, mask)
    encoded = model.videomae(clip, mask).last_hidden_state
    config.norm_pix_loss = False
    check_same("authors, pretraining", {
        "encoder": (encoded, golden["encoder_output"]),
        "logits": (output.logits, golden["logits"]),
        "loss": (output.loss, golden["loss_normalized"]),
        "raw loss": (model(clip, mask).loss, golden["loss_raw"]),
    })


def test_classifier_equals_the_authors_code():
    golden = torch.load(GOLDEN / "mcg_nju_finetune_tiny.pt", weights_only=True)
    config = VideoMAEConfig(**golden["config"] | AUTHORS)
    model = VideoMAEForVideoClassification(config).eval().to(DEVICE)
    model.load_state_dict(convert_state_dict(golden["checkpoint"]["module"]))
    clip = normalize(golden["frames"]).to(DEVICE)
    features = model.fc_norm(model.videomae(clip).last_hidden_state.mean(dim=1))
    check_same("authors, classifier", {
        "features": (features, golden["pooled_features"]),
        "logits": (model(clip).logits, golden["logits"]),
    })


KINDS = {
    "hf_pretrain_tiny": VideoMAEForPreTraining,
    "hf_classify_tiny": VideoMAEForVideoClassification,
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers_4(kind):
    golden = torch.load(GOLDEN / kind / "golden.pt", weights_only=True)
    inputs = {name: x.to(DEVICE) for name, x in golden["inputs"].items()}
    model = KINDS[kind].from_pretrained(GOLDEN / kind).to(DEVICE)
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    headless = model(**inputs, head_mask=golden["head_mask"])
    pairs = {
        "loss": (output.loss, golden["loss"]),
        "logits": (output.logits, golden["logits"]),
        "loss, head_mask": (headless.loss, golden["head_mask_loss"]),
        "logits, head_mask": (headless.logits, golden["head_mask_logits"]),
    }
    *hidden_states, last = output.hidden_states
    hidden_states.append(model.videomae.encoder.norm(last))  # as 4.57 returns it, unlike 5.23
    for name, ours in (("hidden_states", hidden_states), ("attentions", output.attentions)):
        for i, pair in enumerate(zip(ours, golden[name], strict=True)):
            pairs[f"{name} {i}"] = pair
    check_same(f"transformers 4.57, {kind}", pairs)

    # A mask of ones has no effect, one row applies to every layer, and no mask outlasts its call.
    plain = model(**inputs).logits
    assert relative_error(model(**inputs, head_mask=torch.ones(3)).logits, plain) <= TOLERANCE
    row = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(model(**inputs, head_mask=row).logits,
                       model(**inputs, head_mask=row.expand(3, 3)).logits)
    assert torch.equal(model(**inputs).logits, plain)


def test_position_table_is_the_published_one():
    """Compared with the formula of the paper's code, written out with NumPy in float64."""
    position, j = np.arange(1568)[:, None], np.arange(768)
    angle = position / np.power(10000, 2 * (j // 2) / 768)
    expected = np.where(j % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
    assert np.array_equal(videomae.position_table(VideoMAEConfig(), 768).numpy(), expected)


# --------------------------------------------------------------------------------------------------
# Patches and masks

sizes = st.integers(1, 4)
sides = st.integers(2, 6)


@given(batch=sizes, t=sizes, h=sizes, w=sizes, tubelet=st.integers(1, 3), patch=sizes, c=sizes)
@settings(deadline=None)
def test_unpatchify_undoes_patchify(batch, t, h, w, tubelet, patch, c):
    config = VideoMAEConfig(num_frames=t * tubelet, tubelet_size=tubelet, num_channels=c,
                            image_size=(h * patch, w * patch), patch_size=patch,
                            norm_pix_loss=False)
    video = torch.randn(batch, config.num_frames, c, *config.image_size)
    patches = patchify(video, config)
    assert patches.shape == (batch, t * h * w, tubelet * patch * patch, c)
    assert torch.equal(unpatchify(patches, config), video)
    # The last patch is the last corner of the clip, channels innermost.
    corner = video[:, -tubelet:, :, -patch:, -patch:].movedim(2, -1)
    assert torch.equal(patches[:, -1], corner.flatten(1, 3))


@given(kind=st.sampled_from(["tube", "random", "frame"]), batch=sizes, t=st.integers(2, 8), h=sides,
       w=sides, ratio=st.floats(0.05, 0.95), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_masks(kind, batch, t, h, w, ratio, seed):
    units = {"tube": h * w, "random": t * h * w, "frame": t}[kind]

    def draw():
        torch.manual_seed(seed)
        return random_mask(kind, batch, (t, h, w), ratio)

    if not 0 < int(ratio * units) < units:
        with pytest.raises(ValueError, match="mask_ratio"):
            draw()
        return
    mask = draw()
    assert mask.dtype == torch.bool and mask.shape == (batch, t * h * w)
    assert torch.equal(mask, draw()), "the same seed gives the same mask"
    count = int(ratio * units) * (t * h * w // units)
    assert (mask.sum(dim=1) == count).all(), "the same count in every clip"
    grid = mask.view(batch, t, h * w)
    if kind == "tube":
        assert (grid == grid[:, :1]).all(), "the same spatial positions at every time step"
    if kind == "frame":
        assert (grid == grid[:, :, :1]).all(), "whole time steps"

    visible, masked = split_mask(mask)
    assert not mask.gather(1, visible).any() and mask.gather(1, masked).all()
    for index in (visible, masked):
        assert (index.diff(dim=1) > 0).all(), "in increasing order"
    for same in (mask.numpy(), mask.tolist()):
        assert torch.equal(split_mask(same)[1], masked), "arrays and lists are accepted, too"


def test_every_tube_is_masked_equally_often():
    masks = random_mask("tube", 4000, (2, 4, 4), 0.75)
    assert ((masks.float().mean(dim=0) - 0.75).abs() < 0.03).all()


def test_encoder_does_not_see_masked_pixels_and_loss_does_not_see_visible_ones():
    model = VideoMAEForPreTraining(VideoMAEConfig(**SMALL))
    clip, mask = clip_and_mask(model.config, kind="tube")
    patches = patchify(clip, model.config)
    noise, is_masked = torch.randn_like(patches), mask[..., None, None]
    masked_changed = unpatchify(torch.where(is_masked, noise, patches), model.config)
    visible_changed = unpatchify(torch.where(is_masked, patches, noise), model.config)
    assert torch.equal(model(masked_changed, mask).logits, model(clip, mask).logits)
    other = model(visible_changed, mask)
    target = model.target(take(patches, split_mask(mask)[1]))
    assert torch.allclose(other.loss, (other.logits - target).square().mean())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_keeps_visible_pixels_and_draws_predictions(norm_pix_loss):
    """If the prediction is the truth, the picture is the original, so normalization is undone."""
    model = VideoMAEForPreTraining(VideoMAEConfig(**SMALL, norm_pix_loss=norm_pix_loss))
    frames = torch.randint(256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    clip, mask = normalize(frames), random_mask("tube", 2, model.config.grid, 0.75)
    truth = model.target(take(patchify(clip, model.config), split_mask(mask)[1]))
    model.decoder.forward = lambda *_: truth
    original, grey, reconstruction = reconstruct(model, clip, mask)
    assert torch.allclose(original, frames / 255, atol=1e-5)
    assert torch.allclose(reconstruction, original, atol=1e-5)
    grey, original = patchify(grey, model.config), patchify(original, model.config)
    assert torch.equal(grey[~mask], original[~mask]) and (grey[mask] == 0.5).all()


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    first, _, last = VideoMAEModel(VideoMAEConfig(**SMALL, drop_path_rate=0.5)).encoder.blocks
    x = torch.ones(4000, 1, 1)
    dropped = last.drop(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean().item() - 1) < 0.06
    assert torch.equal(first.drop(x), x) and torch.equal(last.eval().drop(x), x)


# --------------------------------------------------------------------------------------------------
# Preprocessing


@pytest.mark.parametrize("height, width", [(240, 320), (500, 281), (224, 224), (113, 150)])
def test_preprocess_equals_transformers(height, width):
    """Within one 8-bit level of transformers' Pillow processor, and 0.01 levels on average."""
    theirs = pytest.importorskip("transformers.models.videomae.image_processing_pil_videomae",
                                 reason="transformers is not installed")
    theirs = theirs.VideoMAEImageProcessorPil(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    coarse = torch.randint(256, (4, 3, height // 8 + 1, width // 8 + 1)).byte()
    frames = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :height, :width]
    last = frames.movedim(1, -1).numpy()  # (T, H, W, 3)
    ours = preprocess(frames, VideoMAEConfig())
    expected = theirs(list(last), return_tensors="pt").pixel_values[0]
    levels = (ours - expected).abs() * 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert levels.max() < 1.01 and levels.mean() < 0.01
    for same in (last, list(last), list(frames)):
        assert torch.equal(preprocess(same, VideoMAEConfig()), ours)


@given(height=st.integers(1, 90), width=st.integers(1, 90), model_hw=st.tuples(
    st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])))
@settings(deadline=None, max_examples=60)
def test_preprocess_covers_the_models_rectangle(height, width, model_hw):
    """Frames of any size fit the model; a uniform colour stays uniform, without borders."""
    config = VideoMAEConfig(image_size=model_hw)
    frames = torch.full((2, height, width, 3), 200, dtype=torch.uint8)
    if width == 3 or height == 3:
        frames = torch.full((2, height + 4, width + 4, 3), 200, dtype=torch.uint8)
    pixel_values = preprocess(frames, config)
    assert pixel_values.shape == (2, 3, *model_hw)
    pixel = normalize(frames[:, :1, :1].movedim(-1, 1))  # (2, 3, 1, 1)
    assert torch.equal(pixel_values, pixel.expand_as(pixel_values))


@given(total=st.integers(1, 100), count=st.integers(1, 20), stride=st.integers(1, 6),
       start=st.floats(0, 1))
def test_frame_indices_are_a_clip_within_the_video(total, count, stride, start):
    index = frame_indices(total, count, stride, start)
    assert len(index) == count and index.min() >= 0 and index.max() < total
    if total > (count - 1) * stride:
        assert (index.diff() == stride).all(), "no frame is repeated"
        assert frame_indices(total, count, stride, 0.0)[0] == 0
        assert frame_indices(total, count, stride, 1.0)[-1] == total - 1
    else:
        assert index[0] == 0, "a short video starts at its first frame"


# --------------------------------------------------------------------------------------------------
# Compiled and exported


def test_pretraining_compiles_to_one_graph_and_reads_no_value_back():
    """fullgraph=True refuses graph breaks. Fake tensors have no values, so code that reads one, as
    a copy from a GPU does, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = VideoMAEConfig(**SMALL, **FIRST_TOKEN, drop_path_rate=0.1)
    model = VideoMAEForPreTraining(config).eval()
    weight = model.videomae.encoder.patch_embed.weight
    clip, mask = clip_and_mask(config, kind="tube")
    expected = model(clip, mask).loss
    expected.backward()
    gradient, weight.grad = weight.grad, None
    compiled = torch.compile(model.autoencode, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(clip, *split_mask(mask))
    loss.backward()
    assert relative_error(loss, expected) <= TOLERANCE
    assert relative_error(weight.grad, gradient) <= TOLERANCE
    compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(compiled(clip, mask).loss, expected) <= TOLERANCE, "with one graph break"

    model.train()
    pair = split_mask(mask)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        clip, mask, *pair = (fake.from_tensor(x) for x in (clip, mask, *pair))
        model.autoencode(clip, *pair)[0].backward()
        with pytest.raises(Exception, match="_local_scalar_dense|data-dependent"):
            model(clip, mask)


def test_classifier_is_exported():
    """torch.export supports any batch size, and the program gives the model's outputs."""
    model = VideoMAEForVideoClassification(VideoMAEConfig(**SMALL, num_labels=5)).eval()
    clip, _ = clip_and_mask(model.config)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (clip,), dynamic_shapes={"pixel_values": {0: batch}})
    clip = torch.cat([clip, clip + 1])
    assert torch.allclose(program.module()(clip).logits, model(clip).logits, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Outputs and options under transformers' names


def test_outputs_omit_missing_fields():
    """As in transformers, output[0] is the loss, or the logits if there are no labels."""
    model = VideoMAEForVideoClassification(VideoMAEConfig(**SMALL)).eval()
    clip, _ = clip_and_mask(model.config)
    plain = model(clip)
    assert plain[0] is plain.logits and plain.loss is None and plain.attentions is None
    labelled = model(clip, labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert labelled._fields == ("loss", "logits", "hidden_states")
    skipped = model(clip, labels=torch.tensor([-100, 1])).loss
    assert torch.allclose(skipped, F.cross_entropy(plain.logits[1:], torch.tensor([1])))

    model.config.extra = dict(output_attentions=True, return_dict=False)
    logits, attentions = model(clip)  # as the config asks
    assert torch.allclose(logits, plain.logits, atol=1e-6) and len(attentions) == 3
    assert model(clip, output_attentions=False, return_dict=True)._fields == ("logits",)


def without_scale(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def no_self_attention(self, q, k, v):
    keep = ~torch.eye(q.shape[2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@pytest.mark.parametrize("attend", [without_scale, no_self_attention])
@pytest.mark.parametrize("how", ["in place", "by class", "by instance"])
def test_weights_of_a_changed_attention_are_refused(how, attend, monkeypatch):
    """However `attend` was changed, the weights written out beside it would be wrong."""
    model = VideoMAEModel(VideoMAEConfig(**SMALL)).eval()
    clip, _ = clip_and_mask(model.config)
    attention = model.encoder.blocks[1].attn
    if how == "in place":  # as if somebody edited the file
        monkeypatch.setattr(videomae.Attention, "attend", attend)
    elif how == "by class":
        attention.__class__ = type("Changed", (videomae.Attention,), {"attend": attend})
    else:
        attention.attend = partial(attend, attention)
    before = model(clip)[0]
    for options in (dict(output_attentions=True), dict(head_mask=torch.zeros(3))):
        with pytest.raises(TypeError, match="head_mask, output_attentions: got"):
            model(clip, **options)
    assert len(model(clip, output_hidden_states=True).hidden_states) == 4
    assert torch.equal(model(clip)[0], before), "options do not outlast their call"


def test_weights_are_given_in_training_with_dropout():
    model = VideoMAEModel(VideoMAEConfig(**SMALL, attention_probs_dropout_prob=0.5))
    clip, _ = clip_and_mask(model.config)
    weights = model(clip, output_attentions=True).attentions[0]
    assert (weights == 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_a_block_without_attention_has_no_weights():
    class Silent(videomae.Block):
        def forward(self, x):
            return x + self.mlp(self.norm2(x))

    model = VideoMAEModel(VideoMAEConfig(**SMALL)).eval()
    clip, _ = clip_and_mask(model.config)
    model.encoder.blocks[1].__class__ = Silent
    with pytest.raises(TypeError, match="got 2 attentions"):
        model(clip, output_attentions=True)
    model.encoder = EncoderWithCLS(model.config)
    assert model(clip, output_hidden_states=True).hidden_states[0].shape == (2, 65, 48)


def test_threads_share_a_model_without_mixing_options():
    model = VideoMAEModel(VideoMAEConfig(**SMALL)).eval()
    clip, _ = clip_and_mask(model.config)
    options = [{}, dict(head_mask=torch.tensor([1.0, 0.0, 1.0]), output_attentions=True)]

    @torch.no_grad()
    def call(number):
        return model(clip, **options[number % 2]).last_hidden_state

    expected = [call(0), call(1)]
    assert not torch.allclose(*expected)
    with ThreadPoolExecutor(4) as pool:
        for number, output in enumerate(pool.map(call, range(200))):
            assert torch.equal(output, expected[number % 2])


# --------------------------------------------------------------------------------------------------
# Bad input raises an error that names the argument


@pytest.mark.parametrize("fields", [
    dict(image_size=30), dict(image_size=(32, 30)), dict(num_frames=15), dict(num_frames=0),
    dict(hidden_size=100), dict(decoder_hidden_size=100), dict(hidden_act="swish"),
    dict(position_embedding="learned"), dict(norm_pix_loss=True, patch_size=1, tubelet_size=1),
    dict(num_labels=3, id2label={0: "walk", 1: "run"}), dict(initializer_range=0.0),
], ids=str)
def test_config_names_the_bad_field(fields):
    with pytest.raises(ValueError, match=f"^({'|'.join(fields)}): got "):
        VideoMAEConfig(**fields)


def test_id2label_sets_num_labels():
    assert VideoMAEConfig().num_labels == 2 and VideoMAEConfig(num_labels=5).num_labels == 5
    for names in ({0: "walk", 1: "run", 2: "jump"}, ["walk", "run", "jump"]):
        config = VideoMAEConfig(id2label=names)
        assert config.num_labels == 3 and config.label2id == {"walk": 0, "run": 1, "jump": 2}


def test_pretraining_without_the_final_norm_warns():
    with pytest.warns(UserWarning, match="use_mean_pooling: .* pass False") as caught:
        VideoMAEForPreTraining(VideoMAEConfig(**SMALL))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VideoMAEForPreTraining(VideoMAEConfig.preset("tiny"))


def test_models_refuse_wrong_inputs():
    config = VideoMAEConfig(**SMALL)
    model = VideoMAEForPreTraining(config)
    clip, mask = clip_and_mask(config)
    uneven = mask.clone()  # the total still divides, so a reshape would mix the clips
    uneven[0, mask[0].nonzero()[0, 0]], uneven[1, (~mask[1]).nonzero()[0, 0]] = False, True
    cases = [
        (clip.to(torch.uint8), mask, "pixel_values: got torch.uint8"),
        (clip.numpy(), mask, "pixel_values: got float32"),
        (clip.tolist(), mask, "pixel_values: got list"),
        *((wrong, mask, "pixel_values: got shape") for wrong in
          (clip.transpose(1, 2), clip[:, :, :1], clip[:, :6], clip[..., :24], clip[0], clip[:0])),
        (clip, mask.int(), "bool_masked_pos: got torch.int32"),
        (clip, mask[:1], r"bool_masked_pos: got .* \(1, 64\)"),
        (clip, mask.repeat(1, 2), r"bool_masked_pos: got .* \(2, 128\)"),
        (clip, mask[0], r"bool_masked_pos: got .* \(64,\)"),
        (clip.double(), mask, "pixel_values: got torch.float64"),
        (clip, uneven, r"bool_masked_pos: got \[47, 49\] masked patches"),
        (clip, torch.ones_like(mask), r"bool_masked_pos: got \[64, 64\] masked patches"),
        (clip, torch.zeros_like(mask), r"bool_masked_pos: got \[0, 0\] masked patches"),
    ]
    for pixel_values, bool_masked_pos, message in cases:
        for module in (model, model.videomae):
            with pytest.raises((TypeError, ValueError), match=message):
                module(pixel_values, bool_masked_pos)
    classifier = VideoMAEForVideoClassification(config)
    frames = torch.zeros(8, 40, 50, 3, dtype=torch.uint8)
    cases = [
        (lambda: model(clip, mask, head_mask=torch.ones(2)), r"head_mask: got shape \(2,\)"),
        (lambda: model(clip, mask, interpolate=True), "keyword argument 'interpolate'"),
        (lambda: classifier.half()(clip), "pixel_values: got torch.float32"),
        (lambda: VideoMAEConfig(num_labels=1), "num_labels: got 1"),
        (lambda: VideoMAEConfig(extra=dict(problem_type="regression")), "problem_type: got"),
        (lambda: normalize(clip), "frames: got torch.float32"),
        (lambda: preprocess(frames.float(), config), "frames: got torch.float32"),
        (lambda: preprocess(frames[0], config), r"frames: got .* shape \(40, 50, 3\)"),
        (lambda: preprocess(frames[..., :1], config), r"frames: got .* shape \(8, 40, 50, 1\)"),
        (lambda: preprocess(frames[:, :3], config), "frames: got"),
        (lambda: random_mask("checkerboard", 2, config.grid, 0.75), "kind: got 'checkerboard'"),
        (lambda: VideoMAEConfig.preset("giant2"), "preset: got 'giant2', expected one of small"),
    ]
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()


# --------------------------------------------------------------------------------------------------
# Seams for research, where the obvious edit works


def train(model, clip, mask, steps=20):
    """Train for a few steps on one batch -> the last loss divided by the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        losses.append(model(clip, mask).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses[-1].item() / losses[0].item()


def test_seam_mask_by_scores():
    """Mask the patches whose pixels vary most."""
    model = VideoMAEForPreTraining(VideoMAEConfig(**SMALL))
    clip, _ = clip_and_mask(model.config)
    scores = patchify(clip, model.config).var(dim=(2, 3))  # (B, N)
    mask = mask_highest(scores, num_masked=48)
    assert (mask.sum(dim=1) == 48).all()
    for score, is_masked in zip(scores, mask, strict=True):
        assert score[is_masked].min() > score[~is_masked].max()
    assert model(clip, mask).logits.shape == (2, 48, model.config.patch_dim)


def test_seam_predict_some_of_the_masked_patches():
    """The decoder predicts any subset. Its loss is that of these patches, and a model that always
    predicts only some can still fill in all of them."""
    class EverySecond(VideoMAEForPreTraining):
        def autoencode(self, pixel_values, visible, masked):
            return super().autoencode(pixel_values, visible, masked[:, ::2])

    model = EverySecond(VideoMAEConfig(**SMALL)).eval()
    clip, mask = clip_and_mask(model.config)
    visible, masked = split_mask(mask)
    loss, logits = model(clip, mask)
    target = model.target(take(patchify(clip, model.config), masked[:, ::2]))
    assert logits.shape == target.shape and torch.allclose(loss, F.mse_loss(logits, target))

    plain = VideoMAEForPreTraining(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(clip, (visible, masked[:, ::2])).loss, loss)
    for ours, theirs in zip(reconstruct(model, clip, mask), reconstruct(plain, clip, mask),
                            strict=True):
        assert torch.equal(ours, theirs)


def test_seam_hook_on_the_encoder():
    """Hooks, FSDP and compile act on module calls, so every model must call its encoder."""
    config, shapes = VideoMAEConfig(**SMALL), []
    clip, mask = clip_and_mask(config)
    for cls in (VideoMAEForPreTraining, VideoMAEForVideoClassification):
        model = cls(config)
        encoder = model.videomae.encoder
        encoder.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
        model(clip, *[mask] * (cls is VideoMAEForPreTraining))
    assert shapes == [(2, 16, 48), (2, 64, 48)]


class Distillation(VideoMAEForPreTraining):
    """Predicts a frozen teacher's features of the masked patches, computed from the whole clip."""

    def __init__(self, config, teacher):
        super().__init__(config)
        self.teacher = teacher.eval().requires_grad_(False)
        self.decoder.head = nn.Linear(config.decoder_hidden_size, teacher.config.hidden_size)

    def autoencode(self, pixel_values, visible, masked):
        patches = patchify(pixel_values, self.config)
        target = take(self.teacher.encoder(patches), masked)  # (B, N_mask, D_teacher)
        encoded = self.videomae.encoder(take(patches, visible), visible)
        predicted = self.decoder(encoded, visible, masked)
        return 1 - F.cosine_similarity(predicted, target, dim=-1).mean(), predicted


def test_seam_custom_target_and_loss():
    teacher = VideoMAEModel(VideoMAEConfig(**SMALL | dict(hidden_size=24) | FIRST_TOKEN))
    model = Distillation(VideoMAEConfig(**SMALL), teacher)
    clip, mask = clip_and_mask(model.config, kind="tube")
    assert model(clip, mask).logits.shape == (2, 48, 24)
    assert train(model, clip, mask) < 0.5


class BlindDecoder(videomae.VideoMAEDecoder):
    """Predicts from positions alone."""

    def forward(self, encoded, visible, masked):
        return super().forward(torch.zeros_like(encoded), visible, masked)


def test_seam_custom_decoder():
    model = VideoMAEForPreTraining(VideoMAEConfig(**SMALL))
    model.decoder = BlindDecoder(model.config)
    clip, mask = clip_and_mask(model.config, kind="tube")
    assert torch.equal(model(clip, mask).logits, model(clip + 1, mask).logits)


class EncoderWithCLS(videomae.VideoMAEEncoder):
    """Prepends a learned token to the patches."""

    def __init__(self, config):
        super().__init__(config)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, config.hidden_size))

    def forward(self, patches, index=slice(None)):
        x = self.patch_embed(patches.flatten(2)) + self.positions[index]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + M, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DecoderWithoutCLS(videomae.VideoMAEDecoder):
    """Drops the prepended token, which has no position."""

    def forward(self, encoded, visible, masked):
        return super().forward(encoded[:, 1:], visible, masked)


class PreTrainingWithCLS(VideoMAEForPreTraining):
    def __init__(self, config):
        super().__init__(config)
        self.videomae.encoder, self.decoder = EncoderWithCLS(config), DecoderWithoutCLS(config)


class ClassificationWithCLS(VideoMAEForVideoClassification):
    def __init__(self, config):
        super().__init__(config)
        self.videomae.encoder = EncoderWithCLS(config)


def test_seam_added_token_is_trained_and_used():
    config = VideoMAEConfig(**SMALL, **FIRST_TOKEN)
    clip, mask = clip_and_mask(config, kind="tube")
    model = PreTrainingWithCLS(config)
    assert train(model, clip, mask) < 1 and model.videomae.encoder.cls_token.grad.any()

    classifier = ClassificationWithCLS(config)
    output = classifier(clip, labels=torch.tensor([0, 1]))
    output.loss.backward()
    cls_token = classifier.videomae(clip).last_hidden_state[:, 0]
    assert torch.equal(output.logits, classifier.classifier(cls_token))
    assert classifier.videomae.encoder.cls_token.grad.any()


@pytest.mark.parametrize("kind, num_new", [(PreTrainingWithCLS, 1), (ClassificationWithCLS, 3)])
def test_seam_changed_model_loads_published_weights_and_its_own(kind, num_new, tmp_path, caplog):
    caplog.set_level("WARNING", logger="videomae")
    source = GOLDEN / "hf_pretrain_tiny"
    with pytest.raises(ValueError, match='Missing key.*: "videomae.encoder.cls_token". $'):
        kind.from_pretrained(source)
    caplog.clear()
    model = kind.from_pretrained(source, strict=False)
    assert "videomae.encoder.cls_token" in caplog.messages[-1]
    published = VideoMAEForPreTraining.from_pretrained(source).state_dict()
    loaded = [torch.equal(x, published[n]) for n, x in model.state_dict().items() if n in published]
    assert all(loaded) and len(loaded) == len(model.state_dict()) - num_new

    clip, mask = clip_and_mask(model.config)
    inputs = (clip, mask) if kind is PreTrainingWithCLS else (clip,)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(again(*inputs).logits, model(*inputs).logits)


class WithinTimeSteps(videomae.VideoMAEEncoder):
    """Restricts attention to the patches of the same time step."""

    def __init__(self, config):
        super().__init__(config)
        steps, height, width = config.grid
        self.register_buffer("step", torch.arange(steps).repeat_interleave(height * width))

    def forward(self, patches, index=slice(None)):
        step = self.step[index].expand(len(patches), -1)  # (B, M)
        is_same = step[:, None, :, None] == step[:, None, None, :]  # (B, 1, M, M)
        for block in self.blocks:
            block.attn.attend = partial(F.scaled_dot_product_attention, attn_mask=is_same)
        return super().forward(patches, index)


def test_seam_attention_within_time_steps():
    model = VideoMAEForPreTraining(VideoMAEConfig(**SMALL))
    model.videomae.encoder = WithinTimeSteps(model.config)
    clip, mask = clip_and_mask(model.config, kind="tube")
    assert train(model, clip, mask) < 1

    changed = clip.clone()
    changed[:, -2:] += torch.randn_like(clip[:, -2:])  # the last time step's two frames
    for bool_masked_pos, per_step in ((mask, 4), (None, 16)):
        before, after = (model.videomae(x, bool_masked_pos)[0] for x in (clip, changed))
        same = (before == after).all(dim=-1)  # (B, N_vis)
        assert same[:, :-per_step].all() and not same[:, -per_step:].any()
