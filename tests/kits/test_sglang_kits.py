"""SGLang's own test kits (``sglang/test/kits``), run against SPARSESPEC servers.

The checks are SGLang's. What is set here are models, prompts, lengths and thresholds that its kits leave to their users.

On CPU with SmolLM2-135M in float32; with ``SPARSESPEC_TEST_DEVICE=cuda`` and ``SPARSESPEC_TEST_MODEL=FOLDER`` on a GPU with
that model. With ``SPARSESPEC_TEST_KITS=plain`` the servers are plain SGLang's, as a control: what fails there as well says
nothing about SPARSESPEC. What each kit gave is a table in docs/operations.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
import requests
import sglang.test.kl_test_utils
from engine_process import PLAIN_ENV
from environment import REPO
from quickstart import choose_port, default_prompt, server_environment
from server_client import ForkedServer
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from sglang.test.kits import (
    abort_timeout_kit,
    basic_api_contract_kit,
    basic_decode_correctness_kit,
    basic_scheduler_stress_kit,
    cache_hit_kit,
    ebnf_constrained_kit,
    json_constrained_kit,
    kl_divergence_kit,
    matched_stop_kit,
    pause_generation_kit,
    regex_constrained_kit,
    spec_server_kits,
    streaming_session_kit,
)
from sglang.test.server_fixtures import spec_eagle_fixture

from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]

ON_GPU = os.environ.get("SPARSESPEC_TEST_DEVICE", "cpu") == "cuda"
IS_PLAIN = os.environ.get("SPARSESPEC_TEST_KITS") == "plain"
COMMON = ("--enable-return-hidden-states", "--max-running-requests", "32")
CPU = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "20000")
#: With few graphs to capture, and without the penalties of a model's generation_config.json.
GPU = ("--dtype", "bfloat16", "--attention-backend", "triton", "--mem-fraction-static", "0.7")
GPU += ("--cuda-graph-max-bs-decode", "32", "--sampling-defaults", "openai")

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="takes hours on a CPU")
#: The control shows that these fail with plain SGLang as well, those with a grammar excepted: plain SGLang ends at them.
needs_larger_model = pytest.mark.skipif(
    not ON_GPU and not IS_PLAIN, reason="SmolLM2-135M does not know the answer, or does not end it"
)
needs_spec = pytest.mark.skipif(IS_PLAIN, reason="asks for what only speculation reports")


#: The kit has the end tokens of Llama's models, one of which is SmolLM2's.
needs_end_token = pytest.mark.skipif(ON_GPU, reason="the model's end token is not among those of the kit")
#: Small models end some of the kits' prompts at once. They are for models that go on.
GO_ON = ("--preferred-sampling-params", '{"ignore_eos": true}')


class Servers:
    """Keeps one server, which serves the kits that ask for it with the same flags one after another."""

    def __init__(self) -> None:
        self._key: Any = None
        self._stack = contextlib.ExitStack()
        self.server: ForkedServer | None = None

    def serve(self, folder: Path, model: str, flags: tuple[str, ...], environment: dict[str, str]) -> ForkedServer:
        """A ready server; the one of before if it has these flags and lives."""
        key = (model, flags, tuple(environment.items()))
        if self.server is None or key != self._key or self.server.process.poll() is not None:
            self.stop()
            port = choose_port(0)
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port), *flags]
            env = {**server_environment(True), "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", **environment}
            self.server = self._stack.enter_context(ForkedServer(command, port, folder / f"server-{port}.log", env))
            self.server.wait_until_ready(600)
            self._key = key
        return self.server

    def stop(self) -> None:
        """Stop the server, if there is one."""
        self.server = None
        self._stack.close()


SERVERS = Servers()


@pytest.fixture(scope="module", autouse=True)
def servers(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    KitServer.model, KitServer.folder = model_path, tmp_path_factory.mktemp("servers")
    yield
    SERVERS.stop()


class KitServer(spec_eagle_fixture.SpecEagleServerBase):
    """What SGLang's kits want of a test class. ``flags`` and ``environment`` are those of its server."""

    model: str
    folder: Path
    flags: ClassVar[tuple[str, ...]] = COMMON
    environment: ClassVar[dict[str, str]] = {}
    served_model_name = "default"

    @classmethod
    def serve(cls, plain: bool) -> ForkedServer:
        """A server, of SPARSESPEC or plain."""
        flags, environment = (*(GPU if ON_GPU else CPU), *cls.flags), dict(cls.environment)
        if plain:
            environment |= PLAIN_ENV
            flags += () if ON_GPU else ("--attention-backend", "torch_native", "--disable-cuda-graph")
        else:
            flags += ("--speculative-algorithm", "SPARSESPEC", "--sparsespec-speculate", "always")
        return SERVERS.serve(cls.folder, cls.model, flags, environment)

    @classmethod
    def setUpClass(cls) -> None:
        server = cls.serve(IS_PLAIN)
        cls._tokenizer = None
        cls.process = server.process
        cls.base_url = f"http://127.0.0.1:{server.port}"

    @classmethod
    def tearDownClass(cls) -> None:
        """The next kit may want the same server."""

    def tearDown(self) -> None:
        """Every kit leaves a server that lives, and an empty pool."""
        assert SERVERS.server is not None
        SERVERS.server.check_alive()
        assert "leak" not in SERVERS.server.log.read_text(errors="replace")
        requests.post(f"{self.base_url}/flush_cache", params={"timeout": 60}, timeout=120).raise_for_status()


