"""A streamed text has each of its parts once, however many tokens come at a time."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.detokenizer_manager import DetokenizerManager, LimitedCapacityDict, run_detokenizer_process
from sglang.srt.server_args import ServerArgs
from tiny_chat_model import _tokenizer
from transformers import PreTrainedTokenizerFast

from sglang_sparsespec.detokenizer import RunDetokenizer
from sglang_sparsespec.scheduler_patch.detokenizer import detokenize_runs

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
#: Characters of one to four tokens, some of which SGLang prints before their word has ended.
TEXTS = ["中", "文", "國", "a", "b", " ", "\n", "é", "→", "😀", "😁"]
LENGTH = {"type": "length"}


def streamed(kind: type[DetokenizerManager], tokens: Sequence[int], cuts: Sequence[int], end: Any = LENGTH) -> list[str]:
    """The texts that a detokenizer sends for ``tokens``, which arrive up to each of ``cuts``, then up to their end."""
    detokenizer = object.__new__(kind)
    detokenizer.__dict__.update(
        tokenizer=TOKENIZER,
        vocab_size=len(TOKENIZER),
        decode_status=LimitedCapacityDict(8),
        disable_tokenizer_batch_decode=False,
        is_tool_call_parser_gpt_oss=False,
        tool_close_token_ids=(),
    )
    found = []
    for first, last in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        output = SimpleNamespace(
            rids=["a"],
            decoded_texts=[""],
            decode_ids=[list(tokens[first:last])],
            read_offsets=[0],
            finished_reasons=[end if last == len(tokens) else None],
            no_stop_trim=[False],
            skip_special_tokens=[True],
            spaces_between_special_tokens=[True],
        )
        found += detokenizer._decode_batch_token_id_output(output)
    return found


def test_a_part_is_sent_once_where_sglang_sends_it_twice() -> None:
    """A round ends within the first 😁, the next one within the second."""
    tokens = TOKENIZER.encode("中😁😁a")
    cuts = [len(TOKENIZER.encode(text)) - 1 for text in ("中😁", "中😁😁")]
    assert streamed(DetokenizerManager, tokens, cuts) == ["中", "", "中😁😁a"]
    assert streamed(RunDetokenizer, tokens, cuts) == ["中", "", "😁😁a"]


@pytest.mark.parametrize("seed", range(4))
def test_texts_are_those_of_a_token_at_a_time(seed: int) -> None:
    """Texts of whole characters, and tokens that are no text; some end with a stop string."""
    dice = random.Random(seed)
    differing = 0
    for _ in range(150):
        text, stop = "".join(dice.choices(TEXTS, k=12)), dice.choice(["", "#"])
        tokens, end = TOKENIZER.encode(text + stop), {"type": "stop", "matched": "#"} if stop else LENGTH
        if dice.random() < 0.3:
            tokens, end = dice.choices(range(5, len(TOKENIZER)), k=24), LENGTH
            text = TOKENIZER.decode(tokens)
        cuts = sorted(dice.sample(range(1, len(tokens)), dice.randint(1, 8)))
        expected = "".join(streamed(DetokenizerManager, tokens, range(1, len(tokens)), end))
        assert expected == text
        assert "".join(streamed(RunDetokenizer, tokens, cuts, end)) == expected, (tokens, cuts)
        differing += "".join(streamed(DetokenizerManager, tokens, cuts, end)) != expected
    assert differing > 0, "SGLang's detokenizer would pass"


def test_servers_start_this_detokenizer_and_others_their_own(resolve: Callable[..., Any], llama: str) -> None:
    def started(server_args: Any) -> Any:
        return detokenize_runs(lambda *args: args[-1], Engine, server_args, None, run_detokenizer_process)

    function = pickle.loads(pickle.dumps(started(resolve())))
    assert function.func is run_detokenizer_process and function.keywords == {"detokenizer_manager_class": RunDetokenizer}
    assert started(ServerArgs(model_path=llama, device="cpu")) is run_detokenizer_process
