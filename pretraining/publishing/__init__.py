"""How a model leaves the run folder: model cards, export, the Hub, other formats."""
