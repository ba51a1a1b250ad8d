"""What runs in the training processes. Never imports orchestrator."""
