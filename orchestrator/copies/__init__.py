"""Copies on another file system, by URL: S3 and whatever else fsspec knows. The only package that knows fsspec.

    <url>/trials/<fingerprint>/config.json
    <url>/trials/<fingerprint>/attempts/<number>-<token>/attempt.json
    <url>/trials/<fingerprint>/attempts/<number>-<token>/checkpoints/step_<n>/...     manifest.json is written last
    <url>/reports/<sweep>/...                                                         the page is written last

A copy lies where the original lies in the home, so that what is fetched is found by every verb. Read ``place`` (a
folder by URL), ``checkpoints`` (there), ``fetching`` (and back), ``background`` (while a sweep runs).
"""

from orchestrator.copies.background import Copier
from orchestrator.copies.checkpoints import copy_checkpoint, noted_url
from orchestrator.copies.fetching import fetch
from orchestrator.copies.place import CopyError, Place, is_url

__all__ = ["Copier", "CopyError", "Place", "copy_checkpoint", "fetch", "is_url", "noted_url"]
