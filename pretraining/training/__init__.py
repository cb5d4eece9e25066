"""How a model is trained: flags, model, optimizer and a step."""
