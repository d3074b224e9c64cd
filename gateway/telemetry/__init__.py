"""What operators see of the process: metrics, logs and traces, all without secrets."""
