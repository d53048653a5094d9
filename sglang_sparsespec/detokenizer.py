"""SGLang's detokenizer for tokens that arrive several at a time.

The detokenizer process imports this module by name, so it imports nothing but SGLang's detokenizer.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.detokenizer_manager import DetokenizerManager


class RunDetokenizer(DetokenizerManager):
    """Sends no part of a text twice.

    While a text ends within a character, SGLang sends its beginning up to where ``find_printable_text`` sees the end of a
    word, and notes how much it has sent. That place may move back as tokens are added: of a Chinese character and half an
    emoji it sends the character, of the character, an emoji and half an emoji nothing. Then it forgets what it has sent.
    A token at a time does not get there, because a text is settled whenever it ends with a whole character.
    """

    def _decode_batch_token_id_output(self, recv_obj: Any) -> list[str]:
        """The new text of each request: what has been sent stays sent."""
        states = {rid: self.decode_status[rid] for rid in recv_obj.rids if rid in self.decode_status}
        sent = {rid: state.sent_offset for rid, state in states.items()}
        texts = super()._decode_batch_token_id_output(recv_obj)
        for rid, state in states.items():
            state.sent_offset = max(state.sent_offset, sent[rid])
        return texts
