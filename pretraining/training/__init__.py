"""How a model is trained: flags, setup, model and optimizer. The loop is in train_accelerate.py."""
