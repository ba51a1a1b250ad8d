"""What the command line asks of a trained model: ``python -m models.verbs``, a process of its own that loads torch."""
