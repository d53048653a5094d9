"""Quantised draft weights: FP8 copies of the target's linear layers, which draft steps read instead of the originals.

A draft step is as slow as its weights are long to read. Verification, prefill and plain steps use the model's own weights,
so the output stays the target's, whatever the copies are; they change what is drafted, and so how much is accepted.
"""
