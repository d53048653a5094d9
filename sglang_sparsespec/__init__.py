"""Sparse self-speculative decoding (PillarAttn) as an SGLang plugin.

The plugin's entry point is :func:`sglang_sparsespec.plugin.register`. Nothing
here imports SGLang, so that a wrong SGLang version can be reported in one
sentence instead of as an import error (``sglang_compat.py`` names the versions).
"""

__version__ = "0.1.0"

#: Name given to ``--speculative-algorithm`` and to the attention backend.
ALGORITHM = "SPARSESPEC"
ATTENTION_BACKEND = "sparsespec"
