"""How good a model is: validation loss, samples and benchmarks."""
