"""This project and TRL on the same models, prompts and token counts, side by side."""
