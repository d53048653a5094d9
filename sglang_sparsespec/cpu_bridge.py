"""What SGLang 0.5.17 lacks to serve on a processor without AMX.

``RotaryEmbedding.__init__`` (``sglang/srt/layers/rotary_embedding/base.py``) imports
``vllm._custom_ops.rotary_embedding`` on a host that is neither CUDA nor, by
``SGLANG_USE_CPU_ENGINE``, an AMX one. The bridge is a module of that name with the one
function, in torch. It is installed only where SPARSESPEC runs on CPU (or the environment
variable below is set, to serve a plain baseline next to it) and vLLM is not there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types

import torch

CPU_BRIDGE_ENV = "SPARSESPEC_CPU_BRIDGE"


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """Rotate ``query`` and ``key`` in place (signature of ``vllm._custom_ops``).

    Args:
        positions: int [tokens].
        query: float [tokens, heads * head_size].
        key: float [tokens, kv_heads * head_size], or None.
        head_size: elements per head.
        cos_sin_cache: float [max_position, rotary_dim], cosines then sines.
        is_neox: halves are rotated against each other; otherwise neighbours are.
    """
    cos, sin = cos_sin_cache[positions.flatten()].to(query.dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary_dim = cos_sin_cache.shape[-1]
    for tensor in (query, key):
        if tensor is None:
            continue
        rotated = tensor.view(tensor.shape[0], -1, head_size)[..., :rotary_dim]
        if is_neox:
            first, second = rotated.chunk(2, dim=-1)
        else:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        new_first = first * cos - second * sin
        new_second = second * cos + first * sin
        first.copy_(new_first)
        second.copy_(new_second)


def install_cpu_bridge() -> bool:
    """Provide ``vllm._custom_ops`` in this process; False if a real vLLM is installed."""
    if "vllm" in sys.modules:
        return getattr(sys.modules["vllm"], "__sparsespec_bridge__", False)
    if importlib.util.find_spec("vllm") is not None:
        return False
    package = types.ModuleType("vllm", __doc__)
    package.__path__ = []  # type: ignore[attr-defined]
    package.__sparsespec_bridge__ = True  # type: ignore[attr-defined]
    ops = types.ModuleType("vllm._custom_ops", __doc__)
    ops.rotary_embedding = rotary_embedding  # type: ignore[attr-defined]
    package._custom_ops = ops  # type: ignore[attr-defined]
    sys.modules["vllm"] = package
    sys.modules["vllm._custom_ops"] = ops
    return True


def install_cpu_bridge_if_asked() -> None:
    """Install the bridge in a child process of a server that turned it on."""
    if os.environ.get(CPU_BRIDGE_ENV) == "1":
        install_cpu_bridge()
