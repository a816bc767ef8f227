"""Ray, S3 and MLflow on this machine."""
