"""What each way of saving time in videomae.py is worth, without and with it: python benchmarks/levers.py

Each pair takes turns in one process, as in bench.py; the name says what is timed: the operation alone, or a step. What
was tried and is not in videomae.py is here as it was tried.
"""
import bench  # first: it finds videomae
import numpy as np
import torch
import torch.nn.functional as F
from bench import DEVICE, SIZES, make_step, take_turns
from einops import rearrange

import videomae
from videomae import VideoMAEConfig, patchify, random_mask, split_mask


def whole_last_block(decoder, encoded, visible, masked):
    """The decoder's forward with every token computed in every block."""
    x = torch.cat([decoder.encoder_to_decoder(encoded) + decoder.positions[visible],
                   decoder.mask_token + decoder.positions[masked]], dim=1)
    for block in decoder.blocks:
        x, _ = block(x)
    return decoder.head(decoder.norm(x[:, visible.shape[1]:]))


class FusedBias(videomae.Attention):
    """Query and value biases added by the product itself; hooks and adapters on `qkv` would be passed by."""

    def product(self, x, bias):
        return F.linear(x, self.qkv.weight, bias)

    def forward(self, x, head_mask=None, output_attentions=False, queries=slice(None)):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = self.product(x, bias).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (heads d) -> b heads n d", heads=self.num_heads) for t in (q[:, queries], k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)")), None


class NewMemoryBias(FusedBias):
    """The biases added into new memory."""

    def product(self, x, bias):
        return self.qkv(x) + bias


def var_mean_target(cubes):
    """The published formula as it is written, on the masked cubes: back to [0, 1], then var_mean."""
    pixels = rearrange(cubes, "b m (pixels c) -> b m pixels c", c=3)
    pixels = pixels * pixels.new_tensor(videomae.IMAGENET_STD) + pixels.new_tensor(videomae.IMAGENET_MEAN)
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
    return rearrange((pixels - mean) / (variance.sqrt() + 1e-6), "b m pixels c -> b m (pixels c)")


def plain_processor(video):
    """Rescale and normalize frames as the resize leaves them, channels last in memory, each time into new memory."""
    frames = videomae.resize_short_side(videomae.stack_frames(video), 224)
    frames = videomae.center_crop(frames, 224, 224).float() * (1 / 255)
    mean, std = (torch.full((3, 1, 1), 0.5) for _ in range(2))
    return torch.stack([(frames - mean) / std])


def backward_too(module, x):
    """-> a function that runs module forward and backward on the tokens x."""
    x = x.requires_grad_()

    def run():
        y = module(x)[0]
        y.backward(y.detach())
    return run


def levers(size: str):
    """Yield (what, without, with) for a size of bench.py."""
    preset, batch, ratio = SIZES[size]
    config = VideoMAEConfig.preset(preset, use_mean_pooling=False)
    mask = random_mask("tube", batch, config.grid, ratio)
    visible, masked = (index.to(DEVICE) for index in split_mask(mask))
    with torch.device(DEVICE):
        model = videomae.VideoMAEForPreTraining(config)
        cubes = patchify(torch.randn(batch, config.num_frames, 3, *config.image_hw), config.tubelet_size,
                         config.patch_size)
        encoded = torch.randn(batch, visible.shape[1], config.hidden_size)
        tokens = torch.randn(batch, config.num_patches, config.decoder_hidden_size)
        layers = [cls(config.decoder_hidden_size, config.decoder_num_attention_heads, config)
                  for cls in (NewMemoryBias, videomae.Attention, FusedBias)]
    decoder, hidden, index = model.decoder, cubes[mask].view(batch, -1, config.cube_size), masked[..., None]

    def optimizer(**options):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return torch.optim.AdamW(model.parameters(), **options).step

    yield ("decoder, both ways: last block for masked tokens only",
           lambda: whole_last_block(decoder, encoded, visible, masked).sum().backward(),
           lambda: decoder(encoded, visible, masked).sum().backward())
    yield "target: statistics written out", lambda: var_mean_target(hidden), lambda: model.target(hidden)
    yield ("taking the masked cubes: an index, not gather",
           lambda: cubes.gather(1, index.expand(-1, -1, cubes.shape[-1])), lambda: videomae.take(cubes, masked))
    new_memory, in_place, fused = (backward_too(layer, tokens) for layer in layers)
    yield "one attention layer, both ways: biases added in place", new_memory, in_place
    yield "one attention layer, both ways: biases inside the product (not kept)", in_place, fused
    yield "AdamW: fused, not a loop", optimizer(foreach=False), optimizer(fused=True)
    fp32 = make_step("ours", "pretrain", config, batch, ratio, torch.float32)
    yield "step: bf16", fp32, make_step("ours", "pretrain", config, batch, ratio, torch.bfloat16)
    yield ("step: dual masking (an option)", fp32,
           make_step("ours, dual masking", "pretrain", config, batch, ratio, torch.float32))


def main():
    def line(name, size, without, with_it):
        before, after = take_turns({"without": without, "with": with_it}, seconds=6).values()
        print(f"| {name} | {size} | {1000 * before:.2f} | {1000 * after:.2f} | {1000 * (before - after):.2f} |",
              flush=True)

    print(bench.machine())
    print("| what | size | without, ms | with, ms | saved, ms |\n| --- | --- | --- | --- | --- |")
    for size in SIZES:
        for name, without, with_it in levers(size):
            line(name, size, without, with_it)
    video = list(np.random.default_rng(0).integers(0, 256, (16, 240, 320, 3), dtype=np.uint8))
    processor = videomae.VideoMAEImageProcessor()
    line("processor: reordered in 8 bits, then in place", "16 x 240 x 320", lambda: plain_processor(video),
         lambda: processor(video, return_tensors="pt"))


if __name__ == "__main__":
    main()
