"""Sparse self-speculative decoding (PillarAttn) as an SGLang plugin.

The plugin's entry point is :func:`sglang_sparsespec.plugin.register`. Nothing
here imports SGLang, so that a wrong SGLang version can be reported in one
sentence instead of as an import error.
"""

__version__ = "0.1.0"

#: The only SGLang release this plugin is written and tested against. The hooks in
#: ``scheduler_patch/`` name internals that change between releases.
SGLANG_VERSION = "0.5.17"

#: Name given to ``--speculative-algorithm`` and to the attention backend.
ALGORITHM = "SPARSESPEC"
ATTENTION_BACKEND = "sparsespec"
