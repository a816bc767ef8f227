"""Results read from MLflow and computed from it; text for people is made in `hemoco.report`."""
