"""One training run: its loop, its checkpoints and its folder."""
