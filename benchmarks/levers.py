"""What each way of saving time in videomae.py was worth, with and without it: python benchmarks/levers.py

Each pair takes turns in one process, as in bench.py. What was tried and is not in videomae.py is here as it was tried.
"""

import bench
import numpy as np
import torch
import torch.nn.functional as F
from bench import SIZES, make_step, take_turns
from einops import rearrange

import videomae
from videomae import VideoMAEConfig, patchify, random_mask, split_mask


def forward_and_backward(module, x):
    """-> a function that runs both on the tokens x."""
    x = x.requires_grad_()

    def run():
        y = module(x)[0]
        y.backward(y.detach())
    return run


def whole_last_block(decoder, encoded, visible, masked):
    """The decoder's forward with every token computed in every block."""
    x = torch.cat([decoder.encoder_to_decoder(encoded) + decoder.positions[visible],
                   decoder.mask_token + decoder.positions[masked]], dim=1)
    for block in decoder.blocks:
        x, _ = block(x)
    return decoder.head(decoder.norm(x[:, visible.shape[1]:]))


class FusedBias(videomae.Attention):
    """Query and value biases added by the product itself, and not after it; hooks or adapters on `qkv` are passed by."""

    def forward(self, x, head_mask=None, output_attentions=False, queries=slice(None)):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (heads d) -> b heads n d", heads=self.num_heads) for t in (q[:, queries], k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)")), None


def var_mean_target(cubes):
    """The target as transformers makes it: back to [0, 1], then var_mean."""
    pixels = rearrange(cubes, "b m (pixels c) -> b m pixels c", c=3)
    pixels = pixels * pixels.new_tensor(videomae.IMAGENET_STD) + pixels.new_tensor(videomae.IMAGENET_MEAN)
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
    return rearrange((pixels - mean) / (variance.sqrt() + 1e-6), "b m pixels c -> b m (pixels c)")


def slow_processor(video):
    """Rescale and normalize frames as they come out of the resize, channels last in memory, in new tensors."""
    frames = videomae.resize_short_side(videomae.stack_frames(video), 224)
    frames = videomae.center_crop(frames, 224, 224).float() * (1 / 255)
    mean, std = (torch.full((3, 1, 1), 0.5) for _ in range(2))
    return torch.stack([(frames - mean) / std])


def levers(size: str) -> dict:
    """{what: (without, with)} for a size of bench.py."""
    preset, batch, ratio = SIZES[size]
    config = VideoMAEConfig.preset(preset, use_mean_pooling=False)
    clip, pair = torch.randn(batch, config.num_frames, 3, *config.image_hw), split_mask(
        random_mask("tube", batch, config.grid, ratio))
    visible, masked = pair
    cubes = patchify(clip, config.tubelet_size, config.patch_size)
    hidden = videomae.take(cubes, masked)
    model = videomae.VideoMAEForPreTraining(config)
    tokens = torch.randn(batch, config.num_patches, config.decoder_hidden_size)
    attention, fused = (cls(config.decoder_hidden_size, config.decoder_num_attention_heads, config)
                        for cls in (videomae.Attention, FusedBias))
    encoded = torch.randn(batch, visible.shape[1], config.hidden_size)

    def decode(forward):
        def run():
            forward(encoded, visible, masked).sum().backward()
        return run

    def optimizer(**options):
        made = torch.optim.AdamW(model.parameters(), **options)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return made.step

    index = masked[..., None].expand(-1, -1, cubes.shape[-1])
    return {
        "last decoder block: masked tokens only": (decode(lambda *x: whole_last_block(model.decoder, *x)),
                                                   decode(model.decoder)),
        "target: own statistics": (lambda: var_mean_target(hidden), lambda: model.target(hidden)),
        "taking the masked cubes: index, not gather": (lambda: cubes.gather(1, index),
                                                       lambda: videomae.take(cubes, masked)),
        "query and value bias inside the product (not kept)": (forward_and_backward(attention, tokens),
                                                               forward_and_backward(fused, tokens)),
        "AdamW: fused": (optimizer(foreach=False), optimizer(fused=True)),
        "bf16": (make_step("ours", "pretrain", config, batch, ratio, torch.float32),
                 make_step("ours", "pretrain", config, batch, ratio, torch.bfloat16)),
        "dual masking (an option)": (make_step("ours", "pretrain", config, batch, ratio, torch.float32),
                                     make_step("ours, dual masking", "pretrain", config, batch, ratio, torch.float32)),
    }


def main():
    print(bench.machine())
    print("| | size | without | with | saved |\n| --- | --- | --- | --- | --- |")

    def line(name, size, pair):
        before, after = take_turns(dict(zip(("without", "with"), pair, strict=True)), seconds=6).values()
        print(f"| {name} | {size} | {1000 * before:.1f} ms | {1000 * after:.1f} ms | {1000 * (before - after):.1f} ms |",
              flush=True)

    for size in SIZES:
        for name, pair in levers(size).items():
            line(name, size, pair)
    video = list(np.random.default_rng(0).integers(0, 256, (16, 240, 320, 3), dtype=np.uint8))
    processor = videomae.VideoMAEImageProcessor()
    line("processor: reorder in 8 bits, normalize in place", "16 x 240 x 320",
         (lambda: slow_processor(video), lambda: processor(video, return_tensors="pt")))


if __name__ == "__main__":
    main()
