"""The only package that talks to MLflow: runs, metrics, models, tags, and the machine's load."""
