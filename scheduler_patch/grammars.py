"""Grammars that come to a point where they allow no token, on every device."""

from __future__ import annotations

import torch
from sglang.srt.runtime_context import get_server_args

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec


def leave_dead_ends(vocab_mask: torch.Tensor) -> None:
    """Allow all tokens in rows that allow none, in place.

    Args:
        vocab_mask: int32 [rows, words], a bit for each token.
    """
    vocab_mask.masked_fill_((vocab_mask == 0).all(dim=-1, keepdim=True), -1)


def leave_dead_ends_of_grammar(grammar: object, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """``XGrammarGrammar.apply_vocab_mask``: SGLang masks every token where a grammar, as ``root ::= root``, allows none.

    That leaves no distribution to sample from, which ends the scheduler. Instead any token may come: the grammar does not
    accept it, and SGLang ends this request alone.
    """
    if is_sparsespec(get_server_args()):
        leave_dead_ends(vocab_mask)


def leave_dead_ends_of_backend(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """``XGrammarGrammarBackend.apply_vocab_mask``: as above, for grammars behind reasoning."""
    if is_sparsespec(get_server_args()):
        leave_dead_ends(vocab_mask)


def register_hooks() -> None:
    """Register the hooks of this module."""
    grammars = "sglang.srt.constrained.xgrammar_backend."
    add_hook(grammars + "XGrammarGrammar.apply_vocab_mask", leave_dead_ends_of_grammar, "before")
    add_hook(grammars + "XGrammarGrammarBackend.apply_vocab_mask", leave_dead_ends_of_backend, "before")
