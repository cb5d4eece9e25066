"""What a run writes for people: metrics, trackers, plots and the progress bar."""
