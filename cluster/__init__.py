"""The machines: servers on this one, jobs on a cluster, checks of its nodes. Knows no configs."""
