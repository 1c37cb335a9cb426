"""Where the time and the memory of an answer go: presets → measuring → reports."""
