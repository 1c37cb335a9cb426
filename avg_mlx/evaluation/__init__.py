"""Questions with known answers, asked at every granularity: accuracy, visual tokens and time of each way to choose."""
