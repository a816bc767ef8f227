"""The only package of the pipeline that talks to Ray: worker groups, tasks, capacity, interruption."""
