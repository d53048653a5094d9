"""When the next round is launched: shortly before the one before it ends, or at once when a message comes.

The device is a clock: each event of a round is over at a time of its own, and sleeping passes it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec import round_progress
from sglang_sparsespec.round_progress import RoundProgress
from sglang_sparsespec.scheduler_patch import late_launch

WINDOW = 4
#: Seconds of a forward.
FORWARD = 0.003
HOOKED = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver.recv_requests"


class Device:
    """Stands in for the host's clock and a device of forwards of ``FORWARD`` seconds.

    Attributes:
        now: seconds since the start.
        busy_until: when everything that was launched will be over.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0
        self.events = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def new_event(self) -> DeviceEvent:
        self.events += 1
        return DeviceEvent(self)

    def launch_forward(self) -> None:
        self.busy_until = max(self.busy_until, self.now) + FORWARD


class DeviceEvent:
    """An event of the device; over once the device has done what was launched before it was recorded."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._at: float | None = None

    def record(self) -> None:
        self._at = max(self._device.busy_until, self._device.now)

    def query(self) -> bool:
        assert self._at is not None, "never recorded"
        return self._device.now >= self._at - 1e-9


class Socket:
    """A socket that a message arrives at, at a time or never."""

    def __init__(self, device: Device, message_at: float = float("inf")) -> None:
        self._device = device
        self.message_at = message_at

    def poll(self, timeout: int) -> int:
        assert timeout == 0, "asking must not wait"
        return int(self._device.now >= self.message_at)


class Loop:
    """SGLang's overlap loop in one process of a server, as far as it receives and launches.

    Attributes:
        received: calls of SGLang's ``recv_requests``.
    """

    def __init__(self, device: Device, progress: RoundProgress | None, **ranks: int) -> None:
        self.device = device
        self.progress = progress
        self.tokenizer: Any = Socket(device)
        self.rpc: Any = Socket(device)
        self._ps = SimpleNamespace(**{"pp_rank": 0, "attn_tp_rank": 0, "attn_cp_rank": 0, **ranks})
        self.received = 0

    def receive(self) -> float:
        """The top of the loop; returns the seconds it took."""
        receiver = SimpleNamespace(recv_from_tokenizer=self.tokenizer, recv_from_rpc=self.rpc, ps=self._ps)
        begin = self.device.now

        def original(asked: Any) -> list[str]:
            assert asked is receiver
            self.received += 1
            return ["a request"]

        assert late_launch.receive_until_launch(original, receiver) == ["a request"]
        return self.device.now - begin

    def launch(self, forwards: int = WINDOW, prepares: float = 0.0, **begin: bool) -> None:
        """A round, which the host prepares for so long, or without forwards a prefill, which takes as long as one."""
        if self.progress is not None:
            self.progress.begin(**begin)
        self.device.now += prepares
        for _ in range(forwards or 1):
            if self.progress is not None and forwards:
                self.progress.mark()
            self.device.launch_forward()
        if self.progress is not None and forwards:
            self.progress.end()

    def round(self, launch_takes: float = 0.0, **launch: Any) -> None:
        """One turn of the loop. The launch takes so long; the results of the round before are then waited for."""
        self.receive()
        self.device.now += launch_takes
        over = self.device.busy_until
        self.launch(**launch)
        self.device.now = max(self.device.now, over)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(late_launch, "time", made)
    monkeypatch.setattr(round_progress, "_current", None)
    return made


@pytest.fixture
def progress(device: Device) -> RoundProgress:
    made = RoundProgress(WINDOW, device.new_event)
    round_progress.set_current(made)
    return made


@pytest.fixture
def loop(device: Device, progress: RoundProgress) -> Loop:
    return Loop(device, progress)


def forwards_waited(seconds: float) -> Any:
    """In forwards, to which the interval between two looks may add."""
    return pytest.approx(seconds / FORWARD, abs=2 * late_launch.INTERVAL / FORWARD)


# ------------------------------------------------------------------------------ waiting


@pytest.mark.parametrize("lead", [1, 2, 3])
def test_the_launch_waits_until_the_lead_is_all_that_is_left(loop: Loop, progress: RoundProgress, lead: int) -> None:
    progress.lead = lead
    loop.launch()
    assert WINDOW - lead == forwards_waited(loop.receive())
    assert loop.received == 1 and progress.waits == 1 and progress.late_launches == 0


def test_nobody_waits_for_a_round_that_the_lead_covers(loop: Loop, progress: RoundProgress) -> None:
    progress.lead = WINDOW
    loop.launch()
    assert loop.receive() == 0
    progress.lead = 2
    for forwards in (1, 2):
        loop.launch(forwards)
        assert loop.receive() == 0
    assert progress.waits == 0 and loop.received == 3


def test_a_round_is_waited_for_as_it_comes_behind_others(loop: Loop) -> None:
    """Launched while the one before it runs, as SGLang does after a prefill."""
    loop.launch(0)
    loop.launch()
    assert 1 + WINDOW - 1 == forwards_waited(loop.receive())


@pytest.mark.parametrize("socket", ["tokenizer", "rpc"])
def test_a_message_ends_the_wait(loop: Loop, progress: RoundProgress, socket: str) -> None:
    loop.launch()
    getattr(loop, socket).message_at = FORWARD
    assert 1 == forwards_waited(loop.receive())
    assert progress.waits == 1


def test_a_message_at_a_socket_of_zmq_ends_the_wait_and_stays_there(loop: Loop, progress: RoundProgress) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        pull.bind("inproc://requests")
        push.connect("inproc://requests")
        loop.tokenizer = pull
        loop.launch()
        assert WINDOW - 1 == forwards_waited(loop.receive())
        push.send(b"a request")
        loop.launch()
        assert loop.receive() == 0 and progress.waits == 1
        assert pull.recv(zmq.NOBLOCK) == b"a request"


def test_a_message_that_is_there_is_not_kept_waiting(loop: Loop, progress: RoundProgress) -> None:
    loop.launch()
    loop.tokenizer.message_at = 0
    assert loop.receive() == 0 and progress.waits == 0


def test_a_round_is_waited_for_once(loop: Loop, progress: RoundProgress) -> None:
    """SGLang receives again without a launch where it is paused or has nothing to run."""
    loop.launch()
    loop.tokenizer.message_at = FORWARD
    loop.receive()
    loop.tokenizer.message_at = float("inf")
    assert loop.receive() == 0 and progress.waits == 1 and loop.received == 2


def test_nothing_but_rounds_is_waited_for(loop: Loop, progress: RoundProgress) -> None:
    assert loop.receive() == 0  # nothing was launched yet
    loop.launch()
    loop.launch(0)
    assert loop.receive() == 0 and progress.waits == 0


def test_a_device_that_hangs_does_not_keep_messages_out(loop: Loop, device: Device, progress: RoundProgress) -> None:
    device.busy_until = 1e9
    loop.launch()
    assert loop.receive() == pytest.approx(late_launch.LONGEST, abs=2 * late_launch.INTERVAL)
    device.now = 2e9
    loop.launch()
    assert progress.late_launches == 0  # the lead is not to blame


def test_without_overlap_nothing_is_waited_for_or_late(loop: Loop, device: Device, progress: RoundProgress) -> None:
    """The round is over when SGLang receives."""
    for _ in range(10):
        loop.launch()
        device.now = device.busy_until
        assert loop.receive() == 0
    assert progress.waits == progress.late_launches == 0 and progress.lead == 1


@pytest.mark.parametrize("rank", ["pp_rank", "attn_tp_rank", "attn_cp_rank"])
def test_ranks_that_read_no_sockets_do_not_wait(device: Device, progress: RoundProgress, rank: str) -> None:
    loop = Loop(device, progress, **{rank: 1})
    loop.tokenizer = loop.rpc = None
    loop.launch()
    assert loop.receive() == 0 and loop.received == 1


@pytest.mark.parametrize("socket", ["tokenizer", "rpc"])
def test_nobody_waits_where_messages_cannot_be_asked_for(loop: Loop, socket: str) -> None:
    setattr(loop, socket, SimpleNamespace(drain=lambda limit: []))
    loop.launch()
    assert loop.receive() == 0 and loop.received == 1


def test_a_server_without_the_algorithm_is_left_alone(device: Device) -> None:
    loop = Loop(device, None)
    loop.launch()
    assert loop.receive() == 0 and loop.received == 1


def test_launches_that_wait_for_the_device_record_nothing(device: Device) -> None:
    progress = RoundProgress.on_device("cpu", WINDOW)
    round_progress.set_current(progress)
    loop = Loop(device, progress)
    loop.launch()
    assert progress.take_moment() is None and loop.receive() == 0


# ------------------------------------------------------------------------------ the lead


def test_the_device_never_idles_where_a_launch_takes_less_than_a_forward(loop: Loop, device: Device) -> None:
    loop.launch()
    for _ in range(20):
        loop.round(launch_takes=FORWARD / 2)
    assert device.busy_until == pytest.approx(21 * WINDOW * FORWARD)


def test_a_late_launch_makes_the_lead_longer(loop: Loop, progress: RoundProgress) -> None:
    """Up to what the launch takes, and no further."""
    loop.launch()
    for _ in range(20):
        loop.round(launch_takes=1.5 * FORWARD)
    assert progress.lead == 2 and progress.late_launches == 1 and progress.waits == 20


def test_the_lead_grows_until_nobody_waits(loop: Loop, progress: RoundProgress) -> None:
    loop.launch()
    for _ in range(20):
        loop.round(launch_takes=10 * FORWARD)
    assert progress.lead == WINDOW and progress.late_launches == progress.waits == WINDOW - 1


def test_good_launches_make_the_lead_shorter(loop: Loop, progress: RoundProgress) -> None:
    progress.lead = 3
    loop.launch()
    leads = []
    for _ in range(3 * RoundProgress.GOOD_ROUNDS):
        loop.round()
        leads.append(progress.lead)
    assert leads == [3] * 63 + [2] * 64 + [1] * 65  # one round of each, then the next lead; at least 1
    assert progress.late_launches == 0


def test_a_late_launch_begins_the_count_of_good_ones_anew(loop: Loop, progress: RoundProgress) -> None:
    progress.lead = 2
    loop.launch()
    for _ in range(RoundProgress.GOOD_ROUNDS - 1):
        loop.round()
    loop.round(launch_takes=3 * FORWARD)
    assert progress.lead == 3
    for _ in range(RoundProgress.GOOD_ROUNDS - 1):
        loop.round()
    assert progress.lead == 3
    loop.round()
    assert progress.lead == 2


def test_a_lead_that_covers_all_rounds_does_not_stay_for_good(loop: Loop, progress: RoundProgress) -> None:
    progress.lead = WINDOW
    loop.launch()
    for _ in range(4 * RoundProgress.GOOD_ROUNDS):
        loop.round()
    assert progress.lead == 1 and progress.waits > 0


def test_what_the_host_prepares_belongs_to_the_launch(loop: Loop, progress: RoundProgress) -> None:
    loop.launch()
    for _ in range(20):
        loop.round(launch_takes=0.8 * FORWARD, prepares=0.8 * FORWARD)
    assert progress.lead == 2 and progress.late_launches == 1


def test_a_prefill_says_nothing_about_the_lead(loop: Loop, progress: RoundProgress) -> None:
    """It is prepared for longer than a round, and arriving requests are what the wait was for."""
    loop.launch()
    loop.round(launch_takes=2 * FORWARD, forwards=0)
    loop.round()
    assert progress.late_launches == 0 and progress.lead == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_wait_that_a_message_ended_says_nothing_about_the_lead(
    loop: Loop, progress: RoundProgress, late: bool
) -> None:
    progress.lead = 2
    loop.launch()
    for _ in range(2 * RoundProgress.GOOD_ROUNDS):
        loop.tokenizer.message_at = loop.device.now + late_launch.INTERVAL / 2
        loop.round(launch_takes=9 * FORWARD if late else 0)
    assert progress.waits == 2 * RoundProgress.GOOD_ROUNDS
    assert progress.lead == 2 and progress.late_launches == 0


def test_a_server_without_requests_is_not_late(loop: Loop, device: Device, progress: RoundProgress) -> None:
    """The last round is waited for, and nothing launched until a request comes."""
    loop.launch()
    loop.receive()
    device.now += 100
    loop.receive()
    loop.launch(0)
    assert progress.waits == 1 and progress.late_launches == 0 and progress.lead == 1


def test_a_launch_that_needs_the_results_is_not_late(loop: Loop, device: Device, progress: RoundProgress) -> None:
    loop.launch()
    for _ in range(3):
        loop.receive()
        device.now = device.busy_until
        loop.launch(follows_results=True)
    assert progress.waits == 3 and progress.late_launches == 0 and progress.lead == 1


# ------------------------------------------------------------------------------ the rest


def test_events_are_used_again(loop: Loop, device: Device) -> None:
    loop.launch()
    for _ in range(5):
        loop.round()
    assert device.events == WINDOW + 1


def test_the_hook_is_registered(plugin: None) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_sparsespec.scheduler_patch import hooks

    assert HOOKED in hooks._TARGETS and HOOKED in HookRegistry._patched


def test_sglangs_receiver_waits(plugin: None, loop: Loop) -> None:
    """SGLang's own class, with everything that it does after the wait left out."""
    import dataclasses

    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    class Skips:
        def handle(self, last_batch: Any) -> bool:
            return False  # SGLang returns before it reads

    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(SchedulerRequestReceiver)}
    ranks = SimpleNamespace(pp_rank=0, attn_tp_rank=0, attn_cp_rank=0)
    values.update(recv_from_tokenizer=loop.tokenizer, recv_from_rpc=loop.rpc, ps=ranks)
    values.update(recv_skipper=Skips(), get_last_batch=lambda: None)
    receiver = SchedulerRequestReceiver(**values)
    loop.launch()
    assert receiver.recv_requests() == []
    assert WINDOW - 1 == forwards_waited(loop.device.now)


def test_waits_and_late_launches_are_metrics(loop: Loop, progress: RoundProgress) -> None:
    import torch

    from sglang_sparsespec.forward_stats import ForwardStats
    from sglang_sparsespec.metrics import COUNTERS, DraftMetrics

    speculation: Any = SimpleNamespace(plain_rounds=0)
    metrics = DraftMetrics(WINDOW - 1, torch.zeros(2), ForwardStats(), speculation, progress)
    loop.launch()
    loop.round()
    loop.round(launch_takes=2 * FORWARD)
    values = metrics.as_dict()
    assert values["sparsespec_launch_waits"] == 2 and values["sparsespec_late_launches"] == 1
    assert all(f"sparsespec_{name}" in values for name in COUNTERS)
