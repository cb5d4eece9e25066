"""Texts that a model writes: prompts, the settings of generation, and a session at the terminal."""
