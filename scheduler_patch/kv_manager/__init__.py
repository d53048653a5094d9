"""The dynamic KV manager (paper section 4.4, arXiv 2512.01278): running requests move to the host when the device is full.

:mod:`.manager` decides who leaves and who returns, :mod:`.host_tier` moves their KV, :mod:`.hooks` puts both into SGLang.
"""
