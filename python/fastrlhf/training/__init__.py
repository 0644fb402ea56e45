"""Machinery that all algorithms share: checkpoints, metrics, progress, reports."""
