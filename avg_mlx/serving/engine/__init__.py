"""One thread that owns the model: requests are looked at, prefilled and decoded together, a step at a time."""
