"""Names in a run folder."""

WEIGHTS = "model.safetensors"  # of the final model, and in each checkpoint
TRAINING_ARGS = "training_args.yaml"  # every flag: a recipe that repeats the run
IDENTITY = "identity.json"  # what the run may be compared with, see identity.py
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"  # what went wrong on the way
PLOTS = "plots"
LOSS_PLOT = f"{PLOTS}/loss.png"
HELLASWAG_PLOT = f"{PLOTS}/hellaswag.png"
TASKS_PLOT = f"{PLOTS}/tasks.png"
