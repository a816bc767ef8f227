"""The machines: the embedded local stack. Knows command lines, never configs."""
