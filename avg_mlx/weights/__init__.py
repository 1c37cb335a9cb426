"""Weights on disk: checkpoints are found, checked, loaded, converted, quantized, fused and exported."""