# ------------------------------------------------------------------------------ spec_server_kits


class TestSpecParity(spec_server_kits.SpecParityKit, KitServer):
    """On a GPU the two may differ where two tokens are tied within the rounding of 16 bits."""

    @classmethod
    def setUpClass(cls) -> None:
        """As the kit's, which starts its reference in a way that works on GPUs only."""
        url = f"http://127.0.0.1:{cls.serve(plain=True).port}"
        cls.parity_ref_outputs = {prompt: spec_server_kits._greedy(url, prompt) for prompt in cls.parity_prompts}
        KitServer.setUpClass.__func__(cls)


class TestSpecCorrectness(spec_server_kits.SpecCorrectnessKit, KitServer):
    test_acc_length = needs_spec(spec_server_kits.SpecCorrectnessKit.test_acc_length)


class TestSpecLogprob(spec_server_kits.SpecLogprobKit, KitServer):
    pass


class TestSpecFeature(spec_server_kits.SpecFeatureKit, KitServer):
    def send_request(self) -> None:
        """The fixture asks for answers of 1,024 tokens, which take a CPU many minutes."""
        for prompt in spec_eagle_fixture.PROMPTS:
            sampling = {"temperature": 0, "max_new_tokens": 1024 if ON_GPU else 64}
            response = requests.post(f"{self.base_url}/generate", json={"text": prompt, "sampling_params": sampling})
            assert response.status_code == 200

    test_radix_attention = needs_gpu(spec_server_kits.SpecFeatureKit.test_radix_attention)
    test_constrained_decoding = needs_larger_model(spec_server_kits.SpecFeatureKit.test_constrained_decoding)


class TestSpecHiddenStates(spec_server_kits.SpecHiddenStatesKit, KitServer):
    pass


@needs_spec
class TestSpecGrammar(spec_server_kits.SpecGrammarKit, KitServer):
    pass


class TestSpecPenalty(spec_server_kits.SpecPenaltyKit, KitServer):
    pass


# ---------------------------------------------------------------------------------- other kits


class TestMatchedStop(matched_stop_kit.MatchedStopMixin, KitServer):
    test_finish_stop_str = needs_larger_model(matched_stop_kit.MatchedStopMixin.test_finish_stop_str)
    test_finish_stop_eos = needs_end_token(matched_stop_kit.MatchedStopMixin.test_finish_stop_eos)


class TestJSONConstrained(json_constrained_kit.JSONConstrainedMixin, KitServer):
    test_json_generate = needs_larger_model(json_constrained_kit.JSONConstrainedMixin.test_json_generate)
    test_mix_json_and_other = needs_larger_model(json_constrained_kit.JSONConstrainedMixin.test_mix_json_and_other)


class TestRegexConstrained(regex_constrained_kit.RegexConstrainedMixin, KitServer):
    test_regex_generate_custom_log_format = needs_larger_model(
        regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_custom_log_format
    )


class TestEBNFConstrained(ebnf_constrained_kit.EBNFConstrainedMixin, KitServer):
    test_ebnf_generate_complex_json = needs_larger_model(
        ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_complex_json
    )
    test_ebnf_generate_custom_log_format = needs_larger_model(
        ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_custom_log_format
    )


class TestBasicAPIContract(basic_api_contract_kit.BasicAPIContractMixin, KitServer):
    pass


class TestAbortAll(abort_timeout_kit.AbortAllMixin, KitServer):
    abort_all_max_new_tokens = 4000


