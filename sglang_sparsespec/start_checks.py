"""What must be true of a server that starts: that what is handed to SGLang arrives there.

A hook that is in force may still do nothing, if SGLang has come to go another way. So the effects are looked at.
"""

from __future__ import annotations

import argparse
import pickle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.mem_cache import allocation_sizing
from sglang.srt.server_args import ServerArgs

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.settings import Settings, settings_of
from sglang_sparsespec.sglang_compat import VERSION
from sglang_sparsespec.spec_input import SparseSpecDraftInput

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

#: A setting, and a value that is nobody's default.
NAME, PROBE = "min_budget", Settings.min_budget + 1


def check_settings_arrive() -> None:
    """Check that a flag and a keyword end up in the ``ServerArgs`` that SGLang's processes are given.

    Raises:
        RuntimeError: they do not.
    """
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    # SGLang resolves nothing of a dummy model.
    asked = {"model_path": "dummy", "device": "cpu", "speculative_algorithm": ALGORITHM, f"sparsespec_{NAME}": PROBE}
    line = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    makers = {
        "flags of the command line": lambda: ServerArgs.from_cli_args(parser.parse_args(line)),
        "keywords of sglang.Engine": lambda: Engine.server_args_class(**asked),
    }
    for what, make in makers.items():
        if getattr(settings_of(pickle.loads(pickle.dumps(make()))), NAME) != PROBE:
            raise RuntimeError(f"sglang-sparsespec does not fit this sglang {VERSION}: its {what} have no effect.")


def check_row_width(model_runner: ModelRunner) -> None:
    """Check that a request at the context limit has room in its row for the slots of its next rounds.

    Without it they would be written into the row of another request.

    Raises:
        RuntimeError: rows are too short.
    """
    width = model_runner.req_to_token_pool.req_to_token.shape[1]
    needed = model_runner.model_config.context_len + allocation_sizing.get_alloc_reserve_per_decode()
    if width < needed:
        raise RuntimeError(
            f"sglang-sparsespec does not fit this sglang {VERSION}: rows of req_to_token have {width} entries, and rounds "
            f"may need {needed}."
        )


def check_relay(model_runner: ModelRunner) -> None:
    """Check that the tokens and lengths that a round leaves are those that the next one finds (overlap scheduling).

    Raises:
        RuntimeError: they are not.
    """
    device, pool = model_runner.device, model_runner.req_to_token_pool
    relay = model_runner.spec_algorithm.create_future_map(device, pool)
    rows = torch.arange(2, device=device)
    written = SparseSpecDraftInput(rows + 7, rows + 3)
    relay.publish(rows, written.new_seq_lens)
    relay.stash(rows, RelayPayload.from_draft_input(written))
    found = SparseSpecDraftInput(torch.full_like(rows, -1), torch.full_like(rows, -1))
    found.future_indices = rows.flip(0)
    batch: Any = SimpleNamespace(spec_info=found, req_pool_indices_cpu=rows.flip(0).cpu())
    relay.resolve_seq_lens_cpu(batch)
    relay._resolve_spec_extras(batch)
    if found.bonus_tokens.tolist() != [8, 7] or batch.seq_lens_cpu.tolist() != [4, 3]:
        raise RuntimeError(f"sglang-sparsespec does not fit this sglang {VERSION}: a round is not handed on to the next.")
