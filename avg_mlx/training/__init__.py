"""Fine-tuning: instruction tuning at all granularities, and the router by feedback from the language model (RGLF)."""
