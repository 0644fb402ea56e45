"""The rooms: one op each, its definition (`reference.py`) and its implementations."""
