"""What a run can resume from: checkpoints, their folders, and the identity of a run."""
