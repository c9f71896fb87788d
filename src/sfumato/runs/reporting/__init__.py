"""What a run tells: log, plot, samples, trackers, and the table of all runs."""
