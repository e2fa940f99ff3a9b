"""What train_tiny.py trains on and shows: synthetic clips, videos, augmentation,
evaluation, pictures and tables."""
