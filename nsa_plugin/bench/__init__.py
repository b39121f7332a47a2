"""Every way to prepare the metadata of a replay, measured in one run on the same inputs, every value checked."""
