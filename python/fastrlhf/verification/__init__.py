"""What `fastrlhf verify` does: every operation against its definition in float64 on hostile inputs, every seam of an installed
framework against the framework's own function, speed and memory beside each other."""
