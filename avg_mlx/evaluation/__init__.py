"""Accuracy, visual tokens and time of each way to choose a granularity, on questions with known answers."""
