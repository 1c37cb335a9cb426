"""Where an answer's time and memory go: measured on this machine, and counted from the shapes."""
