"""The command line: ``app`` has the verbs, ``run`` runs a sweep, ``live`` shows it, ``home`` says where things are."""

from orchestrator.cli.app import main

__all__ = ["main"]
