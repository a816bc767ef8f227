"""Results read from MLflow and computed from them, without any text for people."""
