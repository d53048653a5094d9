"""Rounds: one file for each kind, what they share, and the planner that chooses between them."""
