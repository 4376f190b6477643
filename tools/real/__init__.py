"""Real inputs for real models, see `tools.real_inputs`."""
