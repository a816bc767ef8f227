"""Entry point of `python -m jobs VERB ...`."""

import os
import sys

# Ray and MLflow read these when they are imported, so they are set before any of our imports.
# Without the first, Ray builds a new uv environment for each worker when started by `uv run`.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would merge equal log lines of several workers into one, and hide which worker wrote them.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# rclone's S3 server answers a range with the checksum of the whole object, which botocore refuses
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

from jobs.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
