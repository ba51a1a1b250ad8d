"""The thread that hands notices over while a sweep runs, and never troubles it.

Its queue is bounded: behind a receiver that is down for long, the oldest notices give way to newer ones. A notice is
tried for an hour, with growing pauses. An outage is told once when it begins and once when it ends.
"""

from __future__ import annotations

import logging
import os
import secrets
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)

from orchestrator.notices.addresses import Network, networks_of
from orchestrator.notices.delivery import Target, deliver
from orchestrator.notices.delivery_errors import Refused, Unreached
from orchestrator.notices.references import read_reference
from orchestrator.notices.signing import key_of, signed_headers
from orchestrator.sweep import NoticesConfig

_LOG = logging.getLogger(__name__)

LONGEST_QUEUE = 256
GIVE_UP_SECONDS = 3600.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0

Tell = Callable[[str, str], None]
"""Gets the kind and the words of an event."""


class Webhook:
    """Where a sweep's notices go. ``networks`` are private ones that are meant, ``context`` is TLS's trust."""

    def __init__(
        self,
        url: str,
        key: bytes,
        tell: Tell,
        *,
        networks: Sequence[Network] = (),
        context: ssl.SSLContext | None = None,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self._target, self._key, self._tell_event, self._networks = Target.of(url), key, tell, networks
        self._context = context or ssl.create_default_context()
        self._queue: deque[tuple[str, bytes]] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._is_down = False
        self.num_lost = 0
        self._retrying = Retrying(
            retry=retry_if_exception_type(Unreached),
            stop=stop_after_delay(GIVE_UP_SECONDS) | stop_when_event_set(self._closing),
            wait=wait_exponential(first_pause_seconds, LONGEST_PAUSE_SECONDS) + wait_random(0.0, first_pause_seconds),
            sleep=self._pause,
            before_sleep=self._tell_down,
            reraise=True,
        )
        self._thread = threading.Thread(target=self._loop, name="webhook", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, body: bytes) -> None:
        """Returns at once; what becomes of it is the thread's matter."""
        with self._changed:
            if len(self._queue) >= LONGEST_QUEUE:
                self._queue.popleft()
                self.num_lost += 1
            self._queue.append((f"msg_{secrets.token_hex(12)}", body))
            self._changed.notify()

    def close(self, timeout_seconds: float) -> bool:
        """Hand over what is left, each notice once more, for at most about this long; whether all were taken."""
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        with self._changed:
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive() and not self._queue and not self.num_lost

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing.is_set():
                    self._changed.wait()
                if not self._queue or time.monotonic() > self._deadline:
                    return
                notice_id, body = self._queue.popleft()
            try:
                self._retrying.copy()(self._try_once, notice_id, body)
            except Exception as error:
                self.num_lost += 1
                self._down(f"a notice was not taken: {_words(error)}")
            else:
                self._up()

    def _try_once(self, notice_id: str, body: bytes) -> None:
        headers = signed_headers(notice_id, int(time.time()), body, self._key)
        deliver(self._target, headers, body, self._networks, self._context)

    def _pause(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def _tell_down(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._down(f"it is not reached, and tried again for an hour: {_words(error)}")

    def _down(self, said: str) -> None:
        if not self._is_down:
            self._is_down = True
            self._tell("webhook_down", f"notices.webhook: {said}; the sweep runs on")

    def _up(self) -> None:
        if self._is_down:
            self._is_down = False
            self._tell("webhook_back", "notices.webhook: it takes notices again")

    def _tell(self, kind: str, message: str) -> None:
        try:
            self._tell_event(kind, message)
        except Exception as error:
            _LOG.warning("the event %s was not stored: %s", kind, type(error).__name__)


def open_webhook(config: NoticesConfig, tell: Tell) -> Webhook | None:
    """The webhook of a sweep, not started yet; None without one. UserError when a secret is not where it is said."""
    if config.webhook is None or config.secret is None:
        return None
    key = key_of(read_reference(config.secret, "notices.secret"))
    is_url = config.webhook.startswith("https://")
    url = config.webhook if is_url else read_reference(config.webhook, "notices.webhook")
    return Webhook(url, key, tell, networks=networks_of(os.environ.get("GATESWEEP_WEBHOOK_NETWORKS", "")))


def _words(error: BaseException | None) -> str:
    """Ours are free of secrets; of any other only the class is."""
    return str(error) if isinstance(error, Unreached | Refused) else type(error).__name__
