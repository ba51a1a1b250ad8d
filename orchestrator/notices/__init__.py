"""Notices to a webhook: https, signed, tried again off the critical path, and only to addresses that are meant.

Read ``webhook`` (the thread), then ``delivery`` (one attempt), ``addresses`` (which ones), ``signing``, ``references``.
"""

from orchestrator.notices.addresses import Network, networks_of
from orchestrator.notices.body import notice_body
from orchestrator.notices.references import read_reference
from orchestrator.notices.webhook import Webhook, open_webhook

__all__ = ["Network", "Webhook", "networks_of", "notice_body", "open_webhook", "read_reference"]
