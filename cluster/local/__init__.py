"""Ray, S3 and MLflow on this machine, which end with the command that started them."""
