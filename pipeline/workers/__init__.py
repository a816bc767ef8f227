"""The pipeline's door to Ray (sweeps also use Ray Tune): worker groups, tasks, capacity, interruption."""
