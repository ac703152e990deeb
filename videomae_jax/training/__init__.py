"""The only place that knows about steps: one loop, tasks, the train step, checkpoints and reports."""
