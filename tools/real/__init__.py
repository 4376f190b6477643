"""Real inputs for real models: text, photographs, rendered lines, speech; see `tools.real_inputs`."""
