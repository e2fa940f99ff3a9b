"""What train_tiny.py trains on and shows: clips, augmentation, evaluation, pictures and tables.

A data set is any object with these four:

    classes                its classes' names, a list
    labels                 (n,) int64, the class of each clip
    train_clips(indices)   (B,) -> (B, T, 3, H, W) uint8, augmented
    test_views(index)      -> (V, T, 3, H, W) float32, the views of one clip from
                           `videomae.preprocess`; predictions are means over them

Random numbers come from torch's global generator, which the training loop seeds for each batch.
"""