class TestBasicDecodeCorrectness(basic_decode_correctness_kit.BasicDecodeCorrectnessMixin, KitServer):
    flags = (*COMMON, *GO_ON)
    test_basic_math = needs_larger_model(basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_basic_math)
    test_color_completion = needs_larger_model(
        basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_color_completion
    )


class TestBasicSchedulerStress(basic_scheduler_stress_kit.BasicSchedulerStressMixin, KitServer):
    flags = (*COMMON, *GO_ON)
    test_concurrent_requests = needs_larger_model(
        basic_scheduler_stress_kit.BasicSchedulerStressMixin.test_concurrent_requests
    )


class TestPauseGeneration(pause_generation_kit.PauseResumeInPlaceMixin, KitServer):
    flags = (*COMMON, *GO_ON)
    pause_ignore_eos = True  # the newer kit's own default would override the server's
    if not ON_GPU:
        pause_num_requests, pause_max_new_tokens = 8, 64


if DECLARES_RESOLUTION:  # kits that SGLang 0.5.17 does not have
    from sglang.test.kits import anthropic_messages_kit, json_mode_kit

    class TestAnthropicMessages(anthropic_messages_kit.AnthropicMessagesMixin, KitServer):
        api_key = "none"
        test_count_tokens_with_system = pytest.mark.skip(reason="without a system message the template has a longer one")(
            anthropic_messages_kit.AnthropicMessagesMixin.test_count_tokens_with_system
        )

    class TestJSONMode(json_mode_kit.JSONModeMixin, KitServer):
        @property
        def client(self) -> openai.Client:
            return openai.Client(api_key="none", base_url=f"{self.base_url}/v1")


class TestCacheHit(KitServer):
    """The prompts are ours: SGLang downloads its own."""

    def test_multi_turn_cache_hits(self) -> None:
        lines = (REPO / "benchmarks" / "data" / "aime24.jsonl").read_text(encoding="utf-8").splitlines()
        talks = [{"conversations": [{"value": json.loads(line)[key]} for key in ("problem", "solution")]} for line in lines]
        data = self.folder / "conversations.json"
        data.write_text(json.dumps(talks))
        size: dict[str, int] = {} if ON_GPU else {"num_clients": 3, "request_length": 64, "output_length": 20}
        cache_hit_kit.run_multiturn_cache_hit_test(self.base_url, self.model, dataset_path=str(data), **size)


class TestKLDivergence(kl_divergence_kit.KLDivergenceMixin, KitServer):
    """The prompts are ours: SGLang downloads its own."""

    kl_div_thres = 0.003 if ON_GPU else 1e-6
    if not ON_GPU:
        kl_div_max_samples, kl_div_prefill_max_new_tokens, kl_div_decode_max_new_tokens = 4, 48, 48

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        utils = sglang.test.kl_test_utils
        ids = get_tokenizer(cls.model).encode(default_prompt() * 2)
        length = utils.DEFAULT_PROMPT_TOKENS if ON_GPU else 200
        prompts = [ids[7 * i : 7 * i + length] for i in range(utils.DEFAULT_NUM_SAMPLES)]
        key = f"{cls.model}_{utils.DEFAULT_PROMPT_TOKENS}_{utils.DEFAULT_NUM_SAMPLES}"
        utils._cached_input_ids[key] = prompts


class TestStreamingSession(streaming_session_kit.StreamingSessionKitMixin, KitServer):
    """Some requests ask for 100,000 tokens, and are aborted; SGLang must think that the model has such a context."""

    flags = (*COMMON, *GO_ON, "--enable-streaming-session", "--chunked-prefill-size", "128", "--context-length", "131072")
    environment: ClassVar[dict[str, str]] = {
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }


class TestAbortLeak(streaming_session_kit.AbortLeakReproKitMixin, KitServer):
    flags = (*COMMON, "--enable-streaming-session", "--context-length", "512", "--chunked-prefill-size", "4096")
    environment: ClassVar[dict[str, str]] = {"SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}


class TestWaitingTimeout(abort_timeout_kit.WaitingTimeoutMixin, KitServer):
    flags = ("--max-running-requests", "1")
    if not ON_GPU:
        waiting_timeout_max_new_tokens = 128
    environment: ClassVar[dict[str, str]] = {"SGLANG_REQ_WAITING_TIMEOUT": "0.001"}


class TestRunningTimeout(abort_timeout_kit.RunningTimeoutTwoWaveMixin, KitServer):
    flags = ("--max-running-requests", "16")
    environment: ClassVar[dict[str, str]] = {"SGLANG_REQ_RUNNING_TIMEOUT": "5"}
