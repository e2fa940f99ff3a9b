"""The data, augmentation, evaluation, pictures and tables of train_tiny.py.

To train on your own, pass main() a function that loads it: `train_tiny.main(load=...)`. A data set
is any object with these five members:

    classes                the list of class names
    labels                 (n,) int64, the class of each clip
    train_clips(indices)   (B,) -> (B, T, 3, h, w) uint8; runs in the loader's workers
    prepare(frames)        (B, T, 3, h, w) uint8 -> (B, T, 3, H, W) float32 pixel_values, augmented;
                           runs on the model's device
    test_views(index)      -> (V, T, 3, H, W) float32, the views of one clip, from
                           `videomae.preprocess`; predictions are averaged over them

Random numbers come from torch's global generator, which the training loop seeds for each batch.
"""
