"""The seams of each framework, as data."""
