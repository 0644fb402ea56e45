"""ALGORITHMS: one file each, with what is specific to it."""
