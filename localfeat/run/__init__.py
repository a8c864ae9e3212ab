"""One run: configuration, building, training, its folder, and the commands that read it."""
