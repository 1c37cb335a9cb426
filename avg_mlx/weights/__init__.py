"""Weights on disk: models are found, checked, loaded, converted, quantized, fused and exported."""
