"""Names in a run folder, beside checkpoints and the final model."""

TRAINING_ARGS = "training_args.yaml"  # every flag: a recipe that repeats the run
IDENTITY = "identity.json"  # what the run may be compared with, see identity.py
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"  # what went wrong on the way
UNSENT = "unsent.json"  # by tracker, the last step that it got, where it did not get all
PLOTS = "plots"
