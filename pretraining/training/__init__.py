"""What a run consists of: flags, setup, model, steps, reports and saving. The loop is in train_accelerate.py."""
