"""The pipeline's door to Ray: worker groups, tasks, capacity and interruption.

Only `pipeline.sweep` uses Ray elsewhere, for Ray Tune's draws and early stops.
"""
