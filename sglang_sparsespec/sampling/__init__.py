"""Drafting tokens and accepting them: exact for greedy, seeded and random sampling."""
