"""Fine-tuning: the language model learns all granularities, and the router learns to choose among them (RGLF)."""
